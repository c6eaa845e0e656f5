//! `blend`, with and without ACCUMULATE, against the oracle.

use gradblend::{Pass, f16};
use gradblend_testkit::{
    Buffer, Face, LENGTHS, Outcome, Output, Random, Result, Sample, Tensor, TestBlender, bits, bits64,
};

gradblend_testkit::tests! {
    each_dtype:
        lengths_and_alignments,
        accumulates,
        counts_of_present_modalities,
        runs_of_small_tensors,
        absent_is_zero,
        in_place,
        in_place_over_any_of_many,
        weight_zero_is_absent,
        weight_zero_in_place,
        large_and_non_temporal;
    once:
        modality_by_modality,
        without_train_and_validation_gradients,
        negative_zero_stays,
        not_finite_is_passed_on_and_rounding_is_to_even;
}

/// A blender with random weights in force, and these as f32.
fn weighted(face: Face, k: usize, random: &mut Random) -> Result<(TestBlender, Vec<f32>)> {
    let mut blender = face.blender(k)?;
    blender.set_weights(&random.numbers(k))?;
    let weights = blender.weights()?;
    Ok((blender, weights))
}

fn lengths_and_alignments<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(11);
    for len in LENGTHS {
        for (k, offset) in [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (9, 1), (32, 0)] {
            if len > 5000 && k > 5 {
                continue;
            }
            let (mut blender, weights) = weighted(face, k, &mut random)?;
            let mut tensors = [Tensor::<T>::random(&mut random, len, k, offset, 3)];
            let before = tensors[0].clone();
            face.run(&mut blender, &mut tensors, TestBlender::blend)?;
            let case = format!("len {len}, K = {k}, offset {offset}");
            tensors[0].check_blend(&before, &weights, false, &case);
            assert_eq!(tensors[0].blended.memory[..offset], before.blended.memory[..offset], "{case}: before it");
        }
    }
    Ok(())
}

fn accumulates<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(12);
    for len in [1, 1025, 70_000] {
        let (mut blender, weights) = weighted(face, 5, &mut random)?;
        let mut tensors = [Tensor::<T>::random(&mut random, len, 5, 1, 3)];
        let before = tensors[0].clone();
        face.run(&mut blender, &mut tensors, TestBlender::accumulate)?;
        tensors[0].check_blend(&before, &weights, true, &format!("len {len}"));
    }
    Ok(())
}

/// Present modalities at random places among absent ones; each buffer at its own alignment, which changes no bit.
fn counts_of_present_modalities<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(111);
    for present in (0..=9).chain([16, 17, 31, 32]) {
        let k = (present + present % 3).clamp(1, 32);
        let (mut blender, weights) = weighted(face, k, &mut random)?;
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
                face.run(
                    &mut blender,
                    tensors,
                    if accumulates { TestBlender::accumulate } else { TestBlender::blend },
                )?;
            }
            for ((aligned, scattered), before) in aligned.iter().zip(&scattered).zip(&before) {
                let case = format!("{present} of {k} present, accumulates: {accumulates}");
                aligned.check_blend(before, &weights, accumulates, &case);
                assert_eq!(bits(&aligned.blended), bits(&scattered.blended), "{case}");
            }
        }
    }
    Ok(())
}

/// Tensors around the length from which more threads share a chunk, some of them not blended.
fn runs_of_small_tensors<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(112);
    for count in [1, 7, 8, 9, 17, 300] {
        let (mut blender, weights) = weighted(face, 2, &mut random)?;
        let mut tensors: Vec<Tensor<T>> = (0..count)
            .map(|i| {
                let len = if i % 31 == 30 { 8193 } else { [8192, 5, 1000, 1, 0][random.below(5)] };
                let mut tensor = Tensor::random(&mut random, len, 2, i % 4, 3);
                tensor.has_products = i % 5 != 0;
                tensor.output = if i % 7 == 6 { Output::None } else { Output::Blended };
                tensor
            })
            .collect();
        let before = tensors.clone();
        face.run(&mut blender, &mut tensors, TestBlender::step)?;
        for (i, (tensor, before)) in tensors.iter().zip(&before).enumerate() {
            if tensor.output == Output::None {
                assert_eq!(bits(&tensor.blended), bits(&before.blended), "{i} of {count} is not blended");
            } else {
                tensor.check_blend(before, &weights, false, &format!("{i} of {count}"));
            }
        }
    }
    Ok(())
}

