//! `dot` against the oracle, and the mathematics it must keep.

use gradblend::{Config, DType, bf16, f16};
use gradblend_testkit::{
    Face, Input, LENGTHS, Outcome, Output, Random, Result, Sample, Sums, Tensor, TestBlender, bits64,
};

gradblend_testkit::tests! {
    each_dtype:
        lengths_and_alignments,
        counts_of_present_modalities,
        many_tensors,
        runs_of_small_tensors,
        nothing_to_do,
        threads_change_no_bit,
        alignment_changes_no_bit,
        splitting_stays_in_the_bound,
        absent_is_zero,
        calls_add_up;
    once:
        many_partial_sums,
        dtypes_mix,
        close_gradients_do_not_cancel,
        magnitudes,
        gradient_scale_is_divided_out;
}

fn dot<T: Sample>(face: Face, tensors: &mut [Tensor<T>], k: usize, threads: u32) -> Result<Vec<f64>> {
    let mut blender = face.blender_with(Config { threads, ..Config::new(k as u32) })?;
    face.run(&mut blender, tensors, TestBlender::dot)?;
    blender.pending()
}

fn lengths_and_alignments<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(1);
    for len in LENGTHS {
        for (k, offset) in [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (8, 1), (32, 0)] {
            if len > 5000 && k > 5 {
                continue;
            }
            let mut tensors = [Tensor::<T>::random(&mut random, len, k, offset, 0)];
            let got = dot(face, &mut tensors, k, 2)?;
            Sums::of(k, &tensors).check(&got, &format!("len {len}, K = {k}, offset {offset}"));
        }
    }
    Ok(())
}

/// Present modalities at random places among absent ones; each buffer at its own alignment.
fn counts_of_present_modalities<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(101);
    for present in (0..=9).chain([16, 17, 31, 32]) {
        let k = (present + present % 3).clamp(1, 32);
        let mut tensors: Vec<Tensor<T>> = [8200, 70_000, 37]
            .map(|len| {
                let mut tensor = Tensor::random(&mut random, len, k, 0, 0);
                while tensor.present() > present {
                    tensor.modalities[random.below(k)] = None;
                }
                tensor.scattered(&mut random)
            })
            .into();
        let got = dot(face, &mut tensors, k, 2)?;
        Sums::of(k, &tensors).check(&got, &format!("{present} of {k} present"));
    }
    Ok(())
}

fn many_tensors<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(2);
    for count in [0, 1, 2, 161, 5000] {
        // Empty ones first, in the middle and last; absent gradients anywhere.
        let len = |random: &mut Random, i: usize| match i {
            0 => 0,
            _ if i + 1 == count || i == count / 2 => 0,
            _ => random.below(300),
        };
        let mut tensors: Vec<Tensor<T>> = (0..count)
            .map(|i| {
                let (len, offset) = (len(&mut random, i), i % 4);
                Tensor::random(&mut random, len, 3, offset, 3)
            })
            .collect();
        let got = dot(face, &mut tensors, 3, 2)?;
        Sums::of(3, &tensors).check(&got, &format!("{count} tensors"));
    }
    Ok(())
}

/// More partial sums than the backends add in one round.
fn many_partial_sums(face: Face) -> Outcome {
    let mut random = Random(103);
    let mut tensors: Vec<Tensor<bf16>> = (0..1200).map(|i| Tensor::random(&mut random, 1 + i % 3, 32, 0, 20)).collect();
    let got = dot(face, &mut tensors, 32, 1)?;
    Sums::of(32, &tensors).check(&got, "1200 tensors");
    Ok(())
}

/// Runs of tensors around the length from which more threads share a chunk, with larger tensors between the runs.
fn runs_of_small_tensors<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(102);
    for count in [1, 7, 8, 9, 17, 40] {
        let mut tensors: Vec<Tensor<T>> = (0..count)
            .map(|i| {
                let len = if i % 11 == 10 { 8193 } else { [8192, 5, 1000, 1][random.below(4)] };
                let mut tensor = Tensor::random(&mut random, len, 2, 0, 5).scattered(&mut random);
                (tensor.has_products, tensor.output) = (random.below(6) != 0, Output::None);
                tensor
            })
            .collect();
        let got = dot(face, &mut tensors, 2, 2)?;
        Sums::of(2, &tensors).check(&got, &format!("{count} tensors"));
    }
    Ok(())
}

