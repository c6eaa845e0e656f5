//! Run calls and updates allocate nothing. One test alone in its program: the allocator counts for all threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use gradblend::{Blender, Cadence, Config, GradScale, Overfitting, Pass, Policy, Stream};
use gradblend_testkit::{Face, Input, Outcome, Random, Tensor};

struct Counting;

static CALLS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of this method.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of this method.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls(work: impl FnOnce() -> gradblend::Result<()>) -> gradblend::Result<u64> {
    let before = CALLS.load(Ordering::SeqCst);
    work()?;
    Ok(CALLS.load(Ordering::SeqCst) - before)
}

#[test]
fn run_calls_and_updates_allocate_nothing() -> Outcome {
    gradblend_testkit::cpu(body)?;
    #[cfg(feature = "cuda")]
    gradblend_testkit::cuda(body)?;
    Ok(())
}

fn body(face: Face) -> Outcome {
    let threads: &[u32] = if face.cuda { &[1] } else { &[1, 2, 4] };
    for &threads in threads {
        let policy = Policy { overfitting: Overfitting::Correlated, ..Policy::default() };
        let config = Config { threads, policy, cadence: Cadence::EveryObservation, ..Config::new(5) };
        let scale = face.array(vec![2.0_f32]);
        let mut blender = Blender::new(&face.device()?, config)?;
        let mut random = Random(51);
        let mut tensors: Vec<Tensor<f32>> = (0..8).map(|i| Tensor::random(&mut random, 30_000 * i, 5, 0, 4)).collect();
        let mut others = tensors.clone();
        // The addresses of the C face can be bound again and again.
        let (mut uploaded, mut others) = (face.upload(&mut tensors), Face { c: true, ..face }.upload(&mut others));
        let others = others.inputs();
        let others = || {
            others.iter().filter_map(|input| match input {
                // SAFETY: the buffers outlive the plan, and nothing else uses them.
                Input::Addresses(addresses) => Some(unsafe { addresses.grads() }),
                Input::Slices(_) => None,
            })
        };
        let stream = Stream::default();
        let mut plan = blender.plan(uploaded.inputs().into_iter().map(Input::grads))?;
        let mut run = |rounds| {
            for _ in 0..rounds {
                blender.step(&plan, stream)?;
                blender.dot(&plan, stream)?;
                blender.pass(&plan, Pass::BLEND | Pass::ACCUMULATE, stream)?;
                blender.observe(stream)?;
                blender.reweight(stream)?;
                blender.blend(&plan, stream)?;
                blender.set_weights(&[0.2; 5], stream)?;
                // SAFETY: `scale` outlives the blender and never changes.
                blender.set_grad_scale(unsafe { GradScale::from_raw(scale.address()) })?;
                blender.reset(stream)?;
                plan.update(others(), stream)?;
            }
            Ok(())
        };
        // Locks, condition variables and the binding to a driver allocate at their first use.
        run(1)?;
        assert_eq!(calls(|| run(5))?, 0, "{threads} threads");
        assert!(calls(|| blender.report(stream).map(drop))? > 0, "the counter works");
    }
    Ok(())
}
