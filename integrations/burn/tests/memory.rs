//! How many sets of gradients a call holds at most, and allocates, counted by an allocator.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use gradblend_burn::{GradBlend, GradBlendConfig};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls are those of the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
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
/// Parameters, of `SIDE` x `SIDE` each: a backward pass of burn holds a gradient or two more.
const PARAMETERS: usize = 16;
const SIDE: usize = 128;
const SET: f64 = (PARAMETERS * SIDE * SIDE * 4) as f64;

#[derive(Module, Debug)]
struct Network {
    layers: Vec<Param<Tensor<2>>>,
}

impl Network {
    /// Small activations: all large memory is that of gradients.
    fn loss(&self, scale: f32) -> Tensor<1> {
        let x = Tensor::<2>::ones([1, SIDE], &self.layers[0].val().device());
        let terms = self.layers.iter().map(|layer| x.clone().matmul(layer.val()).sum());
        terms.reduce(|a, b| a + b).unwrap() * scale
    }

    fn losses(&self) -> [Tensor<1>; K] {
        [1.0, 2.0, 3.0].map(|scale| self.loss(scale))
    }
}

/// The peak of a call over what was live before it, and all that it allocates, in sets of gradients.
fn sets(call: impl FnOnce()) -> (f64, f64) {
    let (before, allocated) = (LIVE.load(Ordering::Relaxed), ALLOCATED.load(Ordering::Relaxed));
    PEAK.store(before, Ordering::Relaxed);
    call();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    (peak as f64 / SET, (ALLOCATED.load(Ordering::Relaxed) - allocated) as f64 / SET)
}

#[test]
fn an_observing_call_holds_k_plus_two_sets_and_copies_none() {
    let device = Device::flex().autodiff();
    let var = || Param::from_tensor(Tensor::<2>::ones([SIDE, SIDE], &device));
    let network = Network { layers: (0..PARAMETERS).map(|_| var()).collect() };
    let plain = |loss: Tensor<1>| drop(GradientsParams::from_grads(loss.backward(), &network));
    plain(network.loss(1.0));
    let (_, of_a_pass) = sets(|| plain(network.loss(1.0)));
    for independent in [false, true] {
        let mut gb = GradBlend::new(&network, GradBlendConfig::new(K as u32).every(2)).unwrap();
        for observes in [true, false] {
            let (peak, allocated) = sets(|| {
                let gradients = match independent {
                    false => gb.backward(&network, || network.losses(), || network.loss(3.5)),
                    true => gb.backward_with_train(
                        &network,
                        || network.losses(),
                        || network.loss(3.5),
                        || network.loss(3.2),
                    ),
                };
                assert_eq!(gradients.unwrap().len(), PARAMETERS);
            });
            assert_eq!(gb.observed(), observes);
            let case = format!("independent {independent}: peak {peak}, allocated {allocated}, a pass {of_a_pass}");
            let least = if observes { K as f64 + 2.0 } else { 1.0 };
            assert!(peak >= least && peak < least + 0.5, "{case}");
            if observes {
                // What the passes allocate, and the memory of the blend. Copies would be a set for each pass; the rest is
                // activations.
                let passes = K as f64 + if independent { 2.0 } else { 1.0 };
                assert!(allocated < passes * of_a_pass + 1.9, "{case}");
            }
        }
    }
}
