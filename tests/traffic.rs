//! What the emulator counts: bytes, launches, waits, allocations; and how many multiprocessors it says it has.
#![cfg(feature = "cuda")]

use gradblend::{Blender, DType, Pass, Plan, Stream, TensorGrads, bf16, f16};
use gradblend_testkit::cuda::{Emulator, Own, on_emulator, within};
use gradblend_testkit::{Face, Outcome, Output, Random, STREAM, Sample, Tensor, bits};

/// What `work` adds to counters.
fn counted<const N: usize>(
    emulator: Emulator,
    names: [&str; N],
    work: impl FnOnce() -> Result<()>,
) -> Result<[u64; N]> {
    let before = names.map(|name| emulator.count(name));
    work()?;
    let mut counts = names.map(|name| emulator.count(name));
    counts.iter_mut().zip(before).for_each(|(count, before)| *count -= before);
    Ok(counts)
}

type Operation = fn(&mut Blender, &Plan<'_>, Stream) -> Result<()>;

/// What an operation reads and writes of a tensor, in lists: the floor of the design.
struct Pattern {
    name: &'static str,
    operation: Operation,
    dots: bool,
    blends: bool,
    accumulates: bool,
}

const PATTERNS: [Pattern; 5] = [
    Pattern { name: "dot", operation: |b, p, s| b.dot(p, s), dots: true, blends: false, accumulates: false },
    Pattern { name: "blend", operation: |b, p, s| b.blend(p, s), dots: false, blends: true, accumulates: false },
    Pattern { name: "step", operation: |b, p, s| b.step(p, s), dots: true, blends: true, accumulates: false },
    Pattern {
        name: "accumulate",
        operation: |b, p, s| b.pass(p, Pass::BLEND | Pass::ACCUMULATE, s),
        dots: false,
        blends: true,
        accumulates: true,
    },
    Pattern {
        name: "dot and accumulate",
        operation: |b, p, s| b.pass(p, Pass::DOT | Pass::BLEND | Pass::ACCUMULATE, s),
        dots: true,
        blends: true,
        accumulates: true,
    },
];

impl Pattern {
    /// Bytes to load and to store.
    fn floor<T: Sample>(&self, tensor: &Tensor<T>) -> [u64; 2] {
        let present = tensor.present();
        let dots = self.has_products && tensor.has_products && present > 0;
        let blends = self.blends && tensor.output != Output::None && (present > 0 || !self.accumulates);
        let loads = if dots { 2 } else { 0 }
            + if dots || blends { present } else { 0 }
            + usize::from(blends && self.accumulates);
        let bytes = std::mem::size_of::<T>() * tensor.len();
        [loads * bytes, usize::from(blends) * bytes].map(|bytes| bytes as u64)
    }
}

/// Every operation moves each byte of each list that takes part once, and no other.
#[test]
fn traffic_is_the_floor() -> Outcome {
    fn body<T: Sample>(emulator: Emulator) -> Outcome {
        let mut random = Random(201);
        for present in 0..=8 {
            let k = present + 1;
            let mut blender = Face::CUDA.blender(k)?;
            for scattered in [false, true] {
                let mut tensors: Vec<Tensor<T>> = [1, 70_001, 8192, 9000, 0, 333]
                    .map(|len| {
                        let mut tensor = Tensor::random(&mut random, len, k, 0, 0);
                        tensor.modalities[random.below(k)] = None;
                        tensor.has_products = random.below(5) != 0;
                        tensor.output = if random.below(5) == 0 { Output::None } else { Output::Blended };
                        if scattered { tensor.scattered(&mut random) } else { tensor }
                    })
                    .into();
                for pattern in &PATTERNS {
                    let mut want = [0; 2];
                    for tensor in &tensors {
                        want.iter_mut().zip(pattern.floor(tensor)).for_each(|(sum, bytes)| *sum += bytes);
                    }
                    let got = counted(emulator, ["loaded", "stored"], || {
                        Face::CUDA.run(&mut blender, &mut tensors, pattern.operation)
                    })?;
                    let (name, dtype) = (pattern.name, T::DTYPE);
                    assert_eq!(got, want, "{name}, {dtype}, {present} present, scattered: {scattered}");
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

/// More than 8 are read in tiles of 8, each with t and g again.
#[test]
fn tiles_read_train_and_validation_gradients_again() -> Outcome {
    on_emulator(|emulator| {
        for present in [9, 16, 17, 32] {
            let mut tensors = [Tensor::<f16>::random(&mut Random(202), 70_001, present, 0, 0)];
            let mut blender = Face::CUDA.blender(present)?;
            let list = 2 * 70_001;
            for (operation, want) in [
                (TestBlender::dot as Operation, [2 * present.div_ceil(8) + present, 0]),
                (TestBlender::blend as Operation, [present, 1]),
            ] {
                let run = || Face::CUDA.run(&mut blender, &mut tensors, operation);
                let got = counted(emulator, ["loaded", "stored"], run)?;
                assert_eq!(got, want.map(|lists| (lists * list) as u64), "{present} present");
            }
        }
        Ok(())
    })
}

/// What a plan keeps on the device, tables and partial sums, is a small part of what its passes move.
#[test]
fn tables_are_small() -> Outcome {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/shapes.json"))?;
    let shapes: serde_json::Value = serde_json::from_str(&text)?;
    let model = |name: &str| -> Option<Vec<u64>> {
        let models = shapes["models"].as_array()?;
        let parts = models.iter().find(|model| model["name"] == name)?["parts"].as_array()?;
        let tensors = parts.iter().filter_map(|part| part["tensors"].as_array()).flatten();
        tensors.map(|shape| shape.as_array()?.iter().map(|n| n.as_u64()).product()).collect()
    };
    let lists = [
        ("ResNet-50", model("ResNet-50"), 0.0002),
        ("ViT-B/16", model("ViT-B/16"), 0.0002),
        ("TinyLlama-1.1B", model("TinyLlama-1.1B"), 0.0002),
        ("83 million elements", Some(vec![83_000_000]), 0.0002),
        ("100,000 tensors of 1,000", Some(vec![1000; 100_000]), 0.01),
    ];
    on_emulator(|emulator| {
        for (name, list, most) in lists {
            let list = list.ok_or(name)?;
            // Never read, so never there; and inputs may share memory.
            let memory = vec![0_u16; list.iter().copied().max().unwrap_or(0) as usize];
            let at = memory.as_ptr().cast();
            // SAFETY: at `at` are as many elements as the longest has; nothing writes to them.
            let tensor =
                |len: &u64| unsafe { TensorGrads::from_raw(*len, DType::BF16, at, at, &[at; 3], std::ptr::null_mut()) };
            let tensors: Vec<_> = list.iter().map(tensor).collect();
            let blender = Face::CUDA.blender(3)?;
            let before = emulator.count("live_bytes");
            let _plan = blender.plan(&tensors)?;
            let kept = emulator.count("live_bytes") - before;
            let moved = 6 * 2 * list.iter().sum::<u64>();
            let share = kept as f64 / moved as f64;
            println!("{name}: {kept} bytes kept, {moved} moved by a step, {:.3} %", 100.0 * share);
            assert!(share < most, "{name}: {kept} bytes kept, {moved} moved");
        }
        Ok(())
    })
}

/// The last block reads each partial sum once, and nothing else is added up.
#[test]
fn partial_sums_are_read_once() -> Outcome {
    on_emulator(|emulator| {
        // More than there are spans: each gets a block.
        emulator.set("multiprocessors", 1000);
        for (k, count) in [(1, 400), (3, 2000), (32, 1100)] {
            let mut random = Random(207);
            let mut tensors: Vec<Tensor<bf16>> =
                (0..count).map(|i| Tensor::random(&mut random, 1 + i % 5, k, 0, 0)).collect();
            let mut blender = Face::CUDA.blender(k)?;
            let [blocks, table] = counted(emulator, ["blocks", "table"], || {
                Face::CUDA.run(&mut blender, &mut tensors, TestBlender::dot)
            })?;
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
        let mut lists = Face::CUDA.put(&mut tensors);
        let own = Own::new();
        let mut blender = Face::CUDA.blender(4)?;
        let grads = lists.grads();
        let mut plan = blender.plan(&grads)?;
        let empty = blender.plan(&[])?;
        let names = ["launches", "copies", "waits", "allocations", "frees"];
        let operations: [(&str, Operation); 9] = [
            ("dot", TestBlender::dot),
            ("observe", |blender, _, stream| blender.observe(stream)),
            ("reweight", |blender, _, stream| blender.reweight(stream)),
            ("blend", TestBlender::blend),
            ("step", TestBlender::step),
            ("pass that observes alone", |blender, plan, stream| blender.pass(plan, Pass::OBSERVE, stream)),
            ("pass of all", |blender, plan, stream| blender.pass(plan, Pass::all(), stream)),
            ("reset", |blender, _, stream| blender.reset(stream)),
            ("set_weights", |blender, _, stream| blender.set_weights(&[0.1; 4], stream)),
        ];
        for (name, operation) in operations {
            for (plan, which) in [(&plan, "30 tensors"), (&empty, "no tensor")] {
                let counts = counted(emulator, names, || operation(&mut blender, plan, own.stream()))?;
                assert_eq!(counts, [1, 0, 0, 0, 0], "{name}, {which}: {names:?}");
            }
        }
        let [launches, copies, waits, allocations, frees] =
            counted(emulator, names, || plan.update(&grads, own.stream()))?;
        assert_eq!([launches, waits, allocations, frees], [0; 4], "update");
        assert!(copies <= 3, "{copies} copies for an update");
        assert_eq!(counted(emulator, names, || blender.report(own.stream()).map(drop))?, [0, 1, 1, 0, 0], "report");
        Ok(())
    })
}

/// The same bits however many blocks there are, in whatever order they and their threads run.
#[test]
fn grids_change_no_bit() -> Outcome {
    on_emulator(|emulator| {
        let mut random = Random(204);
        let mut tensors: Vec<Tensor<f32>> =
            (0..40).map(|i| Tensor::random(&mut random, 1 << (i % 18), 9, i % 3, 3)).collect();
        // So far apart that sums in f64 round too, and differ in any other order.
        for tensor in &mut tensors {
            let scale = 2.0_f32.powi(random.below(41) as i32 - 20);
            tensor.inputs().flat_map(|list| list.iter_mut()).for_each(|x| *x *= scale);
        }
        let mut want = None;
        for multiprocessors in [1, 3, 132] {
            for seed in [0, 1, 2] {
                emulator.set("multiprocessors", multiprocessors);
                emulator.set("seed", seed);
                let mut own = tensors.clone();
                let mut blender = Face::CUDA.blender(9)?;
                let [blocks] = counted(emulator, ["blocks"], || {
                    Face::CUDA.run(&mut blender, &mut own, TestBlender::step)?;
                    blender.reweight()
                })?;
                assert!(blocks > 1 || multiprocessors == 1, "{blocks} blocks");
                let blends: Vec<Vec<u32>> = own.iter().map(|tensor| bits(&tensor.blended)).collect();
                let got = (blends, blender.save()?);
                assert!(
                    &got == want.get_or_insert_with(|| got.clone()),
                    "{multiprocessors} multiprocessors, seed {seed}"
                );
            }
        }
        Ok(())
    })
}

/// Whatever order things are dropped in, and with whatever pending, nothing stays behind.
#[test]
fn nothing_stays_behind() -> Outcome {
    on_emulator(|emulator| {
        let own = Own::new();
        let names = ["live", "live_bytes", "streams", "modules", "contexts"];
        within(|| ());
        let before = names.map(|name| emulator.count(name));
        for plan_first in [true, false] {
            let mut blender = Face::CUDA.blender(3)?;
            let mut tensors = [Tensor::<f32>::random(&mut Random(205), 5000, 3, 0, 0)];
            let mut lists = Face::CUDA.put(&mut tensors);
            let plan = blender.plan(&lists.grads())?;
            let other = blender.plan(&[])?;
            blender.step(&plan, own.stream())?;
            if plan_first {
                drop((plan.release(), other, blender));
            } else {
                drop(blender);
                drop((plan, other));
            }
            drop(lists);
            assert_eq!(names.map(|name| emulator.count(name)), before, "plan first: {plan_first}");
        }
        Ok(())
    })
}

/// What is dropped waits for the work that uses it, whatever else has been put on other streams since; nothing is left to
/// the driver, which waits too when memory is freed.
#[test]
fn drops_wait_for_what_uses_them() -> Outcome {
    on_emulator(|emulator| {
        let (compute, copies) = (Own::new(), Own::new());
        let mut tensors = [Tensor::<f32>::random(&mut Random(206), 5000, 3, 0, 0)];
        let mut others = tensors.clone();
        let (mut lists, mut other_lists) = (Face::CUDA.put(&mut tensors), Face::CUDA.put(&mut others));
        let mut blender = Face::CUDA.blender(3)?;
        let before = emulator.count("busy_frees");
        let first = blender.plan(&lists.grads())?;
        blender.step(&first, compute.stream())?;
        let grads = other_lists.grads();
        let mut second = blender.plan(&grads)?;
        drop(first);
        assert_eq!(emulator.count("busy_frees"), before, "another plan was made meanwhile");
        let third = blender.plan(&lists.grads())?;
        blender.step(&third, compute.stream())?;
        second.update(&grads, copies.stream())?;
        copies.wait();
        drop(third);
        drop(second);
        assert_eq!(emulator.count("busy_frees"), before, "another plan was updated meanwhile");
        blender.set_weights(&[1.0, 2.0, 3.0], compute.stream())?;
        drop(blender);
        assert_eq!(emulator.count("busy_frees"), before, "a blender");
        Ok(())
    })
}
