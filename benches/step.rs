//! `step` on the CPU, in bytes of the minimum traffic per second.
#![allow(clippy::expect_used)] // A benchmark has no caller to return an error to.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use gradblend::Stream;

fn step(c: &mut Criterion) {
    // t, g and the blended gradient.
    common::run(c, "step", 3, |blender, plan| blender.step(plan, Stream::default()));
}

criterion_group!(benches, step);
criterion_main!(benches);
