//! `blend`, with and without ACCUMULATE, against the oracle.

mod common;

use common::{LENGTHS, Outcome, Place, Random, STREAM, Sample, Target, Tensor, bits, bits64};
use gradblend::{Blender, Pass, Plan, Stream, f16};

tests! {
    each_dtype:
        lengths_and_alignments,
        accumulates,
        counts_of_present_modalities,
        runs_of_small_tensors,
        absent_is_zero,
        in_place,
        in_place_over_any_of_many,
        large_and_past_the_cache;
    once:
        modality_by_modality,
        without_train_and_validation_gradients,
        negative_zero_stays,
        not_finite_is_passed_on_and_rounding_is_to_even;
}

fn set_random_weights(place: Place, blender: &mut Blender, random: &mut Random) -> gradblend::Result<Vec<f32>> {
    let k = blender.config().modalities as usize;
    blender.set_weights(&random.numbers(k), STREAM())?;
    Ok(place.weights(blender))
}

fn accumulate(blender: &mut Blender, plan: &Plan<'_>, stream: Stream) -> gradblend::Result<()> {
    blender.pass(plan, Pass::BLEND | Pass::ACCUMULATE, stream)
}

fn lengths_and_alignments<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(11);
    for len in LENGTHS {
        for (k, offset) in [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (9, 1), (32, 0)] {
            if len > 5000 && k > 5 {
                continue;
            }
            let mut blender = place.blender(k)?;
            let weights = set_random_weights(place, &mut blender, &mut random)?;
            let mut tensors = [Tensor::<T>::random(&mut random, len, k, offset, 3)];
            let before = tensors[0].blended.clone();
            place.run(&mut blender, &mut tensors, Blender::blend)?;
            tensors[0].check_blend(&weights, None, &format!("len {len}, K = {k}, offset {offset}"));
            assert_eq!(tensors[0].blended.memory[..offset], before.memory[..offset], "wrote before the tensor");
        }
    }
    Ok(())
}

fn accumulates<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(12);
    for len in [1, 1025, 70_000] {
        let mut blender = place.blender(5)?;
        let weights = set_random_weights(place, &mut blender, &mut random)?;
        let mut tensors = [Tensor::<T>::random(&mut random, len, 5, 1, 3)];
        let before = tensors[0].blended.clone();
        place.run(&mut blender, &mut tensors, accumulate)?;
        tensors[0].check_blend(&weights, Some(&before), &format!("len {len}"));
    }
    Ok(())
}

/// Of more modalities, so that absent ones stand anywhere between; each list as misaligned as it likes, which changes no
/// bit.
fn counts_of_present_modalities<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(111);
    for present in (0..=9).chain([16, 17, 31, 32]) {
        let k = (present + present % 3).clamp(1, 32);
        let mut blender = place.blender(k)?;
        let weights = set_random_weights(place, &mut blender, &mut random)?;
        let mut aligned: Vec<Tensor<T>> =
            [8200, 37, 66_000].map(|len| Tensor::random(&mut random, len, k, 0, 0)).into();
        for tensor in &mut aligned {
            while tensor.present() > present {
                tensor.modalities[random.below(k)] = None;
            }
        }
        for accumulates in [true, false] {
            let mut scattered: Vec<Tensor<T>> = aligned.iter().map(|tensor| tensor.scattered(&mut random)).collect();
            let before = aligned.clone();
            for tensors in [&mut aligned, &mut scattered] {
                place.run(&mut blender, tensors, if accumulates { accumulate } else { Blender::blend })?;
            }
            for ((aligned, scattered), before) in aligned.iter().zip(&scattered).zip(&before) {
                let case = format!("{present} of {k} present, accumulates: {accumulates}");
                aligned.check_blend(&weights, accumulates.then_some(&before.blended), &case);
                assert_eq!(bits(&aligned.blended), bits(&scattered.blended), "{case}");
            }
        }
    }
    Ok(())
}

