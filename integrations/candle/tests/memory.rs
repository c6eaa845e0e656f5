//! How many sets of gradients a call holds at most, counted by an allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor, Var};
use gradblend_candle::{GradBlend, GradBlendConfig};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls are those of the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller fulfils the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller fulfils the contract.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const K: usize = 3;
/// Parameters, of `SIDE` x `SIDE` each: a backward pass of candle holds a gradient or two more while it adds them up.
const PARAMETERS: usize = 16;
const SIDE: usize = 128;

/// The peak of a call over what was live before it, in sets of gradients.
fn sets(call: impl FnOnce()) -> f64 {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    call();
    (PEAK.load(Ordering::Relaxed) - before) as f64 / (PARAMETERS * SIDE * SIDE * 4) as f64
}

#[test]
fn an_observing_call_holds_k_plus_two_sets() {
    let var = || Var::ones((SIDE, SIDE), DType::F32, &Device::Cpu).unwrap();
    let vars: Vec<Var> = (0..PARAMETERS).map(|_| var()).collect();
    let x = Tensor::ones((1, SIDE), DType::F32, &Device::Cpu).unwrap();
    // Small activations: all large memory is that of gradients.
    let loss = |scale: f64| {
        let terms = vars.iter().map(|var| x.matmul(var).unwrap().sum_all().unwrap());
        (terms.reduce(|a, b| (a + b).unwrap()).unwrap() * scale).unwrap()
    };
    for independent in [false, true] {
        let mut gb = GradBlend::new(&vars, GradBlendConfig::new(K as u32).every(2)).unwrap();
        for observes in [true, false] {
            let losses = [loss(1.0), loss(2.0), loss(3.0)];
            let peak = sets(|| {
                let gradients = match independent {
                    false => gb.backward(&losses, || loss(3.5)),
                    true => gb.backward_with_train(&losses, || loss(3.5), || loss(3.2)),
                };
                assert_eq!(gradients.unwrap().get_ids().count(), PARAMETERS);
            });
            assert_eq!(gb.observed(), observes);
            let least = if observes { K as f64 + 2.0 } else { 1.0 };
            assert!(peak >= least && peak < least + 0.5, "independent {independent}: {peak} sets");
        }
    }
}
