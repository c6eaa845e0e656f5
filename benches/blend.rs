//! `blend` on the CPU, in bytes of the minimum traffic per second.
#![allow(clippy::expect_used)] // A benchmark has no caller to return an error to.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use gradblend::Stream;

fn blend(c: &mut Criterion) {
    // The blended gradient.
    common::run(c, "blend", 1, |blender, plan| blender.blend(plan, Stream::default()));
}

criterion_group!(benches, blend);
criterion_main!(benches);
