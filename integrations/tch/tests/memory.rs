//! How many sets of gradients a call holds at most, by what the system counts as the process's memory.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;

use gradblend_tch::{GradBlend, GradBlendConfig};
use tch::{Device, Kind, Tensor};

const K: usize = 3;
/// Parameters, of `SIDE` x `SIDE` each: above the 32 MiB up to which glibc keeps memory that is freed.
const PARAMETERS: usize = 4;
const SIDE: i64 = 3000;

/// A line of the process's status, in bytes.
fn status(name: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim_end_matches("kB").trim().parse::<f64>().unwrap() * 1024.0
}

/// The peak of a call over what was in use before it, in sets of gradients.
fn sets(call: impl FnOnce()) -> f64 {
    fs::write("/proc/self/clear_refs", "5").unwrap(); // resets the peak
    let before = status("VmRSS");
    call();
    (status("VmHWM") - before) / (PARAMETERS as i64 * SIDE * SIDE * 4) as f64
}

#[test]
fn an_observing_call_holds_k_plus_two_sets() {
    tch::set_num_threads(1);
    let var = || Tensor::ones([SIDE, SIDE], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let vars: Vec<Tensor> = (0..PARAMETERS).map(|_| var()).collect();
    let x = Tensor::ones([1, SIDE], (Kind::Float, Device::Cpu));
    // Small activations: all large memory is that of gradients.
    let loss = |scale: f64| {
        let terms = vars.iter().map(|var| x.matmul(var).sum(Kind::Float));
        terms.reduce(|a, b| a + b).unwrap() * scale
    };
    for independent in [false, true] {
        let mut gb = GradBlend::new(&vars, GradBlendConfig::new(K as u32).every(2)).unwrap();
        // The first round also makes what stays: the libraries' own memory, and `.grad`.
        for round in 0..2 {
            for observes in [true, false] {
                let losses = [loss(1.0), loss(2.0), loss(3.0)];
                let peak = sets(|| match independent {
                    false => gb.backward(&losses, || loss(3.5)).unwrap(),
                    true => gb.backward_with_train(&losses, || loss(3.5), || loss(3.2)).unwrap(),
                });
                assert_eq!(gb.observed(), observes);
                let least = if observes { K as f64 + 2.0 } else { 1.0 };
                if round > 0 {
                    assert!(peak > least - 0.3 && peak < least + 0.5, "independent {independent}: {peak} sets");
                }
            }
        }
    }
    assert!(vars.iter().all(|var| var.grad().defined()));
}
