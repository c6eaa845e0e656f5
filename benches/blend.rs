//! `blend` against plain reading of the same bytes, the naive way, and ndarray.

mod common;

use common::{Operation, run};

fn blend(criterion: &mut criterion::Criterion) {
    run(criterion, Operation::Blend);
}

criterion::criterion_group!(benches, blend);
criterion::criterion_main!(benches);
