//! `step` against plain reading of the same bytes, the naive way, and ndarray.
#![allow(clippy::expect_used, clippy::panic)] // a benchmark that cannot run has nobody to hand an error to

mod common;

use common::{Operation, run};

fn step(criterion: &mut criterion::Criterion) {
    run(criterion, Operation::Step);
}

criterion::criterion_group!(benches, step);
criterion::criterion_main!(benches);
