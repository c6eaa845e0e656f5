//! Random sequences of operations through the C functions: the products and blends are those of the oracle, and a blender
//! that does a pass at once has the state of one that does its parts, bit for bit.

#![no_main]

use gradblend::{Pass, bf16, f16};
use gradblend_fuzz::{blender, check_state, expect, number, numbers, run};
use gradblend_testkit::{Face, Output, Random, Result as Called, Sample, Sums, Tensor, TestBlender, bits};
use libfuzzer_sys::arbitrary::{Result, Unstructured};

fn tensor<T: Sample>(u: &mut Unstructured<'_>, random: &mut Random, k: usize) -> Result<Tensor<T>> {
    let len = if u.ratio(1, 16)? { 65_537 / k } else { u.int_in_range(0..=600)? };
    let mut tensor = Tensor::random(random, len, k, u.int_in_range(0..=3)?, 4);
    tensor.has_products = u.ratio(3, 4)?;
    let in_place = tensor.modalities.iter().position(Option::is_some).map_or(Output::None, Output::InPlace);
    tensor.output = *u.choose(&[Output::None, Output::Blended, in_place])?;
    if let (true, Some(element)) = (u.ratio(1, 16)?, tensor.train.first_mut()) {
        *element = T::round(number(u)?);
    }
    Ok(tensor)
}

fn pass<T: Sample>(blender: &mut TestBlender, tensors: &mut [Tensor<T>], what: Pass) -> Called<()> {
    let mut uploaded = Face::FFI.upload(tensors);
    let plan = blender.plan(uploaded.inputs())?;
    blender.pass(&plan, what)
}

fn sequence<T: Sample>(u: &mut Unstructured<'_>) -> Result<Called<()>> {
    let Some(mut whole) = blender(u)? else { return Ok(Ok(())) };
    let (k, mut random) = (whole.k(), Random(u.arbitrary()?));
    let tensors: Vec<Tensor<T>> =
        (0..u.int_in_range(0..=3)?).map(|_| tensor(u, &mut random, k)).collect::<Result<_>>()?;
    let rounds = (0..u.int_in_range(1..=6)?)
        .map(|_| Ok((Pass::from_bits_truncate(u.int_in_range(1..=15)?), u.int_in_range(0..=5)?, numbers(u, k)?)))
        .collect::<Result<Vec<_>>>()?;
    let test = || {
        let mut parts = Face::FFI.blender_with(*whole.config())?;
        let (mut whole_tensors, mut tensors, mut pending) = (tensors.clone(), tensors, Sums::new(k));
        for (what, operation, weights) in rounds {
            let valid = what.contains(Pass::BLEND) || !what.contains(Pass::ACCUMULATE);
            if expect(pass(&mut whole, &mut whole_tensors, what), valid).is_none() {
                continue;
            }
            let (before, in_force) = (tensors.clone(), parts.weights()?);
            if what.contains(Pass::DOT) {
                pass(&mut parts, &mut tensors, Pass::DOT)?;
                before.iter().for_each(|tensor| pending.add(tensor));
                pending.check(&parts.pending()?, "pending sums");
            }
            if what.contains(Pass::BLEND) {
                pass(&mut parts, &mut tensors, what & (Pass::BLEND | Pass::ACCUMULATE))?;
                for (tensor, before) in tensors.iter().zip(&before).filter(|(t, _)| t.output != Output::None) {
                    tensor.check_blend(before, &in_force, what.contains(Pass::ACCUMULATE), "blend");
                }
            }
            if what.contains(Pass::OBSERVE) {
                parts.observe()?;
                assert!(parts.pending()?.iter().all(|sum| *sum == 0.0));
                pending = Sums::new(k);
            }
            let valid = weights.iter().all(|w| (*w as f32).is_finite());
            for blender in [&mut whole, &mut parts] {
                match operation {
                    0 => blender.reweight()?,
                    1 => blender.reset()?,
                    2 => expect(blender.set_weights(&weights), valid).unwrap_or_default(),
                    _ => {}
                }
            }
            pending = if operation == 1 { Sums::new(k) } else { pending };
            let saved = parts.save()?;
            assert!(whole.save()? == saved);
            check_state(&mut parts)?;
            for (one, other) in whole_tensors.iter().zip(&tensors).filter(|(t, _)| t.output != Output::None) {
                assert_eq!(bits(one.written()), bits(other.written()));
            }
            if operation == 3 {
                parts = Face::FFI.blender_with(*whole.config())?;
                parts.load(&saved)?;
            }
        }
        Ok(())
    };
    Ok(test())
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| run(data, |u| match u.int_in_range(0..=2)? {
    0 => sequence::<f32>(u),
    1 => sequence::<f16>(u),
    _ => sequence::<bf16>(u),
}));
