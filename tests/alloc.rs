//! Run calls and updates allocate nothing. One test alone in its program: the allocator counts for all threads.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Outcome, Random, STREAM, Tensor};
use gradblend::{Blender, Cadence, Config, Device, Overfitting, Pass, Policy, TensorGrads};

struct Counting;

static CALLS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands everything to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller's.
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
    for threads in [1, 2, 4] {
        let policy = Policy { overfitting: Overfitting::Correlated, ..Policy::default() };
        let config = Config { threads, policy, cadence: Cadence::EveryObservation, ..Config::new(5) };
        let mut blender = Blender::new(&Device::cpu(), config)?;
        let mut random = Random(51);
        let mut tensors: Vec<Tensor<f32>> = (0..8).map(|i| Tensor::random(&mut random, 30_000 * i, 5, 0, 4)).collect();
        let mut others = tensors.clone();
        let grads: Vec<TensorGrads<'_>> = tensors.iter_mut().map(Tensor::grads).collect();
        let mut plan = blender.plan(&grads)?;
        let grads: Vec<TensorGrads<'_>> = others.iter_mut().map(Tensor::grads).collect();
        // The system's locks and conditions may set themselves up at their first use.
        blender.step(&plan, STREAM())?;
        let count = calls(|| {
            for _ in 0..50 {
                blender.step(&plan, STREAM())?;
                blender.dot(&plan, STREAM())?;
                blender.pass(&plan, Pass::BLEND | Pass::ACCUMULATE, STREAM())?;
                blender.observe(STREAM())?;
                blender.reweight(STREAM())?;
                blender.reset(STREAM())?;
                plan.update(&grads, STREAM())?;
            }
            Ok(())
        })?;
        assert_eq!(count, 0, "{threads} threads");
        assert!(calls(|| blender.report(STREAM()).map(drop))? > 0, "the count counts");
    }
    Ok(())
}
