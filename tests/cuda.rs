//! What a CUDA device adds: the CPU's bits from the same sums, streams, contexts, threads, and slices in the host's memory.
#![cfg(feature = "cuda")]

mod common;

use common::cuda::{Own, current, on_cuda, skip, within};
use common::{Outcome, Place, Random, STREAM, Sample, Sums, Tensor, bits};
use gradblend::{
    Average, Blender, Cadence, Config, Error, GradScale, Negative, Overfitting, Pass, Policy, TensorGrads,
};

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
    on_cuda(|place| {
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
            let places = [Place::Cpu, place];
            let mut blenders = [Place::Cpu.blender_with(config)?, place.blender_with(config)?];
            let cells = places.map(|place| place.buffer(vec![1.0_f32]));
            // Fewer observations than K, or more; of one direction, or of many.
            let (turns, direction) = (1 + random.below(2 * k + 6), random.numbers(k));
            let singular = random.below(4) == 0;
            for turn in 0..turns {
                let c = products(&mut random, k);
                let d = if singular { direction.clone() } else { products(&mut random, k) };
                let scale = any(&mut random, &[1.0, 2.0, 0.3, 1024.0, 0.0, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE]);
                let (by_address, load) = (random.below(6) == 0, random.below(8) == 0);
                let reweight = random.below(3) == 0;
                let saved = [blenders[0].save(STREAM())?, blenders[1].save(STREAM())?];
                for (i, (blender, place)) in blenders.iter_mut().zip(places).enumerate() {
                    if load {
                        blender.load(&saved[1 - i], STREAM())?;
                    }
                    cells[i].set(scale);
                    // SAFETY: the cell outlives the blender's observations, and is written to between calls.
                    let behind = unsafe { GradScale::from_raw(cells[i].address()) };
                    let value = if scale.is_normal() { scale } else { 1.0 };
                    blender.set_grad_scale(if by_address { behind } else { GradScale::value(value) })?;
                    place.set_pending(blender, &c, &d);
                    blender.observe(STREAM())?;
                    if reweight {
                        blender.reweight(STREAM())?;
                    }
                }
                let states = [blenders[0].save(STREAM())?, blenders[1].save(STREAM())?];
                let case = format!("case {case}, turn {turn}: {config:?}, scale {scale}");
                assert_eq!(blenders[0].report(STREAM())?.weights, blenders[1].report(STREAM())?.weights, "{case}");
                assert_eq!(states[0], states[1], "{case}");
            }
            let report = blenders[1].report(STREAM())?;
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
    on_cuda(|place| {
        let mut blender = place.blender(3)?;
        let cell = place.buffer(vec![2.0_f32]);
        // SAFETY: no observation reads it.
        blender.set_grad_scale(unsafe { GradScale::from_raw(cell.address()) })?;
        drop(cell);
        let mut tensors = tensors(&mut Random(77));
        place.run(&mut blender, &mut tensors, Blender::dot)?;
        Sums::of(3, &tensors).check(&place.pending(&blender), "after the scale is gone");
        Ok(())
    })
}

fn tensors(random: &mut Random) -> Vec<Tensor<f32>> {
    (0..9).map(|i| Tensor::random(random, 1500 * i, 3, i % 4, 4)).collect()
}

/// Blends and a saved state.
type Results = (Vec<Vec<u32>>, Vec<u8>);

/// A few steps, on a stream of one's own.
fn steps(place: Place, seed: u64) -> gradblend::Result<Results> {
    let (mut random, own) = (Random(seed), Own::new());
    let mut blender = place.blender(3)?;
    let mut blends = Vec::new();
    for _ in 0..3 {
        let mut tensors = tensors(&mut random);
        let mut lists = place.put(&mut tensors);
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
    on_cuda(|place| {
        let mut random = Random(72);
        let mut blender = place.blender(3)?;
        let mut blends = Vec::new();
        for _ in 0..3 {
            let mut tensors = tensors(&mut random);
            place.run(&mut blender, &mut tensors, Blender::step)?;
            blender.reweight(STREAM())?;
            blends.extend(tensors.iter().map(|tensor| bits(&tensor.blended)));
        }
        assert_eq!(steps(place, 72)?, (blends, blender.save(STREAM())?));
        Ok(())
    })
}

#[test]
fn threads_do_not_disturb_each_other() -> Outcome {
    on_cuda(|place| {
        let alone: Vec<_> = (80..84).map(|seed| steps(place, seed)).collect::<Result<_, _>>()?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (80..84).map(|seed| scope.spawn(move || steps(place, seed))).collect();
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
    on_cuda(|place| {
        let (mut random, own) = (Random(73), Own::new());
        let mut want = tensors(&mut random);
        for plan_first in [true, false] {
            let mut got = want.clone();
            place.run(&mut place.blender(3)?, &mut want, Blender::step)?;
            let mut lists = place.put(&mut got);
            let mut blender = place.blender(3)?;
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
    fn calls(place: Place) -> Outcome {
        let before = current();
        let done = |call: &str| assert_eq!(current(), before, "after {call}");
        let mut all = tensors(&mut Random(74));
        let mut others = all.clone();
        let (mut all, mut others) = (place.put(&mut all), place.put(&mut others));
        let mut blender = place.blender(3)?;
        done("new");
        let mut plan = blender.plan(&all.grads())?;
        done("plan");
        blender.step(&plan, STREAM())?;
        done("step");
        plan.update(&others.grads(), STREAM())?;
        done("update");
        blender.pass(&plan, Pass::DOT, STREAM())?;
        done("pass");
        assert!(blender.pass(&plan, Pass::empty(), STREAM()).is_err());
        done("pass, refused");
        blender.observe(STREAM())?;
        done("observe");
        blender.reweight(STREAM())?;
        done("reweight");
        blender.reset(STREAM())?;
        done("reset");
        blender.set_weights(&[1.0; 3], STREAM())?;
        done("set_weights");
        let cell = place.buffer(vec![1.0]);
        // SAFETY: no observation reads it.
        blender.set_grad_scale(unsafe { GradScale::from_raw(cell.address()) })?;
        done("set_grad_scale");
        blender.report(STREAM())?;
        done("report");
        blender.second_moments(STREAM())?;
        done("second_moments");
        let saved = blender.save(STREAM())?;
        done("save");
        blender.load(&saved, STREAM())?;
        done("load");
        drop(plan.release());
        done("drop of the plan");
        drop(blender);
        done("drop of the blender");
        Ok(())
    }
    on_cuda(|place| {
        assert!(current().is_null(), "a new thread has none");
        calls(place)?;
        within(|| calls(place))
    })
}

/// A blender may change threads.
#[test]
fn blenders_move_between_threads() -> Outcome {
    on_cuda(|place| {
        let mut blender = place.blender(2)?;
        place.set_pending(&mut blender, &[1.0, 2.0], &[3.0, 4.0]);
        let moved = std::thread::spawn(move || blender.observe(STREAM()).and_then(|()| blender.report(STREAM())));
        let report = moved.join().map_err(|_| "the thread panicked")??;
        assert_eq!((report.observed, report.mean), (1, vec![1.0, 2.0]));
        Ok(())
    })
}

/// Where the device reads the host's memory, slices need no `unsafe`, and the blend is there when the call returns.
#[test]
fn slices() -> Outcome {
    fn run<T: Sample>(place: Place) -> Outcome {
        let mut random = Random(75);
        let mut slices: Vec<Tensor<T>> = (0..4).map(|i| Tensor::random(&mut random, 3000 * i, 3, i, 4)).collect();
        let mut copies = slices.clone();
        let (mut own, mut other) = (place.blender(3)?, place.blender(3)?);
        let grads: Vec<TensorGrads<'_>> = slices.iter_mut().map(Tensor::grads).collect();
        let plan = match own.plan(&grads) {
            Err(Error::UnknownMemory { .. }) => {
                skip("the device does not read the host's memory");
                return Ok(());
            }
            other => other?,
        };
        own.step(&plan, STREAM())?;
        drop((plan, grads));
        place.run(&mut other, &mut copies, Blender::step)?;
        for (slice, copy) in slices.iter().zip(&copies) {
            assert_eq!(bits(&slice.blended), bits(&copy.blended));
        }
        assert_eq!(own.save(STREAM())?, other.save(STREAM())?);
        Ok(())
    }
    on_cuda(|place| {
        run::<f32>(place)?;
        run::<gradblend::bf16>(place)
    })
}
