//! Random sequences of the C functions on two blenders: one does every pass at once, the other its parts one by one. The
//! products and blends are those of the oracle, and both states stay equal, bit for bit.

#![no_main]

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use gradblend::ffi::*;
use gradblend_fuzz::{CBlender, Number, OK, config, expect};
use gradblend_testkit::{Output, Random, Sample, Sums, Tensor, bits};
use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;

struct Side<T> {
    blender: CBlender,
    tensors: Vec<Tensor<T>>,
    plan: *mut gradblend_plan,
}

impl<T: Sample> Side<T> {
    /// Plans the tensors anew.
    fn plan(&mut self) {
        let address =
            |v: &Option<_>| v.as_ref().map_or(null(), |v: &gradblend_testkit::Buffer<T>| v.as_ptr().cast::<c_void>());
        let modalities: Vec<Vec<_>> = self.tensors.iter().map(|t| t.modalities.iter().map(address).collect()).collect();
        let record = |(t, modalities): (&mut Tensor<T>, &Vec<*const c_void>)| gradblend_tensor {
            len: t.len() as u64,
            dtype: T::DTYPE as i32,
            train: if t.has_products { t.train.as_ptr().cast() } else { null() },
            valid: if t.has_products { t.valid.as_ptr().cast() } else { null() },
            modalities: modalities.as_ptr(),
            blended: match t.output {
                Output::None => null_mut(),
                Output::Blended => t.blended.as_mut_ptr().cast(),
                Output::InPlace(k) => t.modalities[k].as_mut().map_or(null_mut(), |v| v.as_mut_ptr().cast()),
            },
        };
        let records: Vec<_> = self.tensors.iter_mut().zip(&modalities).map(record).collect();
        gradblend_plan_destroy(self.plan);
        // SAFETY: the records and their arrays are alive for the call, the gradients longer than the plan.
        expect(
            unsafe { gradblend_plan_create(self.blender.0, records.as_ptr(), records.len() as u64, &mut self.plan) },
            true,
        );
    }

    fn pass(&mut self, what: u32) {
        // SAFETY: the plan's gradients are alive, and nothing else uses them.
        expect(unsafe { gradblend_pass(self.blender.0, self.plan, what, null_mut()) }, true);
    }

    fn sums(&self) -> Vec<f64> {
        let (mut sums, mut count) = (null_mut(), 0);
        // SAFETY: both are valid pointers; the sums live as long as the blender.
        unsafe {
            expect(gradblend_pending_sums(self.blender.0, &mut sums, &mut count), true);
            std::slice::from_raw_parts(sums, count as usize).to_vec()
        }
    }
}

fn run<T: Sample>(u: &mut Unstructured<'_>) -> Result<()> {
    let config = config(u)?;
    let (Some(whole), Some(parts)) = (CBlender::new(&config), CBlender::new(&config)) else { return Ok(()) };
    let (k, mut random) = (whole.1, Random(u.arbitrary()?));
    let mut tensors = Vec::new();
    for _ in 0..u.int_in_range(0..=3)? {
        let len = if u.ratio(1, 16)? { 65_537 / k } else { u.int_in_range(0..=600)? };
        let mut tensor = Tensor::<T>::random(&mut random, len, k, u.int_in_range(0..=3)?, 4);
        tensor.has_products = u.ratio(3, 4)?;
        let first = tensor.modalities.iter().position(Option::is_some);
        tensor.output = *u.choose(&[Output::None, Output::Blended, first.map_or(Output::None, Output::InPlace)])?;
        if let (true, Some(element)) = (u.ratio(1, 16)?, tensor.train.first_mut()) {
            *element = T::round(Number::arbitrary(u)?.0);
        }
        tensors.push(tensor);
    }
    let side = |blender, tensors| Side { blender, tensors, plan: null_mut() };
    let mut sides = [side(whole, tensors.clone()), side(parts, tensors)];
    sides.iter_mut().for_each(Side::plan);
    let mut pending = Sums::new(k);
    for _ in 0..u.int_in_range(1..=6)? {
        let what = u.int_in_range(1..=15)? & if u.arbitrary()? { 11 } else { 15 };
        let what = if what & 2 == 0 { what & !4 | 1 } else { what };
        let weights = sides[1].blender.report().weights[..k].iter().map(|w| *w as f32).collect::<Vec<_>>();
        let before = sides[1].tensors.clone();
        sides[0].pass(what);
        if what & 1 != 0 {
            sides[1].pass(1);
            before.iter().for_each(|tensor| pending.add(tensor));
            pending.check(&sides[1].sums(), "pending sums");
        }
        if what & 2 != 0 {
            sides[1].pass(what & 6);
            for (tensor, before) in sides[1].tensors.iter().zip(&before) {
                tensor.check_blend(before, &weights, what & 4 != 0, "blend");
            }
        }
        if what & 8 != 0 {
            sides[1].pass(8);
            assert!(sides[1].sums().iter().all(|sum| *sum == 0.0));
            pending = Sums::new(k);
        }
        let weights = (0..k).map(|_| Ok(Number::arbitrary(u)?.0)).collect::<Result<Vec<_>>>()?;
        let valid = weights.iter().all(|w| (*w as f32).is_finite());
        let operation = u.int_in_range(0..=5)?;
        for Side { blender, .. } in &sides {
            // SAFETY: the handle is live, and the array has K numbers.
            unsafe {
                match operation {
                    0 => expect(gradblend_reweight(blender.0, null_mut()), true),
                    1 => expect(gradblend_reset(blender.0, null_mut()), true),
                    2 => expect(gradblend_set_weights(blender.0, weights.as_ptr(), k as u32, null_mut()), valid),
                    _ => true,
                };
            }
        }
        pending = if operation == 1 { Sums::new(k) } else { pending };
        assert!(sides[0].blender.save() == sides[1].blender.save());
        for (one, other) in sides[0].tensors.iter().zip(&sides[1].tensors) {
            assert!(one.output == Output::None || bits(one.written()) == bits(other.written()));
        }
        if let (true, Some(restored)) = (operation == 3, CBlender::new(&config)) {
            assert_eq!(restored.load(&sides[1].blender.save()), OK);
            sides[1].blender = restored;
            sides[1].plan();
        }
    }
    sides.iter().for_each(|side| gradblend_plan_destroy(side.plan));
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    _ = match u.int_in_range(0..=2) {
        Ok(0) => run::<f32>(&mut u),
        Ok(1) => run::<gradblend::f16>(&mut u),
        _ => run::<gradblend::bf16>(&mut u),
    };
});
