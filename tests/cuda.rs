//! What a CUDA device adds: the CPU's bits from the same sums, streams, contexts, threads, and slices in the host's memory.
#![cfg(feature = "cuda")]

use gradblend::{
    Average, Blender, Cadence, Config, Error, GradScale, Negative, Overfitting, Pass, Policy, TensorGrads,
};
use gradblend_testkit::cuda::{Own, current, on_cuda, skip, within};
use gradblend_testkit::{Face, Outcome, Random, STREAM, Sample, Sums, Tensor, bits};

fn any<N: Copy>(random: &mut Random, of: &[N]) -> N {
    of[random.below(of.len())]
}

/// K products of all sorts: ordinary, of one direction (S is singular), zero, far from 1, not finite.
fn products(random: &mut Random, k: usize) -> Vec<f64> {
    let mut numbers = random.numbers(k);
    match random.below(12) {
        0 => numbers.fill(0.0),
        1 => numbers.fill(1.0),
        2 => numbers.iter_mut().for_each(|x| *x *= 1e-160),
        3 => numbers.iter_mut().for_each(|x| *x *= 1e150),
        4 => numbers.iter_mut().for_each(|x| *x = x.abs()),
        5 => numbers[random.below(k)] = any(random, &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e200, -0.0]),
        _ => {}
    }
    numbers
}

/// All that happens to the state after a dot is the same arithmetic on both backends. States go to and fro.
#[test]
fn observe_and_reweight_have_the_bits_of_the_cpu() -> Outcome {
    on_cuda(|face| {
        let mut random = Random(71);
        let (mut held, mut skipped, mut clamped, mut many) = (0, 0, 0, 0);
        for case in 0..400 {
            let k = 1 + random.below(if case % 2 == 0 { 5 } else { 32 });
            let policy = Policy {
                overfitting: any(&mut random, &[Overfitting::Uncorrelated, Overfitting::Correlated]),
                negative: any(&mut random, &[Negative::Clamp, Negative::Signed]),
                damping: any(&mut random, &[0.0, 1e-12, 1.0]),
            };
            let average = any(&mut random, &[Average::Mean, Average::Ema { decay: 0.9 }, Average::Ema { decay: 0.0 }]);
            let cadence = any(&mut random, &[Cadence::OnRequest, Cadence::EveryObservation]);
            let config = Config { average, policy, cadence, threads: 1, ..Config::new(k as u32) };
            let places = [Face::CPU, face];
            let mut blenders = [Face::CPU.blender_with(config)?, face.blender_with(config)?];
            let cells = places.map(|face| face.array(vec![1.0_f32]));
            // Fewer observations than K, or more; of one direction, or of many.
            let (rounds, direction) = (1 + random.below(2 * k + 6), random.numbers(k));
            let singular = random.below(4) == 0;
            for round in 0..rounds {
                let c = products(&mut random, k);
                let d = if singular { direction.clone() } else { products(&mut random, k) };
                let scale = any(&mut random, &[1.0, 2.0, 0.3, 1024.0, 0.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE]);
                let (by_address, load) = (random.below(6) == 0, random.below(8) == 0);
                let reweight = random.below(3) == 0;
                let saved = [blenders[0].save()?, blenders[1].save()?];
                for (i, (blender, face)) in blenders.iter_mut().zip(places).enumerate() {
                    if load {
                        blender.load(&saved[1 - i])?;
                    }
                    cells[i].set(scale);
                    // SAFETY: the cell outlives the blender's observations, and is written to between calls.
                    let behind = unsafe { GradScale::from_raw(cells[i].address()) };
                    let value = if scale.is_normal() { scale } else { 1.0 };
                    blender.set_grad_scale(if by_address { behind } else { GradScale::value(value) })?;
                    blender.set_pending(&c, &d)?;
                    blender.observe()?;
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
            held += u32::from(report.flags.contains(gradblend::Flags::HELD));
            clamped += u32::from(report.flags.contains(gradblend::Flags::CLAMPED));
            skipped += report.skipped;
            // Enough observations for a matrix of full rank.
            let full = policy.overfitting == Overfitting::Correlated && !singular && report.observed >= k as u64;
            many += u32::from(full && k > 8);
        }
        let tried = (held, clamped, skipped, many);
        assert!(held > 20 && clamped > 20 && skipped > 100 && many > 10, "{tried:?} of each sort");
        Ok(())
    })
}

/// A dot that observes nothing reads no scale, so its memory may be gone.
#[test]
fn scale_is_read_by_observations_alone() -> Outcome {
    on_cuda(|face| {
        let mut blender = face.blender(3)?;
        let cell = face.array(vec![2.0_f32]);
        // SAFETY: no observation reads it.
        blender.set_grad_scale(unsafe { GradScale::from_raw(cell.address()) })?;
        drop(cell);
        let mut tensors = tensors(&mut Random(77));
        face.run(&mut blender, &mut tensors, TestBlender::dot)?;
        Sums::of(3, &tensors).check(&blender.pending()?, "after the scale is gone");
        Ok(())
    })
}

fn tensors(random: &mut Random) -> Vec<Tensor<f32>> {
    (0..9).map(|i| Tensor::random(random, 1500 * i, 3, i % 4, 4)).collect()
}

/// Blends and a saved state.
type Results = (Vec<Vec<u32>>, Vec<u8>);

/// A few steps, on a stream of one's own.
fn steps(face: Face, seed: u64) -> Result<Results> {
    let (mut random, own) = (Random(seed), Own::new());
    let mut blender = face.blender(3)?;
    let mut blends = Vec::new();
    for _ in 0..3 {
        let mut tensors = tensors(&mut random);
        let mut lists = face.place(&mut tensors);
        let plan = blender.plan(&lists.grads())?;
        blender.step(&plan, own.stream())?;
        blender.reweight(own.stream())?;
        blender.report(own.stream())?;
        drop(plan);
        lists.fetch();
        blends.extend(tensors.iter().map(|tensor| bits(&tensor.blended)));
    }
    let saved = blender.save(own.stream())?;
    drop(blender);
    // The stream was borrowed: it outlives the blender.
    own.wait();
    Ok((blends, saved))
}

#[test]
fn any_stream_does() -> Outcome {
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
        let alone: Vec<_> = (80..84).map(|seed| steps(face, seed)).collect::<Result<_, _>>()?;
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
        let (mut random, own) = (Random(73), Own::new());
        let mut want = tensors(&mut random);
        for plan_first in [true, false] {
            let mut got = want.clone();
            face.run(&mut face.blender(3)?, &mut want, TestBlender::step)?;
            let mut lists = face.place(&mut got);
            let mut blender = face.blender(3)?;
            let plan = blender.plan(&lists.grads())?;
            blender.step(&plan, own.stream())?;
            if plan_first {
                drop(plan);
                drop(blender);
            } else {
                drop(blender);
                drop(plan);
            }
            // The default stream does not wait for this one.
            lists.fetch();
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(bits(&got.blended), bits(&want.blended), "plan first: {plan_first}");
            }
        }
        Ok(())
    })
}

