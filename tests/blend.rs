//! `blend`, with and without ACCUMULATE, against the oracle.

mod common;

use common::{LENGTHS, Outcome, Random, STREAM, Sample, Tensor, bits, blender, weights};
use gradblend::{Pass, TensorGrads, f16};

each_dtype!(lengths_and_alignments, accumulates, absent_is_zero, in_place, large_and_past_the_cache);

fn set_random_weights(blender: &mut gradblend::Blender, random: &mut Random) -> gradblend::Result<Vec<f32>> {
    let k = blender.config().modalities as usize;
    let new: Vec<f64> = (0..k).map(|_| random.number()).collect();
    blender.set_weights(&new, STREAM())?;
    Ok(weights(blender))
}

fn lengths_and_alignments<T: Sample>() -> Outcome {
    let mut random = Random(11);
    for len in LENGTHS {
        for (k, offset) in [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (9, 1), (32, 0)] {
            if len > 5000 && k > 5 {
                continue;
            }
            let mut blender = blender(k, 2)?;
            let weights = set_random_weights(&mut blender, &mut random)?;
            let mut tensor = Tensor::<T>::random(&mut random, len, k, offset, 3);
            let before = tensor.blended.clone();
            let plan = blender.plan(&[tensor.grads()])?;
            blender.blend(&plan, STREAM())?;
            drop(plan);
            tensor.check_blend(&weights, None, &format!("len {len}, K = {k}, offset {offset}"));
            assert_eq!(tensor.blended[..offset], before[..offset], "wrote before the tensor");
        }
    }
    Ok(())
}

fn accumulates<T: Sample>() -> Outcome {
    let mut random = Random(12);
    for len in [1, 1025, 70_000] {
        let mut blender = blender(5, 2)?;
        let weights = set_random_weights(&mut blender, &mut random)?;
        let mut tensor = Tensor::<T>::random(&mut random, len, 5, 1, 3);
        let before = tensor.blended.clone();
        let plan = blender.plan(&[tensor.grads()])?;
        blender.pass(&plan, Pass::BLEND | Pass::ACCUMULATE, STREAM())?;
        drop(plan);
        tensor.check_blend(&weights, Some(&before), &format!("len {len}"));
    }
    Ok(())
}

fn absent_is_zero<T: Sample>() -> Outcome {
    let mut random = Random(13);
    let mut absent = Tensor::<T>::random(&mut random, 3000, 6, 0, 2);
    let mut zero = absent.clone();
    for v in &mut zero.modalities {
        v.get_or_insert_with(|| vec![T::round(0.0); 3000]);
    }
    let mut blender = blender(6, 1)?;
    set_random_weights(&mut blender, &mut random)?;
    for tensor in [&mut absent, &mut zero] {
        let plan = blender.plan(&[tensor.grads()])?;
        blender.blend(&plan, STREAM())?;
    }
    assert_eq!(bits(&absent.blended), bits(&zero.blended));
    let mut none = Tensor::<T>::random(&mut random, 100, 6, 0, 1);
    let plan = blender.plan(&[none.grads()])?;
    blender.blend(&plan, STREAM())?;
    drop(plan);
    assert_eq!(none.blended, vec![T::round(0.0); 100], "zeros where no modality is present");
    Ok(())
}

fn in_place<T: Sample>() -> Outcome {
    let mut random = Random(14);
    for k in [1, 3, 6] {
        for target in [0, k - 1] {
            let mut apart = Tensor::<T>::random(&mut random, 70_000, k, 0, 0);
            let mut blender = blender(k, 2)?;
            set_random_weights(&mut blender, &mut random)?;
            let mut same = apart.clone();
            let plan = blender.plan(&[apart.grads()])?;
            blender.step(&plan, STREAM())?;
            let want = common::bits64(&blender.report(STREAM())?.mean);
            drop(plan);
            blender.reset(STREAM())?;
            let mut out = same.modalities[target].take().unwrap_or_default();
            let refs: Vec<Option<&[T]>> = same.modalities.iter().map(Option::as_deref).collect();
            let grads = TensorGrads::new(&same.train, &same.valid, &refs).in_place(target, &mut out);
            let plan = blender.plan(&[grads])?;
            blender.step(&plan, STREAM())?;
            drop(plan);
            assert_eq!(bits(&out), bits(&apart.blended), "K = {k}, over modality {target}");
            assert_eq!(common::bits64(&blender.report(STREAM())?.mean), want);
        }
    }
    Ok(())
}

