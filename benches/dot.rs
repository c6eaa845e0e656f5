//! `dot` on the CPU, in bytes of the minimum traffic per second.
#![allow(clippy::expect_used)] // A benchmark has no caller to return an error to.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use gradblend::Stream;

fn dot(c: &mut Criterion) {
    // t and g.
    common::run(c, "dot", 2, |blender, plan| blender.dot(plan, Stream::default()));
}

criterion_group!(benches, dot);
criterion_main!(benches);