/// Whatever context is current on the thread that calls, none too, is so after each call.
#[test]
fn contexts_stay_current() -> Outcome {
    fn calls(face: Face) -> Outcome {
        let before = current();
        let done = |call: &str| assert_eq!(current(), before, "after {call}");
        let mut all = tensors(&mut Random(74));
        let mut others = all.clone();
        let (mut all, mut others) = (face.place(&mut all), face.place(&mut others));
        let mut blender = face.blender(3)?;
        done("new");
        let mut plan = blender.plan(&all.grads())?;
        done("plan");
        blender.step(&plan)?;
        done("step");
        plan.update(&others.grads())?;
        done("update");
        blender.pass(&plan, Pass::DOT)?;
        done("pass");
        assert!(blender.pass(&plan, Pass::empty()).is_err());
        done("pass, refused");
        blender.observe()?;
        done("observe");
        blender.reweight()?;
        done("reweight");
        blender.reset()?;
        done("reset");
        blender.set_weights(&[1.0; 3])?;
        done("set_weights");
        let cell = face.array(vec![1.0]);
        // SAFETY: no observation reads it.
        blender.set_grad_scale(unsafe { GradScale::from_raw(cell.address()) })?;
        done("set_grad_scale");
        blender.report()?;
        done("report");
        blender.second_moments()?;
        done("second_moments");
        let saved = blender.save()?;
        done("save");
        blender.load(&saved)?;
        done("load");
        drop(plan.release());
        done("drop of the plan");
        drop(blender);
        done("drop of the blender");
        Ok(())
    }
    on_cuda(|face| {
        assert!(current().is_null(), "a new thread has none");
        calls(face)?;
        within(|| calls(face))
    })
}

/// A blender may change threads.
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

/// Where the device reads the host's memory, slices need no `unsafe`, and the blend is there when the call returns.
#[test]
fn slices() -> Outcome {
    fn run<T: Sample>(face: Face) -> Outcome {
        let mut random = Random(75);
        let mut slices: Vec<Tensor<T>> = (0..4).map(|i| Tensor::random(&mut random, 3000 * i, 3, i, 4)).collect();
        let mut copies = slices.clone();
        let (mut own, mut other) = (face.blender(3)?, face.blender(3)?);
        let grads: Vec<TensorGrads<'_>> = slices.iter_mut().map(Tensor::grads).collect();
        let plan = match own.plan(&grads) {
            Err(Error::UnknownMemory { .. }) => {
                skip("the device does not read the host's memory");
                return Ok(());
            }
            other => other?,
        };
        own.step(&plan)?;
        drop((plan, grads));
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
