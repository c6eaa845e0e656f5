//! `dot` against the oracle, and the mathematics it must keep.

mod common;

use common::{LENGTHS, Outcome, Random, STREAM, Sample, Sums, Tensor, bits64, blender, pending};
use gradblend::{GradScale, TensorGrads};

each_dtype!(
    lengths_and_alignments,
    many_tensors,
    threads_change_no_bit,
    splitting_stays_in_the_bound,
    absent_is_zero,
    calls_add_up,
);

fn dot<T: Sample>(tensors: &mut [Tensor<T>], k: usize, threads: u32) -> gradblend::Result<Vec<f64>> {
    let mut blender = blender(k, threads)?;
    let grads: Vec<TensorGrads<'_>> = tensors.iter_mut().map(Tensor::grads).collect();
    let plan = blender.plan(&grads)?;
    blender.dot(&plan, STREAM())?;
    Ok(pending(&blender))
}

fn lengths_and_alignments<T: Sample>() -> Outcome {
    let mut random = Random(1);
    for len in LENGTHS {
        for (k, offset) in [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0), (8, 1), (32, 0)] {
            if len > 5000 && k > 5 {
                continue;
            }
            let mut tensors = [Tensor::<T>::random(&mut random, len, k, offset, 0)];
            let got = dot(&mut tensors, k, 2)?;
            Sums::of(k, &tensors).check(&got, &format!("len {len}, K = {k}, offset {offset}"));
        }
    }
    Ok(())
}

fn many_tensors<T: Sample>() -> Outcome {
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
        let got = dot(&mut tensors, 3, 2)?;
        Sums::of(3, &tensors).check(&got, &format!("{count} tensors"));
    }
    Ok(())
}

fn threads_change_no_bit<T: Sample>() -> Outcome {
    let mut random = Random(3);
    let mut tensors: Vec<Tensor<T>> = (0..9).map(|i| Tensor::random(&mut random, 40_000 * i, 3, 0, 4)).collect();
    let one = bits64(&dot(&mut tensors, 3, 1)?);
    for threads in [0, 2, 3, 7] {
        for _ in 0..3 {
            assert_eq!(bits64(&dot(&mut tensors, 3, threads)?), one, "{threads} threads");
        }
    }
    Ok(())
}

fn splitting_stays_in_the_bound<T: Sample>() -> Outcome {
    let mut random = Random(4);
    let whole = Tensor::<T>::random(&mut random, 70_001, 2, 0, 0);
    let want = Sums::of(2, std::slice::from_ref(&whole));
    for parts in [1, 2, 5, 1000] {
        let size = whole.len().div_ceil(parts);
        let part = |list: &Vec<T>, i: usize| list.chunks(size).nth(i).map(<[T]>::to_vec).unwrap_or_default();
        let mut tensors: Vec<Tensor<T>> = (0..parts)
            .map(|i| Tensor {
                offset: 0,
                train: part(&whole.train, i),
                valid: part(&whole.valid, i),
                modalities: whole.modalities.iter().map(|v| v.as_ref().map(|v| part(v, i))).collect(),
                blended: part(&whole.blended, i),
            })
            .collect();
        want.check(&dot(&mut tensors, 2, 2)?, &format!("{parts} parts"));
    }
    Ok(())
}

fn absent_is_zero<T: Sample>() -> Outcome {
    let mut random = Random(5);
    let mut absent: Vec<Tensor<T>> = (0..20).map(|i| Tensor::random(&mut random, 100 * i, 6, 0, 2)).collect();
    let mut zero = absent.clone();
    for tensor in &mut zero {
        let len = tensor.len();
        for v in &mut tensor.modalities {
            v.get_or_insert_with(|| vec![T::round(0.0); len]);
        }
    }
    assert_eq!(dot(&mut absent, 6, 2)?, dot(&mut zero, 6, 2)?);
    Ok(())
}

