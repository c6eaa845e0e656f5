//! What the three benchmarks share: cases, inputs, contenders, the oracle that checks each of them first, and turns.

mod cases;
mod cpu;
#[cfg(feature = "bench-cuda")]
mod cuda;
mod heap;
mod lists;
mod naive;
mod options;
mod oracle;
mod ours;
mod record;

use std::error::Error;
use std::time::{Duration, Instant};

use clap::Parser;
use gradblend::{DType, bf16, f16};

use cases::Case;
use lists::Lists;
use naive::Naive;
use options::{Device, Options};
use oracle::{Bound, Errors, Sums};
use record::{Log, Machine};

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

    /// Lists that take part where none is absent.
    fn lists(self, modalities: usize) -> usize {
        modalities + if self.dots() { 2 } else { 0 } + usize::from(self.blends())
    }
}

/// Which part of the work is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Every contender once, on tiny inputs.
    Test,
    /// A few large cases.
    Quick,
    /// Everything.
    Full,
}

/// What a contender is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Moves the bytes and does nothing else, the fastest way that was found.
    Limit,
    Ours,
    Peer,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Limit => "limit",
            Role::Ours => "ours",
            Role::Peer => "peer",
        }
    }
}

/// A way of doing an operation on inputs `I`.
pub(crate) trait Way<I> {
    /// Does it once, on one set of the inputs. On a device that means putting the work on its stream.
    fn run(&mut self, inputs: &mut I, set: usize);

    /// Makes it ready for the other sets, once its memory was measured on the first.
    fn ready(&mut self, _inputs: &mut I) -> Result<(), String> {
        Ok(())
    }

    /// The sums, once `run` was called for the first time and is done. None if it has none.
    fn sums(&mut self, _inputs: &mut I) -> Option<Sums> {
        None
    }
}

/// A way that is ready, or why it cannot be, such as that there is not enough memory.
type Made<I> = Result<Box<dyn Way<I>>, String>;

/// Who may be timed.
pub(crate) struct Contender<I> {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    /// None if it has no result to check.
    pub(crate) bound: Option<Bound>,
    pub(crate) make: fn(&mut I) -> Made<I>,
}

/// Where contenders run.
pub(crate) trait Place<T: Naive> {
    /// The inputs of a case, where they are worked on.
    type Inputs;
    const ROUNDS: usize;
    /// A turn is at least so long.
    const TURN: Duration;

    fn machine(&self) -> Machine;
    /// Threads that work on a case.
    fn threads(&self, case: &Case) -> usize;
    /// Bytes that are left for a case, of those whose lists are made on the host, too.
    fn free(&self) -> u64;
    /// Puts the lists there, in so many sets at the most.
    fn load(
        &self,
        operation: Operation,
        case: &Case,
        lists: Lists<T>,
        weights: Vec<f32>,
        most: usize,
    ) -> Result<Self::Inputs, String>;
    fn contenders(&self, operation: Operation, case: &Case) -> Vec<Contender<Self::Inputs>>;
    fn sets(&self, inputs: &Self::Inputs) -> usize;
    /// The lists on the host, with the blended gradient that was written to the first set, or before it is.
    fn lists<'a>(&self, inputs: &'a mut Self::Inputs) -> &'a Lists<T>;
    /// Puts a number into the blended gradient that no way leaves there.
    fn poison(&self, inputs: &mut Self::Inputs);
    /// Makes a way and runs it once on the first set; also says by how many bytes memory grew meanwhile, at the most.
    fn prepare(&self, contender: &Contender<Self::Inputs>, inputs: &mut Self::Inputs) -> (Made<Self::Inputs>, u64);
    /// Seconds of a run, of so many in a row.
    fn seconds(&self, way: &mut dyn Way<Self::Inputs>, inputs: &mut Self::Inputs, repeats: usize) -> f64;
    /// Seconds that a call takes of the host, where that is another matter, taken so many times at the most.
    fn host(
        &self,
        measured: &Measured,
        way: &mut dyn Way<Self::Inputs>,
        inputs: &mut Self::Inputs,
        most: usize,
    ) -> Option<Vec<f64>>;
    /// Launches and allocations of a run, as far as they can be known.
    fn counts(&self, role: Role, way: &mut dyn Way<Self::Inputs>, inputs: &mut Self::Inputs) -> [Option<u64>; 2];
}

/// What was found out about a contender.
pub(crate) struct Measured {
    name: &'static str,
    role: Role,
    errors: Errors,
    extra_bytes: u64,
    launches: Option<u64>,
    allocations: Option<u64>,
    host: Option<Vec<f64>>,
    sets: usize,
    repeats: usize,
    seconds: Vec<f64>,
}