/// Tensors around the size from which a chunk is shared by more threads, with some that are not blended between.
fn runs_of_small_tensors<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(112);
    for count in [1, 7, 8, 9, 17, 300] {
        let mut blender = place.blender(2)?;
        let weights = set_random_weights(place, &mut blender, &mut random)?;
        let mut tensors: Vec<Tensor<T>> = (0..count)
            .map(|i| {
                let len = if i % 31 == 30 { 8193 } else { [8192, 5, 1000, 1, 0][random.below(5)] };
                let mut tensor = Tensor::random(&mut random, len, 2, i % 4, 3);
                tensor.dots = i % 5 != 0;
                tensor.target = if i % 7 == 6 { Target::Nowhere } else { Target::Blended };
                tensor
            })
            .collect();
        let before = tensors.clone();
        place.run(&mut blender, &mut tensors, Blender::step)?;
        for (i, (tensor, before)) in tensors.iter().zip(&before).enumerate() {
            if tensor.target == Target::Nowhere {
                assert_eq!(bits(&tensor.blended), bits(&before.blended), "{i} of {count} is not blended");
            } else {
                tensor.check_blend(&weights, None, &format!("{i} of {count}"));
            }
        }
    }
    Ok(())
}

fn absent_is_zero<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(13);
    let mut absent = Tensor::<T>::random(&mut random, 3000, 6, 0, 2);
    let mut zero = absent.clone();
    for v in &mut zero.modalities {
        v.get_or_insert_with(|| vec![T::round(0.0); 3000].into());
    }
    let mut blender = place.blender(6)?;
    set_random_weights(place, &mut blender, &mut random)?;
    for tensor in [&mut absent, &mut zero] {
        place.run(&mut blender, std::slice::from_mut(tensor), Blender::blend)?;
    }
    assert_eq!(bits(&absent.blended), bits(&zero.blended));
    let mut none = [Tensor::<T>::random(&mut random, 100, 6, 0, 1)];
    place.run(&mut blender, &mut none, Blender::blend)?;
    assert_eq!(none[0].blended[..], [T::round(0.0); 100], "zeros where no modality is present");
    Ok(())
}

fn in_place<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(14);
    for k in [1, 3, 6] {
        for target in [0, k - 1] {
            over_one_of_them::<T>(place, &mut random, 70_000, k, target)?;
        }
    }
    Ok(())
}

/// More than are read at a time: the blend must not be written over what is still to be read.
fn in_place_over_any_of_many<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(113);
    for target in 0..12 {
        over_one_of_them::<T>(place, &mut random, 9001, 12, target)?;
    }
    over_one_of_them::<T>(place, &mut random, 1001, 32, 31)
}

fn over_one_of_them<T: Sample>(place: Place, random: &mut Random, len: usize, k: usize, target: usize) -> Outcome {
    let mut apart = [Tensor::<T>::random(random, len, k, 0, 0)];
    let mut same = apart.clone();
    same[0].target = Target::Modality(target);
    let mut blender = place.blender(k)?;
    set_random_weights(place, &mut blender, random)?;
    place.run(&mut blender, &mut apart, Blender::step)?;
    let want = bits64(&blender.report(STREAM())?.mean);
    blender.reset(STREAM())?;
    place.run(&mut blender, &mut same, Blender::step)?;
    assert_eq!(bits(same[0].target()), bits(&apart[0].blended), "K = {k}, over modality {target}");
    assert_eq!(bits64(&blender.report(STREAM())?.mean), want);
    Ok(())
}

/// Over the size from which the CPU writes the blend past the cache, at every alignment to a cache line.
fn large_and_past_the_cache<T: Sample>(place: Place) -> Outcome {
    let mut random = Random(15);
    for offset in [0, 1, 3] {
        let mut blender = place.blender(1)?;
        let weights = set_random_weights(place, &mut blender, &mut random)?;
        let len = 40_000_000 / std::mem::size_of::<T>() / 2;
        let mut tensor = Tensor::<T>::random(&mut random, 1000 + offset, 1, 0, 0);
        let longer = |list: &[T]| list.iter().copied().cycle().take(len + offset).collect();
        tensor.inputs().for_each(|list| list.memory = longer(list));
        tensor.blended.memory = longer(&tensor.blended);
        tensor.inputs().for_each(|list| list.offset = offset);
        tensor.blended.offset = offset;
        let mut tensors = [tensor];
        place.run(&mut blender, &mut tensors, Blender::blend)?;
        tensors[0].check_blend(&weights, None, &format!("offset {offset}"));
    }
    Ok(())
}

