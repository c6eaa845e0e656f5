//! Checks every implementation of an operation on a case, then times them in rounds.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::backend::{Backend, Entry, Implementation, Missing};
use crate::case::{self, Case, Operation};
#[cfg(not(feature = "cuda"))]
use crate::cpu::Cpu as Cuda; // as there is none
#[cfg(feature = "cuda")]
use crate::cuda::Cuda;
use crate::inputs::{Inputs, with_dtype};
use crate::oracle::{self, Exact};
use crate::record::{CaseRecord, Errors, Kind, Log, Record, Skipped, Time};

/// Options of `run`.
#[derive(Args)]
pub(crate) struct Options {
    /// Only this operation; may be given again
    #[arg(long)]
    operation: Vec<Operation>,
    /// Where to run
    #[arg(long, default_value = "all")]
    device: DeviceOption,
    /// Only cases whose name contains this, such as `ResNet-50` or `K4/bf16`; may be given again
    #[arg(long, value_name = "FILTER")]
    case: Vec<String>,
    /// Only implementations of this name or kind (limit, ours, baseline); may be given again
    #[arg(long, value_name = "FILTER")]
    implementation: Vec<String>,
    /// Only the cases of the summary
    #[arg(long)]
    quick: bool,
    /// Check and time every implementation once on tiny inputs; such times mean nothing
    #[arg(long)]
    test: bool,
    /// Append raw results to this file; needs one device
    #[arg(long, value_name = "FILE")]
    results: Option<PathBuf>,
    /// Start no case after this many seconds
    #[arg(long, value_name = "SECONDS")]
    budget: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceOption {
    Cpu,
    Cuda,
    All,
}

/// Executions in a round, at most.
const MOST_REPEATS: usize = 1 << 16;
/// Input sets at most. Sets that still fit into a GPU's cache are so small that their launch takes longer than reading
/// them.
const MOST_SETS: usize = 256;
/// A baseline that takes this many seconds has `SLOW_ROUNDS`: so large a ratio needs no better estimate.
const SLOW: f64 = 0.4;
const SLOW_ROUNDS: usize = 3;

#[cfg(feature = "cuda")]
fn cuda() -> Result<Cuda, String> {
    Cuda::new().map_err(|reason| format!("no CUDA device: {reason:#}"))
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Result<Cuda, String> {
    Err("this program was built without the CUDA backend: add `--features cuda` before the `--` of cargo run".into())
}

pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(options.results.is_none() || options.device != DeviceOption::All, "--results needs --device cpu or cuda");
    options.results.as_deref().map_or(Ok(()), crate::results::check)?;
    let cases = options.cases()?;
    let cpu = (options.device != DeviceOption::Cuda).then_some(crate::cpu::Cpu);
    let cuda = match (options.device != DeviceOption::Cpu).then(cuda).transpose() {
        Ok(cuda) => cuda,
        Err(reason) => {
            let required = std::env::var("GRADBLEND_REQUIRE_CUDA").is_ok_and(|value| value == "1");
            ensure!(options.device == DeviceOption::All && !required, "{reason}");
            println!("cuda: skipped: {reason}");
            None
        }
    };
    for filter in &options.implementation {
        let known = cpu.as_ref().is_some_and(|cpu| options.selects(filter, &cases, cpu))
            || cuda.as_ref().is_some_and(|cuda| options.selects(filter, &cases, cuda));
        ensure!(known, "no implementation of these cases has the name or kind {filter:?}");
    }
    cpu.map_or(Ok(()), |cpu| run_on(options, &cases, &cpu))?;
    cuda.map_or(Ok(()), |cuda| run_on(options, &cases, &cuda))
}

fn run_on<B: Backend>(options: &Options, cases: &[Case], backend: &B) -> Result<()> {
    let machine = backend.machine();
    println!("{}: {}", machine.device, machine.name);
    let mut log = Log::open(options.results.as_deref(), machine)?;
    let start = Instant::now();
    for case in cases {
        let over = options.budget.is_some_and(|budget| start.elapsed() >= Duration::from_secs(budget));
        let measurement = Measurement { options, backend, case };
        if over {
            measurement.skip(&mut log, None, None, "the budget is spent")?;
        } else {
            measurement.run(&mut log).with_context(|| case.to_string())?;
        }
    }
    Ok(())
}

impl Options {
    /// The cases that are asked for.
    fn cases(&self) -> Result<Vec<Case>> {
        let mut cases = match (self.test, self.quick) {
            (true, _) => case::test_cases(),
            (false, true) => case::quick_cases(),
            (false, false) => case::full_cases(),
        };
        for filter in &self.case {
            let known = cases.iter().any(|case| case.to_string().contains(filter));
            ensure!(known, "no case has a name that contains {filter:?}");
        }
        cases.retain(|case| self.case.is_empty() || self.case.iter().any(|filter| case.to_string().contains(filter)));
        Ok(cases)
    }

