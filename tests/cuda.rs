//! What a CUDA device adds: the bits of the CPU from the same sums, streams, contexts, threads, and slices of host memory.
#![cfg(feature = "cuda")]

use gradblend::{Average, Cadence, Config, Error, Flags, Negative, Overfitting, Pass, Policy};
use gradblend_testkit::cuda::{OwnStream, current_context, on_cuda, skip, with_context};
use gradblend_testkit::{Face, Input, Outcome, Random, Result, Sample, Sums, Tensor, TestBlender, bits};

/// K random products: ordinary, all equal, zero, far from 1, or not finite.
fn products(random: &mut Random, k: usize) -> Vec<f64> {
    let mut numbers = random.numbers(k);
    match random.below(12) {
        0 => numbers.fill(0.0),
        1 => numbers.fill(1.0),
        2 => numbers.iter_mut().for_each(|x| *x *= 1e-160),
        3 => numbers.iter_mut().for_each(|x| *x *= 1e150),
        4 => numbers.iter_mut().for_each(|x| *x = x.abs()),
        5 => numbers[random.below(k)] = random.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e200, -0.0]),
        _ => {}
    }
    numbers
}

/// After a dot, both backends run the same arithmetic on the state. States are saved on one and loaded on the other.
#[test]
fn observe_and_reweight_have_the_bits_of_the_cpu() -> Outcome {
    on_cuda(|face| {
        let mut random = Random(71);
        let (mut held, mut skipped, mut clamped, mut floored, mut many) = (0, 0, 0, 0, 0);
        for case in 0..400 {
            let k = 1 + random.below(if case % 2 == 0 { 5 } else { 32 });
            let mut policy = Policy {
                overfitting: random.pick(&[Overfitting::Uncorrelated, Overfitting::Correlated]),
                negative: random.pick(&[Negative::Clamp, Negative::Signed]),
                damping: random.pick(&[0.0, 1e-12, 1.0]),
                ..Policy::default()
            };
            if policy.negative == Negative::Clamp && random.below(2) == 0 {
                let least = random.pick(&[0.3, 0.9, 0.999_999]) / k as f64;
                policy.min_weight[..k].fill_with(|| random.pick(&[0.0, least]));
            }
            let average = random.pick(&[Average::Mean, Average::Ema { decay: 0.9 }, Average::Ema { decay: 0.0 }]);
            let cadence = random.pick(&[Cadence::OnRequest, Cadence::EveryObservation]);
            let config = Config { average, policy, cadence, threads: 1, ..Config::new(k as u32) };
            let faces = [Face::CPU, face];
            let mut blenders = [Face::CPU.blender_with(config)?, face.blender_with(config)?];
            let scales = faces.map(|face| face.array(vec![1.0_f32]));
            // Fewer observations than K, or more; S of rank 1, or of any rank.
            let (rounds, direction) = (1 + random.below(2 * k + 6), random.numbers(k));
            let singular = random.below(4) == 0;
            for round in 0..rounds {
                let c = products(&mut random, k);
                let d = if singular { direction.clone() } else { products(&mut random, k) };
                let scale = random.pick(&[1.0, 2.0, 0.3, 1024.0, 0.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE]);
                let (by_address, load) = (random.below(6) == 0, random.below(8) == 0);
                let reweight = random.below(3) == 0;
                let saved = [blenders[0].save()?, blenders[1].save()?];
                for (i, blender) in blenders.iter_mut().enumerate() {
                    if load {
                        blender.load(&saved[1 - i])?;
                    }
                    scales[i].set(scale);
                    let value = if scale.is_normal() { scale } else { 1.0 };
                    match by_address {
                        // SAFETY: the memory outlives the blender's observations, and is written to between calls.
                        true => unsafe { blender.set_grad_scale(scales[i].address()) }?,
                        false => blender.set_grad_scale_value(value).ok_or("not the Rust API")??,
                    }
                    blender.observe_sums(&c, &d)?;
                    if reweight {
                        blender.reweight()?;
                    }
                }
                let states = [blenders[0].save()?, blenders[1].save()?];
                let case = format!("case {case}, round {round}: {config:?}, scale {scale}");
                assert_eq!(blenders[0].report()?.weights, blenders[1].report()?.weights, "{case}");
                assert_eq!(states[0], states[1], "{case}");
            }
            let report = blenders[1].report()?;
            held += u32::from(report.flags.contains(Flags::HELD));
            clamped += u32::from(report.flags.contains(Flags::CLAMPED));
            floored += u32::from(report.flags.contains(Flags::FLOORED));
            skipped += report.skipped;
            // Enough observations for a matrix of full rank.
            let full = policy.overfitting == Overfitting::Correlated && !singular && report.observed >= k as u64;
            many += u32::from(full && k > 8);
        }
        let tried = (held, clamped, floored, skipped, many);
        assert!(held > 20 && clamped > 20 && floored > 20 && skipped > 100 && many > 10, "{tried:?}");
        Ok(())
    })
}

