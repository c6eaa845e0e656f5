//! What the three benchmarks share: cases, and a table of the contenders timed in turns.
//!
//! `cargo bench` runs everything, `GRADBLEND_BENCH=quick cargo bench` a few large cases, `cargo bench -- K4/bf16` what
//! the filter names. `GRADBLEND_BENCH=table` leaves out criterion's own sampling.

mod cases;
mod contenders;
mod lists;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use gradblend::{DType, bf16, f16};

use cases::Case;
use contenders::{Contender, Contenders};
use lists::Real;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Both sums of each modality.
    Dot,
    /// The blended gradient.
    Blend,
    /// Both in one pass, and the observation.
    Step,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Dot => "dot",
            Operation::Blend => "blend",
            Operation::Step => "step",
        }
    }

    fn dots(self) -> bool {
        self != Operation::Blend
    }

    fn blends(self) -> bool {
        self != Operation::Dot
    }

    /// Lists that must be moved once for K modalities.
    fn lists(self, modalities: usize) -> usize {
        modalities + if self.dots() { 2 } else { 0 } + usize::from(self.blends())
    }
}

/// Which part of the work is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Run as a test: tiny sizes, once.
    Test,
    /// A few large cases.
    Quick,
    /// Everything.
    Full,
}

impl Extent {
    fn now() -> Self {
        // `cargo bench` passes `--bench`; `cargo test` does not, and `cargo bench -- --test` passes both.
        let is = |flag: &str| std::env::args().any(|arg| arg == flag);
        if !is("--bench") || is("--test") {
            return Extent::Test;
        }
        if std::env::var("GRADBLEND_BENCH").is_ok_and(|v| v.contains("quick")) { Extent::Quick } else { Extent::Full }
    }
}

/// Measures all cases of an operation.
pub(crate) fn run(criterion: &mut Criterion, operation: Operation) {
    let extent = Extent::now();
    let mut rows = Vec::new();
    for case in cases::cases(operation, extent) {
        rows.extend(match case.dtype {
            DType::F32 => measure::<f32>(criterion, operation, extent, &case),
            DType::F16 => measure::<f16>(criterion, operation, extent, &case),
            DType::BF16 => measure::<bf16>(criterion, operation, extent, &case),
        });
    }
    if !rows.is_empty() {
        print(operation, &rows);
    }
}

/// One line of the table.
struct Row {
    name: String,
    bytes: u64,
    /// Bytes a second of plain reading, the faster of two ways.
    read: f64,
    /// Bytes of the floor a second.
    ours: f64,
    /// Time of each over ours.
    over_ours: [Option<f64>; 3],
}

fn measure<T: Real>(criterion: &mut Criterion, operation: Operation, extent: Extent, case: &Case) -> Option<Row> {
    let bytes = case.bytes(operation);
    // Made when the first benchmark that passes the filter wants it.
    let mut ready: Option<Contenders<T>> = None;
    let tables_only = std::env::var("GRADBLEND_BENCH").is_ok_and(|v| v.contains("table"));
    if tables_only && extent != Extent::Test {
        ready = Some(Contenders::checked(operation, case));
    } else {
        let mut group = criterion.benchmark_group(operation.name());
        group.throughput(Throughput::Bytes(bytes)).sampling_mode(SamplingMode::Flat).sample_size(10);
        group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(400)).nresamples(5_000);
        for contender in Contender::ALL {
            let always = matches!(contender, Contender::Ours | Contender::Read);
            if !contender.takes(case.dtype) || !(always || case.thorough) {
                continue;
            }
            group.bench_function(BenchmarkId::new(contender.name(), &case.name), |bencher| {
                let ready = ready.get_or_insert_with(|| Contenders::checked(operation, case));
                bencher.iter(|| black_box(ready.run(contender)));
            });
        }
        group.finish();
    }
    let mut ready = ready.filter(|_| extent != Extent::Test)?;
    Some(in_turns(&mut ready, case, bytes))
}

/// Times the contenders one after another, again and again, so that whatever else the machine does hits all of them.
fn in_turns<T: Real>(ready: &mut Contenders<T>, case: &Case, bytes: u64) -> Row {
    const ROUNDS: usize = 9;
    let takers: Vec<Contender> = Contender::ALL.into_iter().filter(|c| c.takes(case.dtype)).collect();
    // Small cases are repeated until a turn is long enough for the clock.
    let repeats = (32_000_000 / bytes).clamp(1, 2_000);
    let mut times = vec![Vec::new(); takers.len()];
    for round in 0..ROUNDS {
        for (contender, times) in takers.iter().zip(&mut times) {
            // The slow ones need fewer turns for a ratio that is far from 1.
            if round % 3 != 0 && matches!(contender, Contender::Naive | Contender::Ndarray) {
                continue;
            }
            if repeats > 1 {
                black_box(ready.run(*contender));
            }
            let start = Instant::now();
            for _ in 0..repeats {
                black_box(ready.run(*contender));
            }
            times.push(start.elapsed().as_secs_f64() / repeats as f64);
        }
    }
    let time = |wanted: Contender| takers.iter().position(|c| *c == wanted).map(|at| median(times[at].clone()));
    let [read, abreast] = [Contender::Read, Contender::Abreast].map(|c| time(c).unwrap_or(f64::NAN));
    let floor = if abreast < read { Contender::Abreast } else { Contender::Read };
    let rate = |contender| time(contender).map_or(f64::NAN, |time| bytes as f64 / time);
    // Ours against reading: the median over rounds of the two turns next to each other.
    let turns = |wanted: Contender| takers.iter().position(|c| *c == wanted).map_or(&[][..], |at| &times[at]);
    let share = turns(floor).iter().zip(turns(Contender::Ours)).map(|(read, ours)| read / ours).collect();
    let over = |contender| Some(time(contender)? / time(Contender::Ours)?);
    Row {
        name: case.name.clone(),
        bytes,
        read: rate(floor),
        ours: rate(Contender::Ours),
        over_ours: [Some(median(share)), over(Contender::Naive), over(Contender::Ndarray)],
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(operation: Operation, rows: &[Row]) {
    println!(
        "\n{}: floor = the faster of two plain reads of the same bytes, same threads; medians of turns in one run",
        operation.name()
    );
    println!(
        "{:<34} {:>9} {:>11} {:>10} {:>9} {:>8} {:>10}",
        "case", "GB", "floor GB/s", "ours GB/s", "of floor", "x naive", "x ndarray"
    );
    for row in rows {
        let [share, naive, ndarray] =
            row.over_ours.map(|ratio| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")));
        let (gb, read, ours) = (row.bytes as f64 / 1e9, row.read / 1e9, row.ours / 1e9);
        println!("{:<34} {gb:>9.5} {read:>11.2} {ours:>10.2} {share:>9} {naive:>8} {ndarray:>10}", row.name);
    }
    println!();
}