    fn operations(&self) -> impl Iterator<Item = Operation> {
        Operation::ALL.into_iter().filter(|one| self.operation.is_empty() || self.operation.contains(one))
    }

    /// Whether a backend has an implementation of this name or kind.
    fn selects<B: Backend>(&self, filter: &str, cases: &[Case], backend: &B) -> bool {
        let entries =
            |case: &Case| self.operations().flat_map(|one| backend.entries(one, case.dtype)).collect::<Vec<_>>();
        cases.iter().flat_map(entries).any(|entry| entry.is(filter))
    }
}

/// A case on a backend.
struct Measurement<'a, B> {
    options: &'a Options,
    backend: &'a B,
    case: &'a Case,
}

/// An implementation in the rounds.
struct Running<I> {
    implementation: Box<dyn Implementation<I>>,
    rounds: usize,
    time: Time,
}

impl<B: Backend> Measurement<'_, B> {
    fn run(&self, log: &mut Log) -> Result<()> {
        let elements: usize = self.case.tensors()?.iter().map(|tensor| tensor.len).sum();
        let needed = elements as u64 * self.case.dtype.bytes() * (self.case.modalities as u64 + 3);
        let free = self.backend.free_bytes()?;
        if needed > free {
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            let reason = format!("needs {:.1} GB; {:.1} GB are free", gigabytes(needed), gigabytes(free));
            return self.skip(log, None, None, &reason);
        }
        let inputs = Inputs::new(self.case)?;
        let exact = with_dtype!(self.case.dtype, T => oracle::exact::<T>(&inputs));
        let weights = inputs.weights.clone();
        let mut inputs = match self.backend.load(inputs, if self.options.test { 2 } else { MOST_SETS }) {
            Ok(inputs) => inputs,
            Err(reason) => return self.skip(log, None, None, &format!("{reason:#}")),
        };
        for operation in self.options.operations() {
            log.write(&Record::Case(self.record(operation, &weights, &exact)?))?;
            let mut running = self.check_all(operation, &mut inputs, &exact, log)?;
            self.rounds(&mut inputs, &mut running)?;
            self.print(operation, &running)?;
            for one in running {
                log.write(&Record::Time(one.time))?;
            }
        }
        Ok(())
    }

    /// The implementations whose results are right.
    fn check_all(
        &self,
        operation: Operation,
        inputs: &mut B::Inputs,
        exact: &Exact,
        log: &mut Log,
    ) -> Result<Vec<Running<B::Inputs>>> {
        let wanted = |entry: &Entry<_>| {
            let filters = &self.options.implementation;
            filters.is_empty() || filters.iter().any(|filter| entry.is(filter))
        };
        let mut running = Vec::new();
        for entry in self.backend.entries(operation, self.case.dtype).into_iter().filter(wanted) {
            match self.check(&entry, operation, inputs, exact) {
                Ok(one) => running.push(one),
                // A baseline that fails is worth a record, and no reason to measure nothing.
                Err(reason) if entry.kind == Kind::Baseline && !self.options.test => {
                    self.skip(log, Some(operation), Some(entry.name), &format!("{reason:#}"))?;
                }
                // A test must not fail where a vendor's library is missing.
                Err(reason) if reason.is::<Missing>() => {
                    self.skip(log, Some(operation), Some(entry.name), &reason.to_string())?;
                }
                Err(reason) => return Err(reason.context(format!("{operation}, {}", entry.name))),
            }
        }
        Ok(running)
    }

    fn check(
        &self,
        entry: &Entry<B::Inputs>,
        operation: Operation,
        inputs: &mut B::Inputs,
        exact: &Exact,
    ) -> Result<Running<B::Inputs>> {
        let (backend, case) = (self.backend, self.case);
        backend.poison(inputs)?;
        let (mut implementation, extra_bytes) = backend.prepare(entry, operation, inputs)?;
        let mut errors = Errors::default();
        if let Some(bound) = entry.bound {
            let sums = if operation.dots() { implementation.sums(inputs)? } else { None };
            let host = backend.host(inputs)?;
            errors = with_dtype!(case.dtype, T => oracle::check::<T>(host, operation, exact, sums.as_ref(), bound))?;
        }
        implementation.prepare_sets(inputs)?;
        let time = Time {
            operation,
            case: case.to_string(),
            implementation: entry.name.into(),
            kind: entry.kind,
            times_ns: Vec::new(),
            repeats: 1,
            sets: backend.sets(inputs),
            host_ns: None,
            extra_bytes: entry.bound.map(|_| extra_bytes),
            errors,
        };
        Ok(Running { implementation, rounds: B::ROUNDS, time })
    }

    /// Times the implementations one after another, again and again, so that whatever slows the machine for a while
    /// slows all of them.
    fn rounds(&self, inputs: &mut B::Inputs, running: &mut [Running<B::Inputs>]) -> Result<()> {
        let round = if self.options.test { 0.0 } else { B::ROUND.as_secs_f64() };
        let most = if self.options.test { 1 } else { B::ROUNDS };
        for one in running.iter_mut() {
            // The implementation is warm; a few executions tell how many make a round.
            let mut repeats = 1;
            let mut seconds = self.backend.time(one.implementation.as_mut(), inputs, repeats)?;
            while seconds * (repeats as f64) < round / 4.0 && repeats < MOST_REPEATS {
                repeats *= 4;
                seconds = self.backend.time(one.implementation.as_mut(), inputs, repeats)?;
            }
            one.time.repeats = ((round / seconds).ceil() as usize).clamp(1, MOST_REPEATS);
            let slow = seconds > SLOW && one.time.kind == Kind::Baseline;
            one.rounds = if slow { most.min(SLOW_ROUNDS) } else { most };
        }
        let nanoseconds = |seconds: f64| (seconds * 1e10).round() / 10.0;
        for round in 0..most {
            // Each round starts with another implementation, so that none always follows the same one.
            for nth in 0..running.len() {
                let next = (round + nth) % running.len();
                let Running { implementation, rounds, time } = &mut running[next];
                if round >= *rounds {
                    continue;
                }
                let seconds = self.backend.time(implementation.as_mut(), inputs, time.repeats)?;
                time.times_ns.push(nanoseconds(seconds));
                if let Some(seconds) = self.backend.host_time(implementation.as_mut(), inputs)? {
                    time.host_ns.get_or_insert_default().push(nanoseconds(seconds));
                }
            }
        }
        Ok(())
    }

    fn record(&self, operation: Operation, weights: &[f32], exact: &Exact) -> Result<CaseRecord> {
        let tensors = self.case.tensors()?;
        let sums = |sums: &Vec<f64>| if operation.dots() { sums.clone() } else { Vec::new() };
        Ok(CaseRecord {
            operation,
            case: self.case.to_string(),
            shapes: self.case.shapes.clone(),
            modalities: self.case.modalities,
            dtype: self.case.dtype.to_string(),
            misaligned: self.case.misaligned,
            tensors: tensors.len(),
            bytes: case::minimum_traffic(&tensors, self.case.dtype, operation),
            weights: weights.to_vec(),
            c: sums(&exact.c),
            d: sums(&exact.d),
            c_size: sums(&exact.c_size),
            d_size: sums(&exact.d_size),
        })
    }

    /// Records for each operation, or for one, why nothing was measured.
    fn skip(
        &self,
        log: &mut Log,
        operation: Option<Operation>,
        implementation: Option<&str>,
        reason: &str,
    ) -> Result<()> {
        let case = self.case.to_string();
        for operation in self.options.operations().filter(|one| operation.is_none_or(|only| only == *one)) {
            println!("{operation:<6}{case:<28}{} skipped: {reason}", implementation.unwrap_or("all"));
            let (case, implementation, reason) = (case.clone(), implementation.map(str::to_owned), reason.to_owned());
            log.write(&Record::Skipped(Skipped { operation, case, implementation, reason }))?;
        }
        Ok(())
    }

    /// One line; the report has the rest.
    fn print(&self, operation: Operation, running: &[Running<B::Inputs>]) -> Result<()> {
        let case = self.case.to_string();
        if self.options.test {
            let checked = running.iter().filter(|one| one.time.kind != Kind::Limit);
            let names: Vec<&str> = checked.map(|one| one.time.implementation.as_str()).collect();
            println!("{operation:<6}{case:<28}right: {}", names.join("; "));
            return Ok(());
        }
        let bytes = case::minimum_traffic(&self.case.tensors()?, self.case.dtype, operation);
        let of = |kind| running.iter().filter(move |one| one.time.kind == kind).map(|one| &one.time);
        let median = |time: &Time| crate::results::median(&time.times_ns).unwrap_or(f64::NAN);
        let limit = of(Kind::Limit).map(median).fold(f64::NAN, f64::min);
        let ours = of(Kind::Ours).map(median).next().unwrap_or(f64::NAN);
        let gigabytes = |nanoseconds: f64| bytes as f64 / nanoseconds;
        print!("{operation:<6}{case:<28}limit {:>7.1} GB/s, gradblend {:>7.1} GB/s", gigabytes(limit), gigabytes(ours));
        for time in of(Kind::Baseline) {
            print!(", {:.1}x over {}", median(time) / ours, time.implementation);
        }
        println!();
        Ok(())
    }
}