/// Over the size from which the blend is written past the cache, at every alignment to a cache line.
fn large_and_past_the_cache<T: Sample>() -> Outcome {
    let mut random = Random(15);
    for offset in [0, 1, 3] {
        let mut blender = blender(1, 2)?;
        let weights = set_random_weights(&mut blender, &mut random)?;
        let len = 40_000_000 / std::mem::size_of::<T>() / 2;
        let mut tensor = Tensor::<T>::random(&mut random, 1000 + offset, 1, offset, 0);
        for list in [&mut tensor.train, &mut tensor.valid, &mut tensor.blended]
            .into_iter()
            .chain(tensor.modalities.iter_mut().flatten())
        {
            let part = list.clone();
            *list = part.iter().copied().cycle().take(len + offset).collect();
        }
        let plan = blender.plan(&[tensor.grads()])?;
        blender.blend(&plan, STREAM())?;
        drop(plan);
        tensor.check_blend(&weights, None, &format!("offset {offset}"));
    }
    Ok(())
}

/// A trainer that never holds all K gradients: DOT + BLEND + ACCUMULATE on one after the other. Bit for bit in f32, where
/// the sum is not rounded on the way.
#[test]
fn modality_by_modality() -> Outcome {
    let mut random = Random(16);
    let k = 3;
    let mut all = Tensor::<f32>::random(&mut random, 5000, k, 0, 0);
    let mut blender = blender(k, 1)?;
    set_random_weights(&mut blender, &mut random)?;
    let plan = blender.plan(&[all.grads()])?;
    blender.step(&plan, STREAM())?;
    drop(plan);
    let want = blender.report(STREAM())?;
    blender.reset(STREAM())?;
    let mut blended = vec![0.0_f32; 5000];
    for m in 0..k {
        let refs: Vec<Option<&[f32]>> = (0..k).map(|i| all.modalities[i].as_deref().filter(|_| i == m)).collect();
        let grads = TensorGrads::new(&all.train, &all.valid, &refs).blended(&mut blended);
        let plan = blender.plan(&[grads])?;
        blender.pass(&plan, Pass::DOT | Pass::BLEND | Pass::ACCUMULATE, STREAM())?;
    }
    blender.observe(STREAM())?;
    assert_eq!(bits(&blended), bits(&all.blended));
    assert_eq!(blender.report(STREAM())?, want);
    Ok(())
}

/// Offline users have no train and validation gradients.
#[test]
fn without_train_and_validation_gradients() -> Outcome {
    let mut blender = blender(2, 1)?;
    blender.set_weights(&[2.0, -0.5], STREAM())?;
    let mut out = [0.0_f32; 3];
    let grads = TensorGrads::blend_only(&[Some(&[1.0, 2.0, 3.0][..]), Some(&[4.0, 4.0, 4.0])]).blended(&mut out);
    let plan = blender.plan(&[grads])?;
    blender.step(&plan, STREAM())?;
    drop(plan);
    assert_eq!(out, [0.0, 2.0, 4.0]);
    let report = blender.report(STREAM())?;
    assert_eq!((report.observed, report.mean), (1, vec![0.0, 0.0]));
    Ok(())
}

#[test]
fn not_finite_is_passed_on_and_rounding_is_to_even() -> Outcome {
    let mut blender = blender(1, 1)?;
    let v = [f16::INFINITY, f16::NAN, f16::MAX, f16::from_f32(2049.0 - 1.0), f16::from_bits(1)];
    let mut out = [f16::ZERO; 5];
    for (w, want) in [(2.0, [f32::INFINITY, f32::NAN, f32::INFINITY, 4096.0, 1.192_092_9e-7])] {
        blender.set_weights(&[w], STREAM())?;
        let plan = blender.plan(&[TensorGrads::blend_only(&[Some(&v[..])]).blended(&mut out)])?;
        blender.blend(&plan, STREAM())?;
        drop(plan);
        for (got, want) in out.iter().zip(want) {
            assert!(got.to_f32() == want || (got.is_nan() && want.is_nan()), "{got} against {want}");
        }
    }
    // 0.75 and 1.25 of the smallest f16 round to 1 of it, 0.5 to 0, 1.5 to 2.
    for (w, want) in [(0.75, 1), (1.25, 1), (0.5, 0), (1.5, 2)] {
        blender.set_weights(&[w], STREAM())?;
        let plan = blender.plan(&[TensorGrads::blend_only(&[Some(&v[4..])]).blended(&mut out[..1])])?;
        blender.blend(&plan, STREAM())?;
        drop(plan);
        assert_eq!(out[0].to_bits(), want, "weight {w}");
    }
    Ok(())
}