fn absent_is_zero<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(13);
    let mut absent = Tensor::<T>::random(&mut random, 3000, 6, 0, 2);
    let mut zero = absent.clone();
    for v in &mut zero.modalities {
        v.get_or_insert_with(|| vec![T::round(0.0); 3000].into());
    }
    let (mut blender, _) = weighted(face, 6, &mut random)?;
    for tensor in [&mut absent, &mut zero] {
        face.run(&mut blender, std::slice::from_mut(tensor), TestBlender::blend)?;
    }
    assert_eq!(bits(&absent.blended), bits(&zero.blended));
    let mut none = [Tensor::<T>::random(&mut random, 100, 6, 0, 1)];
    face.run(&mut blender, &mut none, TestBlender::blend)?;
    assert_eq!(none[0].blended[..], [T::round(0.0); 100], "zeros where no modality is present");
    Ok(())
}

fn in_place<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(14);
    for k in [1, 3, 6] {
        for target in [0, k - 1] {
            in_place_of::<T>(face, &mut random, 70_000, k, target)?;
        }
    }
    Ok(())
}

/// More modalities than one tile reads: the blend must not overwrite a gradient that a later tile reads.
fn in_place_over_any_of_many<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(113);
    for target in 0..12 {
        in_place_of::<T>(face, &mut random, 9001, 12, target)?;
    }
    in_place_of::<T>(face, &mut random, 1001, 32, 31)
}

fn in_place_of<T: Sample>(face: Face, random: &mut Random, len: usize, k: usize, target: usize) -> Outcome {
    let mut apart = [Tensor::<T>::random(random, len, k, 0, 0)];
    let mut same = apart.clone();
    same[0].output = Output::InPlace(target);
    let (mut blender, _) = weighted(face, k, random)?;
    face.run(&mut blender, &mut apart, TestBlender::step)?;
    let want = bits64(&blender.report()?.mean);
    blender.reset()?;
    face.run(&mut blender, &mut same, TestBlender::step)?;
    assert_eq!(bits(same[0].written()), bits(&apart[0].blended), "K = {k}, over modality {target}");
    assert_eq!(bits64(&blender.report()?.mean), want);
    Ok(())
}

const BLENDS: [Pass; 4] = [
    Pass::BLEND,
    Pass::BLEND.union(Pass::ACCUMULATE),
    Pass::DOT.union(Pass::BLEND),
    Pass::DOT.union(Pass::BLEND).union(Pass::ACCUMULATE),
];

/// Random weights, of which those of the modalities `zeros` are 0 as f32: of both signs, or too small for an f32.
fn weights_with(zeros: &[usize], k: usize, random: &mut Random) -> Vec<f64> {
    let mut weights = random.numbers(k);
    zeros.iter().zip([0.0, -0.0, 1e-50].into_iter().cycle()).for_each(|(n, zero)| weights[*n] = zero);
    weights
}

/// Puts infinities and NaN into the gradients of the modalities `which`; returns the tensor that lacks these.
fn spoil<T: Sample>(tensor: &mut Tensor<T>, which: &[usize]) -> Tensor<T> {
    let mut without = tensor.clone();
    for n in which {
        without.modalities[*n] = None;
        let bad = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1.0].map(T::round).into_iter().cycle();
        tensor.modalities[*n].iter_mut().flat_map(|v| v.iter_mut()).zip(bad).for_each(|(v, bad)| *v = bad);
    }
    without
}