/// A trainer that never holds all K gradients: DOT + BLEND + ACCUMULATE on one after the other. Bit for bit in f32, where
/// the sum is not rounded on the way.
fn modality_by_modality(place: Place) -> Outcome {
    let mut random = Random(16);
    for k in [3, 12] {
        let mut all = [Tensor::<f32>::random(&mut random, 5000, k, 0, 0)];
        let mut single = all.clone();
        let mut blender = place.blender(k)?;
        set_random_weights(place, &mut blender, &mut random)?;
        place.run(&mut blender, &mut all, Blender::step)?;
        let want = blender.report(STREAM())?;
        blender.reset(STREAM())?;
        single[0].blended = vec![0.0; 5000].into();
        for m in 0..k {
            single[0].modalities.fill(None);
            single[0].modalities[m] = all[0].modalities[m].clone();
            place.run(&mut blender, &mut single, |blender, plan, stream| {
                blender.pass(plan, Pass::DOT | Pass::BLEND | Pass::ACCUMULATE, stream)
            })?;
        }
        blender.observe(STREAM())?;
        assert_eq!(bits(&single[0].blended), bits(&all[0].blended));
        assert_eq!(blender.report(STREAM())?, want);
    }
    Ok(())
}

/// Offline users have no train and validation gradients.
fn without_train_and_validation_gradients(place: Place) -> Outcome {
    let mut blender = place.blender(2)?;
    blender.set_weights(&[2.0, -0.5], STREAM())?;
    let mut tensor = Tensor::<f32>::random(&mut Random(17), 3, 2, 0, 0);
    tensor.dots = false;
    tensor.modalities = [[1.0, 2.0, 3.0], [4.0; 3]].map(|v| Some(v.to_vec().into())).into();
    let mut tensors = [tensor];
    place.run(&mut blender, &mut tensors, Blender::step)?;
    assert_eq!(tensors[0].blended[..], [0.0, 2.0, 4.0]);
    let report = blender.report(STREAM())?;
    assert_eq!((report.observed, report.mean), (1, vec![0.0, 0.0]));
    Ok(())
}

/// What is absent adds nothing at all, whereas a zero would make +0 of -0.
fn negative_zero_stays(place: Place) -> Outcome {
    for present in 1..=9 {
        let mut blender = place.blender(present)?;
        let mut tensor = Tensor::<f32>::random(&mut Random(19), 5, present, 0, 0);
        tensor.modalities.fill(Some(vec![-0.0; 5].into()));
        tensor.blended.fill(-0.0);
        let mut tensors = [tensor];
        place.run(&mut blender, &mut tensors, accumulate)?;
        assert_eq!(bits(&tensors[0].blended), [0x8000_0000; 5], "{present} present");
    }
    Ok(())
}

fn not_finite_is_passed_on_and_rounding_is_to_even(place: Place) -> Outcome {
    let mut blender = place.blender(1)?;
    let mut blend = |v: &[f16], weight: f64| {
        let mut tensor = Tensor::<f16>::random(&mut Random(18), v.len(), 1, 0, 0);
        tensor.dots = false;
        tensor.modalities = vec![Some(v.to_vec().into())];
        let mut tensors = [tensor];
        blender.set_weights(&[weight], STREAM())?;
        place.run(&mut blender, &mut tensors, Blender::blend)?;
        gradblend::Result::Ok(tensors[0].blended.to_vec())
    };
    let smallest = f16::from_bits(1);
    let v = [f16::INFINITY, f16::NAN, f16::MAX, f16::from_f32(2048.0), smallest];
    let want = [f32::INFINITY, f32::NAN, f32::INFINITY, 4096.0, 1.192_092_9e-7];
    for (got, want) in blend(&v, 2.0)?.iter().zip(want) {
        assert!(got.to_f32() == want || (got.is_nan() && want.is_nan()), "{got} against {want}");
    }
    // 0.75 and 1.25 of the smallest f16 round to 1 of it, 0.5 to 0, 1.5 to 2.
    for (weight, want) in [(0.75, 1), (1.25, 1), (0.5, 0), (1.5, 2)] {
        assert_eq!(blend(&[smallest], weight)?[0].to_bits(), want, "weight {weight}");
    }
    Ok(())
}