/// Only empty tensors, and tensors without products.
fn nothing_to_do<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(103);
    for count in [0, 1, 9] {
        let mut empty: Vec<Tensor<T>> = (0..count).map(|i| Tensor::random(&mut random, 0, 2, i % 4, 0)).collect();
        assert_eq!(bits64(&dot(face, &mut empty, 2, 2)?), [0; 4], "{count} empty tensors");
        let mut absent: Vec<Tensor<T>> = (0..count).map(|_| Tensor::random(&mut random, 9000, 2, 0, 1)).collect();
        assert_eq!(bits64(&dot(face, &mut absent, 2, 2)?), [0; 4], "{count} tensors without a modality");
        let mut blended: Vec<Tensor<T>> = (0..count).map(|_| Tensor::random(&mut random, 9000, 2, 0, 0)).collect();
        blended.iter_mut().for_each(|tensor| tensor.has_products = false);
        assert_eq!(
            bits64(&dot(face, &mut blended, 2, 2)?),
            [0; 4],
            "{count} tensors without train and validation gradients"
        );
    }
    Ok(())
}

/// On a CUDA device, which has no thread count to choose, repeated runs give the same bits.
fn threads_change_no_bit<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(3);
    let mut tensors: Vec<Tensor<T>> = (0..9).map(|i| Tensor::random(&mut random, 40_000 * i, 3, 0, 4)).collect();
    let one = bits64(&dot(face, &mut tensors, 3, 1)?);
    for threads in [0, 2, 3, 7] {
        for _ in 0..3 {
            assert_eq!(bits64(&dot(face, &mut tensors, 3, threads)?), one, "{threads} threads");
        }
    }
    Ok(())
}

fn alignment_changes_no_bit<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(104);
    let mut aligned: Vec<Tensor<T>> =
        [70_000, 8192, 77, 1].map(|len| Tensor::random(&mut random, len, 10, 0, 3)).into();
    let want = bits64(&dot(face, &mut aligned, 10, 2)?);
    for offset in 1..8 {
        let mut moved = aligned.clone();
        moved.iter_mut().flat_map(Tensor::inputs).for_each(|v| *v = v.at_offset(offset));
        assert_eq!(bits64(&dot(face, &mut moved, 10, 2)?), want, "all at offset {offset}");
        let mut scattered: Vec<Tensor<T>> = aligned.iter().map(|tensor| tensor.scattered(&mut random)).collect();
        assert_eq!(bits64(&dot(face, &mut scattered, 10, 2)?), want, "each buffer at its own offset");
    }
    Ok(())
}

fn splitting_stays_in_the_bound<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(4);
    let whole = Tensor::<T>::random(&mut random, 70_001, 2, 0, 0);
    let want = Sums::of(2, std::slice::from_ref(&whole));
    for parts in [1, 2, 5, 1000] {
        let size = whole.len().div_ceil(parts);
        let mut tensors: Vec<Tensor<T>> = vec![whole.clone(); parts];
        for (i, part) in tensors.iter_mut().enumerate() {
            let cut = |all: &[T]| all.chunks(size).nth(i).map(<[T]>::to_vec).unwrap_or_default().into();
            part.inputs().for_each(|buffer| *buffer = cut(buffer));
            part.blended = cut(&part.blended);
        }
        want.check(&dot(face, &mut tensors, 2, 2)?, &format!("{parts} parts"));
    }
    Ok(())
}

fn absent_is_zero<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(5);
    let mut absent: Vec<Tensor<T>> = (0..20).map(|i| Tensor::random(&mut random, 100 * i, 6, 0, 2)).collect();
    let mut zero = absent.clone();
    for tensor in &mut zero {
        let len = tensor.len();
        for v in &mut tensor.modalities {
            v.get_or_insert_with(|| vec![T::round(0.0); len].into());
        }
    }
    assert_eq!(dot(face, &mut absent, 6, 2)?, dot(face, &mut zero, 6, 2)?);
    Ok(())
}

fn calls_add_up<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(6);
    let mut tensors: Vec<Tensor<T>> = (0..4).map(|_| Tensor::random(&mut random, 3000, 2, 0, 0)).collect();
    let mut blender = face.blender(2)?;
    for tensor in tensors.chunks_mut(1) {
        face.run(&mut blender, tensor, TestBlender::dot)?;
    }
    Sums::of(2, &tensors).check(&blender.pending()?, "one call for each tensor");
    Ok(())
}