/// Measures an operation, as the command line says.
///
/// # Panics
/// If a contender's result is wrong, or a device fails: nobody is there to hand an error to.
pub(crate) fn run(operation: Operation) {
    let options = Options::parse();
    if let Err(error) = run_with(operation, &options) {
        eprintln!("Error: {error}");
        std::process::exit(1);
    }
}

fn run_with(operation: Operation, options: &Options) -> Result<(), Box<dyn Error>> {
    if options.device != Some(Device::Cuda) {
        everywhere(operation, options, &cpu::Cpu)?;
    }
    if options.device == Some(Device::Cpu) {
        return Ok(());
    }
    #[cfg(feature = "bench-cuda")]
    {
        match cuda::Cuda::find() {
            Ok(cuda) => return everywhere(operation, options, &cuda),
            Err(reason) => println!("skipped: no CUDA device: {reason}"),
        }
        if std::env::var("GRADBLEND_REQUIRE_CUDA").is_ok_and(|value| value == "1") {
            return Err("GRADBLEND_REQUIRE_CUDA is 1, and there is no CUDA device".into());
        }
    }
    if options.device == Some(Device::Cuda) {
        return Err("no CUDA device; is this built with --features bench-cuda?".into());
    }
    Ok(())
}

/// Measures all cases at a place.
fn everywhere<P>(operation: Operation, options: &Options, place: &P) -> Result<(), Box<dyn Error>>
where
    P: Place<f32> + Place<f16> + Place<bf16>,
{
    let extent = options.extent();
    let cases = options.wanted(cases::cases(extent))?;
    let machine = Place::<f32>::machine(place);
    println!("{} on {}", operation.name(), machine.name);
    let mut log = match (extent, &options.results) {
        (Extent::Test, None) => Log::none(operation),
        (_, path) => Log::open(path.as_deref(), operation, &machine)?,
    };
    let began = Instant::now();
    let on_gpu = machine.device == "cuda";
    // One thread or all is a question of the CPU.
    let cases = cases.into_iter().filter(|case| !(on_gpu && case.threads == 1));
    for case in cases {
        if options.budget.is_some_and(|budget| began.elapsed() >= Duration::from_secs(budget)) {
            log.skipped(&case, None, "out of time")?;
            continue;
        }
        match case.dtype {
            DType::F32 => measure::<f32, P>(operation, options, &case, place, &mut log)?,
            DType::F16 => measure::<f16, P>(operation, options, &case, place, &mut log)?,
            DType::BF16 => measure::<bf16, P>(operation, options, &case, place, &mut log)?,
        }
    }
    if let Some(path) = log.path() {
        println!("raw results: {}", path.display());
    }
    Ok(())
}

/// Checks all contenders on a case, then times them in turns.
fn measure<T: Naive, P: Place<T>>(
    operation: Operation,
    options: &Options,
    case: &Case,
    place: &P,
    log: &mut Log,
) -> Result<(), Box<dyn Error>> {
    let extent = options.extent();
    let wanted = |contender: &Contender<P::Inputs>| options.wants(contender.name, contender.role);
    let contenders: Vec<_> = place.contenders(operation, case).into_iter().filter(wanted).collect();
    if contenders.is_empty() {
        return Err(format!("{case}: no contender is of a name or role that --only gives").into());
    }
    let (needed, free) = (case.memory(operation), place.free());
    if needed > free {
        let reason = format!("needs {:.1} GB, of which {:.1} GB are free", needed as f64 / 1e9, free as f64 / 1e9);
        return Ok(log.skipped(case, None, &reason)?);
    }
    let weights: Vec<f32> = (0..case.modalities).map(|k| 0.125 + k as f32 / 16.0).collect();
    let lists = Lists::<T>::new(case, operation);
    let exact = oracle::exact(&lists);
    let sets = if extent == Extent::Test { 2 } else { MOST_SETS };
    let mut inputs = match place.load(operation, case, lists, weights.clone(), sets) {
        Ok(inputs) => inputs,
        Err(reason) => return Ok(log.skipped(case, None, &reason)?),
    };
    let mut ready = Vec::new();
    for contender in contenders {
        if contender.bound.is_some() {
            place.poison(&mut inputs);
        }
        let (made, extra_bytes) = place.prepare(&contender, &mut inputs);
        let mut way = match made {
            Ok(way) => way,
            Err(reason) if contender.role == Role::Ours => {
                return Err(format!("{case}, {}: {reason}", contender.name).into());
            }
            Err(reason) => {
                log.skipped(case, Some(contender.name), &reason)?;
                continue;
            }
        };
        let mut errors = Errors::default();
        if let Some(bound) = contender.bound {
            let got = if operation.dots() { way.sums(&mut inputs) } else { None };
            match oracle::check(place.lists(&mut inputs), &weights, &exact, got.as_ref(), bound) {
                Ok(found) => errors = found,
                // Somebody else's mistake is worth knowing, and no reason to measure nothing.
                Err(wrong) if contender.role == Role::Peer && extent != Extent::Test => {
                    log.skipped(case, Some(contender.name), &format!("wrong: {wrong}"))?;
                    continue;
                }
                Err(wrong) => return Err(format!("{case}, {}: {wrong}", contender.name).into()),
            }
        }
        way.ready(&mut inputs).map_err(|reason| format!("{case}, {}: {reason}", contender.name))?;
        let (name, role, sets) = (contender.name, contender.role, place.sets(&inputs));
        let [launches, allocations] = place.counts(role, way.as_mut(), &mut inputs);
        let (host, repeats, seconds) = (None, 1, Vec::new());
        let measured =
            Measured { name, role, errors, extra_bytes, launches, allocations, host, sets, repeats, seconds };
        ready.push((way, measured));
    }
    if extent == Extent::Test {
        let checked = ready.iter().filter(|(_, m)| m.role != Role::Limit);
        println!("{case}: right: {}", checked.map(|(_, m)| m.name).collect::<Vec<_>>().join("; "));
    }
    in_turns(place, &mut inputs, &mut ready, extent);
    log.case(case, place.threads(case), &weights, &exact)?;
    for (_, measured) in &ready {
        log.time(case, measured)?;
    }
    if extent != Extent::Test {
        let measured: Vec<&Measured> = ready.iter().map(|(_, measured)| measured).collect();
        print(case, case.bytes(operation), &measured);
    }
    Ok(())
}