fn calls_add_up<T: Sample>() -> Outcome {
    let mut random = Random(6);
    let mut tensors: Vec<Tensor<T>> = (0..4).map(|_| Tensor::random(&mut random, 3000, 2, 0, 0)).collect();
    let mut blender = blender(2, 2)?;
    for tensor in &mut tensors {
        let plan = blender.plan(&[tensor.grads()])?;
        blender.dot(&plan, STREAM())?;
    }
    Sums::of(2, &tensors).check(&pending(&blender), "a call a tensor");
    Ok(())
}

/// t close to g is where <t,v> - <g,v> would lose everything.
#[test]
fn close_gradients_do_not_cancel() -> Outcome {
    let mut random = Random(7);
    let mut tensor = Tensor::<f32>::random(&mut random, 100_000, 2, 0, 0);
    for (t, g) in tensor.train.iter_mut().zip(&tensor.valid) {
        *t = g * (1.0 + f32::EPSILON * (random.below(3) as f32));
    }
    let mut tensors = [tensor];
    let got = dot(&mut tensors, 2, 2)?;
    let want = Sums::of(2, &tensors);
    want.check(&got, "t near g");
    // The bound itself is tight here: far below one rounding of the products <g, v>.
    assert!(want.size[2] * 131.0 / f64::from(1 << 24) < want.size[0] / f64::from(1 << 24));
    Ok(())
}

/// Products far from 1 in either direction: subnormal ones are covered by 2^-149 an element.
#[test]
fn magnitudes() -> Outcome {
    for exponent in [-70, -40, -10, 20, 50] {
        let mut random = Random(8);
        let mut tensor = Tensor::<f32>::random(&mut random, 10_000, 2, 0, 0);
        let scale = 2.0_f32.powi(exponent);
        let lists = [&mut tensor.train, &mut tensor.valid].into_iter().chain(tensor.modalities.iter_mut().flatten());
        for x in lists.flatten() {
            *x *= scale;
        }
        let mut tensors = [tensor];
        let got = dot(&mut tensors, 2, 1)?;
        Sums::of(2, &tensors).check(&got, &format!("2^{exponent}"));
    }
    Ok(())
}

/// Scaling all gradients by s and dividing it out again changes nothing, and a running mean over a changing s is right.
#[test]
fn gradient_scale_is_divided_out() -> Outcome {
    let mut random = Random(9);
    let tensor = Tensor::<f32>::random(&mut random, 5000, 2, 0, 0);
    let (mut plain, mut scaled) = (blender(2, 1)?, blender(2, 1)?);
    let mut address = Box::new(1.0_f32);
    // SAFETY: `address` outlives the blender's last observation and is written to between calls only.
    scaled.set_grad_scale(unsafe { GradScale::from_raw(&raw const *address) })?;
    for scale in [1.0_f32, 1024.0, 0.125] {
        let mut tensor = tensor.clone();
        let plan = plain.plan(&[tensor.grads()])?;
        plain.step(&plan, STREAM())?;
        drop(plan);
        let lists = [&mut tensor.train, &mut tensor.valid].into_iter().chain(tensor.modalities.iter_mut().flatten());
        for x in lists.flatten() {
            *x *= scale;
        }
        *address = scale;
        let plan = scaled.plan(&[tensor.grads()])?;
        scaled.step(&plan, STREAM())?;
    }
    let (plain, scaled) = (plain.report(STREAM())?, scaled.report(STREAM())?);
    assert_eq!(plain, scaled);
    assert!(plain.second_moment[0] > 0.0);
    Ok(())
}

/// More than 2^31 elements in one tensor. Needs 4.3 GB: `cargo test --release -- --ignored`.
#[test]
#[ignore = "needs 4.3 GB of memory"]
fn more_elements_than_an_i32_counts() -> Outcome {
    const LEN: usize = (1 << 31) + 100;
    let mut list = vec![gradblend::f16::ZERO; LEN];
    for i in [0, 77, (1 << 31) - 1, 1 << 31, LEN - 1] {
        list[i] = gradblend::f16::from_f32(0.5);
    }
    let mut blender = blender(1, 0)?;
    let plan = blender.plan(&[TensorGrads::new(&list, &list, &[Some(&list)])])?;
    blender.dot(&plan, STREAM())?;
    assert_eq!(pending(&blender), [5.0 * 0.25, 0.0]);
    Ok(())
}
