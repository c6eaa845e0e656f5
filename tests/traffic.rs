//! What the emulator counts: bytes, launches, waits and allocations, at any number of SMs.
#![cfg(feature = "cuda")]

use gradblend::{DType, Pass, bf16, f16};
use gradblend_testkit::cuda::{Emulator, OwnStream, on_emulator, with_context};
use gradblend_testkit::{
    Face, Input, Outcome, Output, Random, Result, Sample, Tensor, TestBlender, TestPlan, bits, resnet_50,
};

const FACE: Face = Face::CUDA;

type Operation = fn(&mut TestBlender, &TestPlan<'_>) -> Result<()>;

/// The operations over memory, by what they do.
const OPERATIONS: [(Pass, Operation); 5] = [
    (Pass::DOT, TestBlender::dot),
    (Pass::BLEND, TestBlender::blend),
    (Pass::DOT.union(Pass::BLEND), TestBlender::step),
    (Pass::BLEND.union(Pass::ACCUMULATE), TestBlender::accumulate),
    (Pass::DOT.union(Pass::BLEND).union(Pass::ACCUMULATE), |blender, plan| {
        blender.pass(plan, Pass::DOT | Pass::BLEND | Pass::ACCUMULATE)
    }),
];

/// The minimum traffic of an operation on a tensor: bytes to load and to store. Products need all modalities, a blend
/// those whose weight is not 0.
fn minimum_traffic<T: Sample>(what: Pass, tensor: &Tensor<T>, weights: &[f64]) -> [u64; 2] {
    let (present, accumulates) = (tensor.present(), what.contains(Pass::ACCUMULATE));
    let weighted = tensor.modalities.iter().zip(weights).filter(|(v, weight)| v.is_some() && **weight != 0.0).count();
    let dots = what.contains(Pass::DOT) && tensor.has_products && present > 0;
    let blends = what.contains(Pass::BLEND) && tensor.output != Output::None && (weighted > 0 || !accumulates);
    let modalities = if dots { 2 + present } else { usize::from(blends) * weighted };
    let loads = modalities + usize::from(blends && accumulates);
    [loads, usize::from(blends)].map(|buffers| (buffers * size_of::<T>() * tensor.len()) as u64)
}

/// Every operation moves each byte of each buffer that takes part once, and no other byte.
#[test]
fn traffic_is_the_minimum() -> Outcome {
    fn body<T: Sample>(emulator: Emulator) -> Outcome {
        let mut random = Random(201);
        for present in 0..=8 {
            let k = present + 1;
            let mut blender = FACE.blender(k)?;
            for scattered in [false, true] {
                let weights: Vec<f64> = (0..k).map(|_| if random.below(4) == 0 { 0.0 } else { 0.5 }).collect();
                blender.set_weights(&weights)?;
                let mut tensors: Vec<Tensor<T>> = [1, 70_001, 8192, 9000, 0, 333]
                    .map(|len| {
                        let mut tensor = Tensor::random(&mut random, len, k, 0, 0);
                        tensor.modalities[random.below(k)] = None;
                        tensor.has_products = random.below(5) != 0;
                        tensor.output = if random.below(5) == 0 { Output::None } else { Output::Blended };
                        if scattered { tensor.scattered(&mut random) } else { tensor }
                    })
                    .into();
                for (what, operation) in OPERATIONS {
                    let mut want = [0; 2];
                    for tensor in &tensors {
                        want.iter_mut()
                            .zip(minimum_traffic(what, tensor, &weights))
                            .for_each(|(sum, bytes)| *sum += bytes);
                    }
                    let run = || FACE.run(&mut blender, &mut tensors, operation);
                    let got = emulator.counted(["loaded", "stored"], run)?;
                    assert_eq!(got, want, "{what:?}, {}, {present} present, scattered: {scattered}", T::DTYPE);
                }
            }
        }
        Ok(())
    }
    on_emulator(|emulator| {
        body::<f32>(emulator)?;
        body::<f16>(emulator)?;
        body::<bf16>(emulator)
    })
}

/// More than 8 modalities are read in tiles of 8, each with t and g again, but those of weight 0 not for a blend.
#[test]
fn tiles_read_train_and_validation_gradients_again() -> Outcome {
    on_emulator(|emulator| {
        for present in [9, 16, 17, 32] {
            let mut tensors = [Tensor::<f16>::random(&mut Random(202), 70_001, present, 0, 0)];
            let mut blender = FACE.blender(present)?;
            let weights: Vec<f64> = (0..present).map(|k| if k % 8 == 1 { 0.0 } else { 0.5 }).collect();
            blender.set_weights(&weights)?;
            let bytes = 2 * 70_001;
            for (operation, want) in [
                (TestBlender::dot as Operation, [2 * present.div_ceil(8) + present, 0]),
                (TestBlender::blend, [weights.iter().filter(|weight| **weight != 0.0).count(), 1]),
            ] {
                let run = || FACE.run(&mut blender, &mut tensors, operation);
                let got = emulator.counted(["loaded", "stored"], run)?;
                assert_eq!(got, want.map(|buffers| (buffers * bytes) as u64), "{present} present");
            }
        }
        Ok(())
    })
}

/// Lengths of the parameter tensors of a ViT-B/16.
fn vit_b_16() -> Vec<u64> {
    let d = 768;
    let block = [d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d];
    let rest = [d, 197 * d, d * d, d, d, d, 1000 * d, 1000];
    rest.into_iter().chain(block.into_iter().cycle().take(12 * 12)).collect()
}

/// What a plan keeps on the device, tables and partial sums, is a small part of what its passes move.
#[test]
fn tables_are_small() -> Outcome {
    // Models that the table of a plan must be small for.
    let (resnet, vit) = (resnet_50().into_iter().map(|len| len as u64).collect::<Vec<_>>(), vit_b_16());
    assert_eq!((resnet.len(), vit.len()), (161, 152));
    assert_eq!((resnet.iter().sum::<u64>(), vit.iter().sum::<u64>()), (25_557_032, 86_567_656));
    let many = vec![1000; 100_000];
    on_emulator(|emulator| {
        for (lengths, most) in [(resnet, 0.0002), (vit, 0.0002), (vec![83_000_000], 0.0002), (many, 0.01)] {
            // No plan of it runs, and inputs may share memory.
            let memory = vec![0_u16; lengths.iter().copied().max().unwrap_or(0) as usize];
            let at = memory.as_ptr().expose_provenance();
            // SAFETY: `memory` is as long as the longest tensor, and nothing writes to it.
            let input = |len: &u64| unsafe { Input::at(*len, DType::BF16, at, at, &[at; 3], 0) };
            let inputs = lengths.iter().map(input).collect();
            let blender = FACE.blender(3)?;
            let before = emulator.count("live_bytes");
            let _plan = blender.plan(inputs)?;
            let kept = emulator.count("live_bytes") - before;
            let moved = 6 * 2 * lengths.iter().sum::<u64>();
            let share = kept as f64 / moved as f64;
            assert!(share < most, "{} tensors: {kept} bytes kept, {moved} moved by a step", lengths.len());
        }
        Ok(())
    })
}

/// The last block reads each partial sum once, and adds nothing else.
#[test]
fn partial_sums_are_read_once() -> Outcome {
    on_emulator(|emulator| {
        // More SMs than spans, so that each span gets a block.
        emulator.set("sms", 1000);
        for (k, count) in [(1, 400), (3, 2000), (32, 1100)] {
            let mut random = Random(207);
            let mut tensors: Vec<Tensor<bf16>> =
                (0..count).map(|i| Tensor::random(&mut random, 1 + i % 5, k, 0, 0)).collect();
            let mut blender = FACE.blender(k)?;
            let run = || FACE.run(&mut blender, &mut tensors, TestBlender::dot);
            let [blocks, table] = emulator.counted(["blocks", "table"], run)?;
            assert_eq!(blocks as usize, count.div_ceil(8), "K = {k}");
            assert_eq!(table, blocks * 2 * k as u64 * 8, "K = {k}");
        }
        Ok(())
    })
}

/// A run call is one launch and nothing else; an update is a few copies and nothing else.
#[test]
fn calls_launch_once_and_do_not_wait() -> Outcome {
    on_emulator(|emulator| {
        let mut random = Random(203);
        let mut tensors: Vec<Tensor<f32>> = (0..30).map(|i| Tensor::random(&mut random, 999 * i, 4, 0, 3)).collect();
        let mut others = tensors.clone();
        let (mut uploaded, mut other_uploaded) = (FACE.upload(&mut tensors), FACE.upload(&mut others));
        let own = OwnStream::default();
        let mut blender = FACE.blender(4)?;
        blender.stream = own.stream();
        let (mut plan, empty) = (blender.plan(uploaded.inputs())?, blender.plan(Vec::new())?);
        let names = ["launches", "copies", "waits", "allocations", "frees"];
        let operations: [(&str, Operation); 9] = [
            ("dot", TestBlender::dot),
            ("observe", |blender, _| blender.observe()),
            ("reweight", |blender, _| blender.reweight()),
            ("blend", TestBlender::blend),
            ("step", TestBlender::step),
            ("a pass with only OBSERVE", |blender, plan| blender.pass(plan, Pass::OBSERVE)),
            ("a pass of all", |blender, plan| blender.pass(plan, Pass::all())),
            ("reset", |blender, _| blender.reset()),
            ("set_weights", |blender, _| blender.set_weights(&[0.1; 4])),
        ];
        for (name, operation) in operations {
            for (plan, which) in [(&plan, "30 tensors"), (&empty, "no tensor")] {
                let counts = emulator.counted(names, || operation(&mut blender, plan))?;
                assert_eq!(counts, [1, 0, 0, 0, 0], "{name}, {which}: {names:?}");
            }
        }
        let inputs = other_uploaded.inputs();
        let [launches, copies, waits, allocations, frees] =
            emulator.counted(names, || plan.update(inputs, own.stream()))?;
        assert_eq!([launches, waits, allocations, frees], [0; 4], "update");
        assert!(copies <= 3, "{copies} copies for an update");
        assert_eq!(emulator.counted(names, || blender.report().map(drop))?, [0, 1, 1, 0, 0], "report");
        Ok(())
    })
}

/// The bits depend neither on the number of thread blocks nor on the order in which blocks and threads run.
#[test]
fn grids_change_no_bit() -> Outcome {
    on_emulator(|emulator| {
        let mut random = Random(204);
        let mut tensors: Vec<Tensor<f32>> =
            (0..40).map(|i| Tensor::random(&mut random, 1 << (i % 18), 9, i % 3, 3)).collect();
        // Magnitudes so different that the sums in f64 round too, and differ in any other order.
        for tensor in &mut tensors {
            tensor.scale(2.0_f64.powi(random.below(41) as i32 - 20));
        }
        let mut want = None;
        for sms in [1, 3, 132] {
            for seed in [0, 1, 2] {
                emulator.set("sms", sms);
                emulator.set("seed", seed);
                let mut own = tensors.clone();
                let mut blender = FACE.blender(9)?;
                let [blocks] = emulator.counted(["blocks"], || {
                    FACE.run(&mut blender, &mut own, TestBlender::step)?;
                    blender.reweight()
                })?;
                assert!(blocks > 1 || sms == 1, "{blocks} blocks");
                let blends: Vec<Vec<u32>> = own.iter().map(|tensor| bits(&tensor.blended)).collect();
                let got = (blends, blender.save()?);
                assert!(&got == want.get_or_insert_with(|| got.clone()), "{sms} sms, seed {seed}");
            }
        }
        Ok(())
    })
}

/// Plans and blenders free everything, in whatever order they are dropped, with work pending.
#[test]
fn nothing_leaks() -> Outcome {
    on_emulator(|emulator| {
        let own = OwnStream::default();
        let names = ["live", "live_bytes", "streams", "modules", "contexts"];
        with_context(|| ());
        let before = names.map(|name| emulator.count(name));
        for plan_first in [true, false] {
            let mut blender = FACE.blender(3)?;
            blender.stream = own.stream();
            let mut tensors = [Tensor::<f32>::random(&mut Random(205), 5000, 3, 0, 0)];
            let mut uploaded = FACE.upload(&mut tensors);
            let (plan, other) = (blender.plan(uploaded.inputs())?, blender.plan(Vec::new())?);
            blender.step(&plan)?;
            if plan_first {
                drop((plan.release(), other, blender));
            } else {
                drop(blender);
                drop((plan, other));
            }
            drop(uploaded);
            assert_eq!(names.map(|name| emulator.count(name)), before, "plan first: {plan_first}");
        }
        Ok(())
    })
}

/// A drop waits for the work that uses what is dropped, whatever has been put on other streams since, and does not leave
/// that to the driver, which also waits when memory is freed.
#[test]
fn drops_wait_for_what_uses_them() -> Outcome {
    on_emulator(|emulator| {
        let (compute, copies) = (OwnStream::default(), OwnStream::default());
        let mut tensors = [Tensor::<f32>::random(&mut Random(206), 5000, 3, 0, 0)];
        let (mut others, mut updates) = (tensors.clone(), tensors.clone());
        let (mut uploaded, mut other_uploaded, mut update_uploaded) =
            (FACE.upload(&mut tensors), FACE.upload(&mut others), FACE.upload(&mut updates));
        let mut blender = FACE.blender(3)?;
        blender.stream = compute.stream();
        let before = emulator.count("busy_frees");
        let first = blender.plan(uploaded.inputs())?;
        blender.step(&first)?;
        let mut second = blender.plan(other_uploaded.inputs())?;
        drop(first);
        assert_eq!(emulator.count("busy_frees"), before, "another plan was made meanwhile");
        let third = blender.plan(uploaded.inputs())?;
        blender.step(&third)?;
        second.update(update_uploaded.inputs(), copies.stream())?;
        copies.synchronize();
        drop(third);
        drop(second);
        assert_eq!(emulator.count("busy_frees"), before, "another plan was updated meanwhile");
        blender.set_weights(&[1.0, 2.0, 3.0])?;
        drop(blender);
        assert_eq!(emulator.count("busy_frees"), before, "a blender");
        Ok(())
    })
}
