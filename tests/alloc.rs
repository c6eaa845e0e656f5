//! Run calls and updates allocate nothing. One test alone in its program: the allocator counts for all threads.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use gradblend_testkit::{Outcome, Face, Random, STREAM, Tensor};
use gradblend::{Cadence, Config, Overfitting, Pass, Policy};

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

fn calls(work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let before = CALLS.load(Ordering::SeqCst);
    work()?;
    Ok(CALLS.load(Ordering::SeqCst) - before)
}

#[test]
fn run_calls_and_updates_allocate_nothing() -> Outcome {
    common::cpu(body)?;
    #[cfg(feature = "cuda")]
    common::cuda(body)?;
    Ok(())
}

fn body(face: Face) -> Outcome {
    let threads: &[u32] = if face == Face::CPU { &[1, 2, 4] } else { &[1] };
    for &threads in threads {
        let policy = Policy { overfitting: Overfitting::Correlated, ..Policy::default() };
        let config = Config { threads, policy, cadence: Cadence::EveryObservation, ..Config::new(5) };
        let mut blender = face.blender_with(config)?;
        let mut random = Random(51);
        let mut tensors: Vec<Tensor<f32>> = (0..8).map(|i| Tensor::random(&mut random, 30_000 * i, 5, 0, 4)).collect();
        let mut others = tensors.clone();
        let (mut tensors, mut others) = (face.place(&mut tensors), face.place(&mut others));
        let mut plan = blender.plan(&tensors.grads())?;
        let grads = others.grads();
        let mut rounds = |rounds| {
            for _ in 0..rounds {
                blender.step(&plan)?;
                blender.dot(&plan)?;
                blender.pass(&plan, Pass::BLEND | Pass::ACCUMULATE)?;
                blender.observe()?;
                blender.reweight()?;
                blender.reset()?;
                plan.update(&grads)?;
            }
            Ok(())
        };
        // The system's locks and conditions, and the binding to a driver, set themselves up at their first use.
        rounds(1)?;
        let count = calls(|| rounds(5))?;
        assert_eq!(count, 0, "{threads} threads");
        assert!(calls(|| blender.report().map(drop))? > 0, "the count counts");
    }
    Ok(())
}