type Ready<I> = (Box<dyn Way<I>>, Measured);

/// Times contenders one after another, again and again, so that whatever else the machine does hits all of them. In a
/// test, once, to see that it can be done.
fn in_turns<T: Naive, P: Place<T>>(place: &P, inputs: &mut P::Inputs, ready: &mut [Ready<P::Inputs>], extent: Extent) {
    /// A peer's run that takes so many seconds gets fewer turns: whoever is that slow is told apart by three.
    const SLOW: f64 = 0.4;
    let (turn, most) = if extent == Extent::Test { (0.0, 1) } else { (P::TURN.as_secs_f64(), P::ROUNDS) };
    let mut rounds = Vec::new();
    for (way, measured) in ready.iter_mut() {
        // Warm by now; a short look tells how many make a turn.
        let mut repeats = 1;
        let mut seconds = place.seconds(way.as_mut(), inputs, repeats);
        while seconds * (repeats as f64) < turn / 4.0 && repeats < MOST_REPEATS {
            repeats *= 4;
            seconds = place.seconds(way.as_mut(), inputs, repeats);
        }
        measured.repeats = ((turn / seconds).ceil() as usize).clamp(1, MOST_REPEATS);
        rounds.push(if seconds > SLOW && measured.role == Role::Peer { most.min(3) } else { most });
        measured.host = place.host(measured, way.as_mut(), inputs, most);
    }
    for round in 0..most {
        // Each round begins with another, so that none always follows the same one.
        for turn in 0..ready.len() {
            let at = (round + turn) % ready.len();
            if round < rounds[at] {
                let (way, measured) = &mut ready[at];
                measured.seconds.push(place.seconds(way.as_mut(), inputs, measured.repeats));
            }
        }
    }
}

/// Runs in a turn, at the most.
const MOST_REPEATS: usize = 1 << 16;

/// Sets of inputs, at the most. Where these are small enough to stay in a GPU's cache, a launch takes longer than reading them.
const MOST_SETS: usize = 256;

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One line; the report has all there is.
fn print(case: &Case, bytes: u64, measured: &[&Measured]) {
    let time = |role: Role| measured.iter().filter(move |m| m.role == role).map(|m| median(&m.seconds));
    let limit = time(Role::Limit).fold(f64::NAN, f64::min);
    let ours = time(Role::Ours).next().unwrap_or(f64::NAN);
    let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
    let mut line = format!(
        "{:<32} {:>9.6} GB, limit {:>7.2} GB/s, gradblend {:>7.2} GB/s, share {:.2}",
        case.to_string(),
        bytes as f64 / 1e9,
        rate(limit),
        rate(ours),
        limit / ours
    );
    for m in measured.iter().filter(|m| m.role == Role::Peer) {
        line.push_str(&format!("; {:.1}x {}", median(&m.seconds) / ours, m.name));
    }
    println!("{line}");
}