/// What is not finite in a modality of weight 0 enters the products, and the blend has the bits that it has without it.
fn weight_zero_is_absent<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(114);
    let cases: [(usize, &[usize]); 14] = [
        (1, &[0]),
        (2, &[1]),
        (3, &[0, 2]),
        (4, &[2]),
        (4, &[0, 1, 2, 3]),
        (5, &[4]),
        (6, &[0, 2, 4]),
        (8, &[7]),
        (9, &[0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (12, &[2, 7, 8, 11]),
        (12, &[0, 1, 2, 3, 4, 5, 6, 7]),
        (12, &[8, 9, 10, 11]),
        (12, &[9]),
        (32, &[0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 15, 16, 17, 18, 20, 22, 30, 31]),
    ];
    for (i, (k, zeros)) in cases.into_iter().enumerate() {
        let mut blender = face.blender(k)?;
        blender.set_weights(&weights_with(zeros, k, &mut random))?;
        // Aligned to an element and up to 16 bytes, then each buffer at its own alignment.
        let mut tensors = [8200, 37, 37].map(|len| Tensor::<T>::random(&mut random, len, k, [0, 1, 2, 4][i % 4], 0));
        tensors[1] = tensors[1].scattered(&mut random);
        tensors[2].has_products = false;
        let without = tensors.each_mut().map(|tensor| spoil(tensor, zeros));
        for what in BLENDS {
            let case = format!("K = {k}, weight 0 of {zeros:?}, {what:?}");
            let mut run = |mut tensors: [Tensor<T>; 3]| {
                blender.reset()?;
                face.run(&mut blender, &mut tensors, |blender, plan| blender.pass(plan, what))?;
                Result::Ok((tensors.map(|tensor| bits(&tensor.blended.memory)), blender.pending()?))
            };
            let ((got, sums), (want, others)) = (run(tensors.clone())?, run(without.clone())?);
            assert_eq!(got, want, "{case}");
            for (n, (sum, other)) in sums.iter().zip(&others).enumerate() {
                let spoilt = what.contains(Pass::DOT) && zeros.contains(&(n % k));
                assert!(if spoilt { !sum.is_finite() } else { sum == other }, "{case}: sum {n} is {sum}");
            }
        }
    }
    Ok(())
}

/// The blend may replace a gradient of weight 0, after its products.
fn weight_zero_in_place<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(115);
    for (k, zeros) in [(1, vec![0]), (3, vec![0, 1]), (6, vec![1, 5]), (12, vec![0, 7, 8, 11])] {
        let mut blender = face.blender(k)?;
        blender.set_weights(&weights_with(&zeros, k, &mut random))?;
        let mut tensor = Tensor::<T>::random(&mut random, 9001, k, 0, 0);
        let mut without = spoil(&mut tensor, &zeros);
        for target in zeros {
            tensor.output = Output::InPlace(target);
            without.blended = tensor.written().clone();
            for what in BLENDS {
                let case = format!("K = {k}, over modality {target}, {what:?}");
                let (mut got, mut want) = ([tensor.clone()], [without.clone()]);
                face.run(&mut blender, &mut want, |blender, plan| blender.pass(plan, what))?;
                blender.reset()?;
                face.run(&mut blender, &mut got, |blender, plan| blender.pass(plan, what))?;
                assert_eq!(bits(got[0].written()), bits(&want[0].blended), "{case}");
                let sum = blender.pending()?[target];
                assert_eq!(sum.is_finite(), !what.contains(Pass::DOT), "{case}: the product is {sum}");
            }
        }
    }
    Ok(())
}