fn dtypes_mix(face: Face) -> Outcome {
    let mut random = Random(105);
    let mut f32s: Vec<Tensor<f32>> = (0..20).map(|i| Tensor::random(&mut random, 433 * i, 9, 0, 4)).collect();
    let mut f16s: Vec<Tensor<f16>> = (0..20).map(|i| Tensor::random(&mut random, 997 * i, 9, i % 4, 4)).collect();
    let mut bf16s: Vec<Tensor<bf16>> = (0..20).map(|i| Tensor::random(&mut random, 4001 * i, 9, 1, 2)).collect();
    let mut sums = Sums::new(9);
    f32s.iter().for_each(|tensor| sums.add(tensor));
    f16s.iter().for_each(|tensor| sums.add(tensor));
    bf16s.iter().for_each(|tensor| sums.add(tensor));
    let mut blender = face.blender(9)?;
    let (mut f32s, mut f16s, mut bf16s) = (face.upload(&mut f32s), face.upload(&mut f16s), face.upload(&mut bf16s));
    let mut inputs = [f32s.inputs().into_iter(), f16s.inputs().into_iter(), bf16s.inputs().into_iter()];
    // A tensor of one dtype after one of another.
    let plan = blender.plan((0..60).filter_map(|i| inputs[i % 3].next()).collect())?;
    blender.dot(&plan)?;
    sums.check(&blender.pending()?, "three dtypes");
    Ok(())
}

/// With t close to g, <t,v> - <g,v> would cancel to rounding errors.
fn close_gradients_do_not_cancel(face: Face) -> Outcome {
    let mut random = Random(7);
    let mut tensor = Tensor::<f32>::random(&mut random, 100_000, 2, 0, 0);
    for (t, g) in tensor.train.iter_mut().zip(&*tensor.valid) {
        *t = g * (1.0 + f32::EPSILON * (random.below(3) as f32));
    }
    let mut tensors = [tensor];
    let got = dot(face, &mut tensors, 2, 2)?;
    let want = Sums::of(2, &tensors);
    want.check(&got, "t near g");
    // The bound itself is tight here: far below one rounding of the products <g, v>.
    assert!(want.magnitude[2] * 131.0 / f64::from(1 << 24) < want.magnitude[0] / f64::from(1 << 24));
    Ok(())
}

/// Products far from 1 in either direction: subnormal ones are covered by 2^-149 an element.
fn magnitudes(face: Face) -> Outcome {
    for exponent in [-70, -40, -10, 20, 50] {
        let mut random = Random(8);
        let mut tensor = Tensor::<f32>::random(&mut random, 10_000, 2, 0, 0);
        tensor.scale(2.0_f64.powi(exponent));
        let mut tensors = [tensor];
        let got = dot(face, &mut tensors, 2, 1)?;
        Sums::of(2, &tensors).check(&got, &format!("2^{exponent}"));
    }
    Ok(())
}

/// Scaling all gradients by s and dividing it out again changes nothing, and a running mean over a changing s is right.
fn gradient_scale_is_divided_out(face: Face) -> Outcome {
    let mut random = Random(9);
    let tensor = Tensor::<f32>::random(&mut random, 5000, 2, 0, 0);
    let scale = face.array(vec![1.0]);
    let (mut plain, mut scaled) = (face.blender(2)?, face.blender(2)?);
    // SAFETY: `scale` outlives the blender's last observation and is written to between calls only.
    unsafe { scaled.set_grad_scale(scale.address()) }?;
    for factor in [1.0_f32, 1024.0, 0.125] {
        let mut tensors = [tensor.clone()];
        face.run(&mut plain, &mut tensors, TestBlender::step)?;
        tensors[0].scale(factor.into());
        scale.set(factor);
        face.run(&mut scaled, &mut tensors, TestBlender::step)?;
    }
    let (plain, scaled) = (plain.report()?, scaled.report()?);
    assert_eq!(plain, scaled);
    assert!(plain.second_moment[0] > 0.0);
    Ok(())
}

/// More than 2^31 elements in one tensor. Needs 4.3 GB: `cargo test --release -- --ignored`.
fn more_elements_than_an_i32_counts(face: Face) -> Outcome {
    const LEN: usize = (1 << 31) + 100;
    let mut elements = vec![f16::ZERO; LEN];
    for i in [0, 77, (1 << 31) - 1, 1 << 31, LEN - 1] {
        elements[i] = f16::from_f32(0.5);
    }
    let mut blender = face.blender_with(Config::new(1))?;
    let elements = face.array(elements);
    let at = elements.address() as usize;
    // SAFETY: as many elements, which nothing writes to.
    let input = unsafe { Input::at(LEN as u64, DType::F16, at, at, &[at], 0) };
    let plan = blender.plan(vec![input])?;
    blender.dot(&plan)?;
    assert_eq!(blender.pending()?, [5.0 * 0.25, 0.0]);
    Ok(())
}

mod large {
    use gradblend_testkit::Outcome;

    #[test]
    #[ignore = "needs 4.3 GB of memory"]
    fn cpu() -> Outcome {
        gradblend_testkit::cpu(super::more_elements_than_an_i32_counts)
    }

    #[cfg(feature = "cuda")]
    #[test]
    #[ignore = "needs 4.3 GB of memory, and as much on the device"]
    fn cuda() -> Outcome {
        gradblend_testkit::cuda(super::more_elements_than_an_i32_counts)
    }
}
