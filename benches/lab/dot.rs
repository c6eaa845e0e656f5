//! `dot` against the limit, the naive way, and whatever else does it.
#![allow(clippy::expect_used, clippy::panic)] // a benchmark that cannot run has nobody to hand an error to

mod harness;

fn main() {
    harness::run(harness::Operation::Dot);
}