/// A sum of finite squares can be infinite once it is divided by the normaliser.
#[test]
fn an_infinite_second_moment_has_the_bits_of_the_cpu() -> Outcome {
    on_cuda(|face| {
        for overfitting in [Overfitting::Uncorrelated, Overfitting::Correlated] {
            let policy = Policy { overfitting, ..Policy::default() };
            let config = Config { average: Average::Ema { decay: 0.9 }, policy, ..Config::new(2) };
            let mut blenders = [Face::CPU.blender_with(config)?, face.blender_with(config)?];
            for blender in &mut blenders {
                for _ in 0..7 {
                    blender.observe_sums(&[1.0, 3.0], &[1.340_780_792_994_259_6e154, 1.0])?;
                }
                blender.reweight()?;
                let report = blender.report()?;
                assert_eq!((report.observed, report.second_moment[0]), (7, f64::INFINITY));
                assert_eq!((report.weights, report.flags & Flags::HELD), (vec![0.5; 2], Flags::HELD));
            }
            assert_eq!(blenders[0].save()?, blenders[1].save()?);
        }
        Ok(())
    })
}

/// A dot without an observation does not read the gradient scale, so its memory may be freed.
#[test]
fn only_observations_read_the_scale() -> Outcome {
    on_cuda(|face| {
        let mut blender = face.blender(3)?;
        let scale = face.array(vec![2.0_f32]);
        // SAFETY: no observation reads it.
        unsafe { blender.set_grad_scale(scale.address()) }?;
        drop(scale);
        let mut tensors = tensors(&mut Random(77));
        face.run(&mut blender, &mut tensors, TestBlender::dot)?;
        Sums::of(3, &tensors).check(&blender.pending()?, "after the scale is freed");
        Ok(())
    })
}

fn tensors(random: &mut Random) -> Vec<Tensor<f32>> {
    (0..9).map(|i| Tensor::random(random, 1500 * i, 3, i % 4, 4)).collect()
}

/// Blends and a saved state.
type Results = (Vec<Vec<u32>>, Vec<u8>);

/// A few steps, on a non-blocking stream.
fn steps(face: Face, seed: u64) -> Result<Results> {
    let (mut random, own) = (Random(seed), OwnStream::default());
    let mut blender = face.blender(3)?;
    blender.stream = own.stream();
    let mut blends = Vec::new();
    for _ in 0..3 {
        let mut tensors = tensors(&mut random);
        face.run(&mut blender, &mut tensors, |blender, plan| {
            blender.step(plan)?;
            blender.reweight()?;
            blender.report().map(drop)
        })?;
        blends.extend(tensors.iter().map(|tensor| bits(&tensor.blended)));
    }
    let saved = blender.save()?;
    drop(blender);
    // The stream was borrowed: it outlives the blender.
    own.synchronize();
    Ok((blends, saved))
}

#[test]
fn any_stream_gives_the_same_bits() -> Outcome {
    on_cuda(|face| {
        let mut random = Random(72);
        let mut blender = face.blender(3)?;
        let mut blends = Vec::new();
        for _ in 0..3 {
            let mut tensors = tensors(&mut random);
            face.run(&mut blender, &mut tensors, TestBlender::step)?;
            blender.reweight()?;
            blends.extend(tensors.iter().map(|tensor| bits(&tensor.blended)));
        }
        assert_eq!(steps(face, 72)?, (blends, blender.save()?));
        Ok(())
    })
}

#[test]
fn threads_do_not_disturb_each_other() -> Outcome {
    on_cuda(|face| {
        let alone: Vec<_> = (80..84).map(|seed| steps(face, seed)).collect::<Result<_>>()?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (80..84).map(|seed| scope.spawn(move || steps(face, seed))).collect();
            for (thread, alone) in threads.into_iter().zip(alone) {
                assert_eq!(thread.join().map_err(|_| "a thread panicked"), Ok(Ok(alone)));
            }
        });
        Ok(())
    })
}