/// Over the size from which the CPU uses non-temporal stores, at several alignments to a cache line.
fn large_and_non_temporal<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(15);
    for offset in [0, 1, 3] {
        let (mut blender, weights) = weighted(face, 1, &mut random)?;
        let len = 40_000_000 / std::mem::size_of::<T>() / 2;
        let mut tensor = Tensor::<T>::random(&mut random, 1000 + offset, 1, 0, 0);
        let longer = |elements: &[T]| elements.iter().copied().cycle().take(len + offset).collect();
        tensor.buffers().for_each(|buffer| *buffer = Buffer { offset, memory: longer(buffer) });
        let mut tensors = [tensor];
        let before = tensors[0].clone();
        face.run(&mut blender, &mut tensors, TestBlender::blend)?;
        tensors[0].check_blend(&before, &weights, false, &format!("offset {offset}"));
    }
    Ok(())
}

/// A trainer that never holds all K gradients runs DOT + BLEND + ACCUMULATE on one modality after another. In f32, where
/// the sum is not rounded in between, the bits are those of one step.
fn modality_by_modality(face: Face) -> Outcome {
    let mut random = Random(16);
    for k in [3, 12] {
        let mut all = [Tensor::<f32>::random(&mut random, 5000, k, 0, 0)];
        let mut single = all.clone();
        let (mut blender, _) = weighted(face, k, &mut random)?;
        face.run(&mut blender, &mut all, TestBlender::step)?;
        let want = blender.report()?;
        blender.reset()?;
        single[0].blended = vec![0.0; 5000].into();
        for m in 0..k {
            single[0].modalities.fill(None);
            single[0].modalities[m] = all[0].modalities[m].clone();
            face.run(&mut blender, &mut single, |blender, plan| {
                blender.pass(plan, Pass::DOT | Pass::BLEND | Pass::ACCUMULATE)
            })?;
        }
        blender.observe()?;
        assert_eq!(bits(&single[0].blended), bits(&all[0].blended));
        assert_eq!(blender.report()?, want);
    }
    Ok(())
}

/// Offline users have no train and validation gradients.
fn without_train_and_validation_gradients(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    blender.set_weights(&[2.0, -0.5])?;
    let mut tensor = Tensor::<f32>::random(&mut Random(17), 3, 2, 0, 0);
    tensor.has_products = false;
    tensor.modalities = [[1.0, 2.0, 3.0], [4.0; 3]].map(|v| Some(v.to_vec().into())).into();
    let mut tensors = [tensor];
    face.run(&mut blender, &mut tensors, TestBlender::step)?;
    assert_eq!(tensors[0].blended[..], [0.0, 2.0, 4.0]);
    let report = blender.report()?;
    assert_eq!((report.observed, report.mean), (1, vec![0.0, 0.0]));
    Ok(())
}

/// An absent modality adds nothing, whereas a zero would turn -0 into +0.
fn negative_zero_stays(face: Face) -> Outcome {
    for present in 1..=9 {
        let mut blender = face.blender(present)?;
        let mut tensor = Tensor::<f32>::random(&mut Random(19), 5, present, 0, 0);
        tensor.modalities.fill(Some(vec![-0.0; 5].into()));
        tensor.blended.fill(-0.0);
        let mut tensors = [tensor];
        face.run(&mut blender, &mut tensors, TestBlender::accumulate)?;
        assert_eq!(bits(&tensors[0].blended), [0x8000_0000; 5], "{present} present");
    }
    Ok(())
}

fn not_finite_is_passed_on_and_rounding_is_to_even(face: Face) -> Outcome {
    let mut blender = face.blender(1)?;
    let mut blend = |v: &[f16], weight: f64| {
        let mut tensor = Tensor::<f16>::random(&mut Random(18), v.len(), 1, 0, 0);
        tensor.has_products = false;
        tensor.modalities = vec![Some(v.to_vec().into())];
        let mut tensors = [tensor];
        blender.set_weights(&[weight])?;
        face.run(&mut blender, &mut tensors, TestBlender::blend)?;
        Result::Ok(tensors[0].blended.to_vec())
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
