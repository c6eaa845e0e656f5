//! `solve` on random problems. Its inputs fit into the first-level cache, so problems per second is what it reports.
#![allow(clippy::expect_used)] // A benchmark has no caller to return an error to.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gradblend::{Overfitting, Policy};
use gradblend_testkit::Random;

/// Problems of one iteration: the iterations of the active-set method differ from problem to problem.
const PROBLEMS: usize = 64;

fn solve(c: &mut Criterion) {
    sigpipe::reset(); // the end of `cargo bench | head` is no panic
    let mut group = c.benchmark_group("solve");
    group.throughput(Throughput::Elements(PROBLEMS as u64));
    for overfitting in [Overfitting::Uncorrelated, Overfitting::Correlated] {
        for k in [2, 4, 8, 16, 32] {
            let (policy, mut random) = (Policy { overfitting, ..Policy::default() }, Random(k as u64));
            let problems: Vec<_> = (0..PROBLEMS).map(|_| problem(&mut random, k)).collect();
            group.bench_function(BenchmarkId::new(format!("{overfitting:?}").to_lowercase(), k), |b| {
                b.iter(|| {
                    for (numerator, second_moment) in &problems {
                        std::hint::black_box(gradblend::solve(numerator, second_moment, &policy).expect("a solution"));
                    }
                });
            });
        }
    }
    group.finish();
}

/// m, and S = A A' / (K + 2) + I / 50 with A of K x (K + 2) random numbers.
fn problem(random: &mut Random, k: usize) -> (Vec<f64>, Vec<f64>) {
    let rank = k + 2;
    let a = random.numbers(k * rank);
    let row = |j: usize| &a[j * rank..][..rank];
    let product = |j, i| row(j).iter().zip(row(i)).map(|(x, y)| x * y).sum::<f64>() / rank as f64;
    let entry = |at| product(at / k, at % k) + if at / k == at % k { 0.02 } else { 0.0 };
    let second_moment = (0..k * k).map(entry).collect();
    (random.numbers(k).iter().map(|m| m + 0.5).collect(), second_moment)
}

criterion_group!(benches, solve);
criterion_main!(benches);