/// Dropping a plan or a blender waits for work that is pending on any stream, in either order.
#[test]
fn dropping_waits() -> Outcome {
    on_cuda(|face| {
        let (mut random, own) = (Random(73), OwnStream::default());
        let mut want = tensors(&mut random);
        for plan_first in [true, false] {
            let mut got = want.clone();
            face.run(&mut face.blender(3)?, &mut want, TestBlender::step)?;
            let mut uploaded = face.upload(&mut got);
            let mut blender = face.blender(3)?;
            blender.stream = own.stream();
            let plan = blender.plan(uploaded.inputs())?;
            blender.step(&plan)?;
            if plan_first {
                drop(plan);
                drop(blender);
            } else {
                drop(blender);
                drop(plan);
            }
            // The default stream does not wait for this one.
            uploaded.fetch();
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(bits(&got.blended), bits(&want.blended), "plan first: {plan_first}");
            }
        }
        Ok(())
    })
}

/// Each call restores the context that was current on the calling thread, or none.
#[test]
fn calls_restore_the_context() -> Outcome {
    fn calls(face: Face) -> Outcome {
        let before = current_context();
        let check = |call: &str| assert_eq!(current_context(), before, "after {call}");
        let mut all = tensors(&mut Random(74));
        let mut others = all.clone();
        let (mut all, mut others) = (face.upload(&mut all), face.upload(&mut others));
        let mut blender = face.blender(3)?;
        check("new");
        let mut plan = blender.plan(all.inputs())?;
        check("plan");
        blender.step(&plan)?;
        check("step");
        plan.update(others.inputs(), blender.stream)?;
        check("update");
        blender.pass(&plan, Pass::DOT)?;
        check("pass");
        assert!(blender.pass(&plan, Pass::empty()).is_err());
        check("a rejected pass");
        blender.observe()?;
        check("observe");
        blender.reweight()?;
        check("reweight");
        blender.reset()?;
        check("reset");
        blender.set_weights(&[1.0; 3])?;
        check("set_weights");
        let scale = face.array(vec![1.0]);
        // SAFETY: no observation reads it.
        unsafe { blender.set_grad_scale(scale.address()) }?;
        check("set_grad_scale");
        blender.report()?;
        check("report");
        blender.second_moments()?;
        check("second_moments");
        let saved = blender.save()?;
        check("save");
        blender.load(&saved)?;
        check("load");
        drop(plan.release());
        check("drop of the plan");
        drop(blender);
        check("drop of the blender");
        Ok(())
    }
    on_cuda(|face| {
        assert!(current_context().is_null(), "a new thread has no context");
        calls(face)?;
        with_context(|| calls(face))
    })
}

/// A blender may move to another thread.
#[test]
fn blenders_move_between_threads() -> Outcome {
    on_cuda(|face| {
        let mut blender = face.blender(2)?;
        blender.set_pending(&[1.0, 2.0], &[3.0, 4.0])?;
        let moved = std::thread::spawn(move || blender.observe().and_then(|()| blender.report()));
        let report = moved.join().map_err(|_| "the thread panicked")??;
        assert_eq!((report.observed, report.mean), (1, vec![1.0, 2.0]));
        Ok(())
    })
}

/// Where the device reads the host's memory, slices need no `unsafe`, and the blend is complete when the call returns.
#[test]
fn slices() -> Outcome {
    fn run<T: Sample>(face: Face) -> Outcome {
        let mut random = Random(75);
        let mut slices: Vec<Tensor<T>> = (0..4).map(|i| Tensor::random(&mut random, 3000 * i, 3, i, 4)).collect();
        let mut copies = slices.clone();
        let (mut own, mut other) = (face.blender(3)?, face.blender(3)?);
        let plan = match own.plan(slices.iter_mut().map(|tensor| Input::Slices(tensor.grads())).collect()) {
            Err(failure) if matches!(failure.error, Some(Error::UnknownMemory { .. })) => {
                skip("the device does not read the host's memory");
                return Ok(());
            }
            other => other?,
        };
        own.step(&plan)?;
        drop(plan);
        face.run(&mut other, &mut copies, TestBlender::step)?;
        for (slice, copy) in slices.iter().zip(&copies) {
            assert_eq!(bits(&slice.blended), bits(&copy.blended));
        }
        assert_eq!(own.save()?, other.save()?);
        Ok(())
    }
    on_cuda(|face| {
        run::<f32>(face)?;
        run::<gradblend::bf16>(face)
    })
}
