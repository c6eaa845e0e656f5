//! Runs itself under mpirun with 1, 2 and 4 processes. Every rank makes the checks, and the first that fails ends the run.
//!
//! ```sh
//! cargo test --test mpirun [-- CASE]
//! ```
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod agreement;
mod failure;
mod shards;
mod sums;

use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};
use std::{env, fs, panic, process, thread};

use gradblend::{Average, Config};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};

const K: usize = 3;
/// For a launch. The slowest takes a tenth of it on two cores.
const LIMIT: Duration = Duration::from_secs(180);

/// What a launch must come to.
enum End {
    /// All ranks end with status 0.
    Success,
    /// Each rank leaves a file in the folder that it is given, whatever the status: MPI takes an exit after a time-out, which
    /// cannot finalize MPI, for a failure.
    Verdicts,
    /// A status that is not 0.
    Failure,
}

type Case = (&'static str, fn(&SimpleCommunicator), End, &'static [usize]);
const CASES: [Case; 9] = [
    ("sums", sums::of_parts_are_sums_of_the_whole, End::Success, &[1, 2, 4]),
    ("states", sums::states_stay_equal, End::Success, &[1, 2, 4]),
    ("each", sums::observing_each_is_observing_in_order, End::Success, &[1, 2, 4]),
    ("nonfinite", agreement::ranks_with_nan_are_named, End::Success, &[1, 2, 4]),
    ("differ", agreement::ranks_that_differ_are_named, End::Success, &[1, 2, 4]),
    ("misuse", failure::misuse_is_an_error, End::Success, &[1, 2, 4]),
    ("first", failure::a_silent_rank_at_the_first_sum, End::Verdicts, &[2, 4]),
    ("later", failure::a_silent_rank_at_a_later_sum, End::Verdicts, &[2, 4]),
    ("death", failure::a_rank_dies, End::Failure, &[2, 4]),
];

fn main() {
    let argument = env::args().nth(1).unwrap_or_default();
    // Variables of Open MPI, of MPICH, and of PMIx.
    if ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"].iter().any(|name| env::var_os(name).is_some()) {
        run(&argument);
    } else if argument != "--list" {
        let chosen = |case: &&Case| argument.starts_with('-') || case.0.contains(&argument);
        for (name, _, end, counts) in CASES.iter().filter(chosen) {
            counts.iter().for_each(|&n| launch(name, end, n));
        }
    }
}

/// Makes the checks of one case on this rank.
fn run(name: &str) {
    let report = panic::take_hook();
    // A rank that unwinds would finalize MPI, and wait for the others there.
    panic::set_hook(Box::new(move |info| {
        report(info);
        process::exit(101);
    }));
    let universe = mpi::initialize().unwrap();
    let (_, case, ..) = CASES.iter().find(|case| case.0 == name).unwrap();
    case(&universe.world());
}

fn launch(name: &str, end: &End, n: usize) {
    let folder = env::temp_dir().join(format!("gradblend-mpi-{}-{name}-{n}", process::id()));
    fs::create_dir(&folder).unwrap();
    let (log, start) = (folder.with_extension("log"), Instant::now());
    let output = fs::File::create(&log).unwrap();
    let child = Command::new("mpirun")
        .args(["--oversubscribe", "-n", &n.to_string()])
        .arg(env::current_exe().unwrap())
        .args([Path::new(name), &folder])
        .envs(["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"].map(|name| (name, "1")))
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn();
    let status = wait(child.unwrap_or_else(|error| panic!("cannot start mpirun: {error}")));
    let verdicts = fs::read_dir(&folder).unwrap().count();
    fs::remove_dir_all(&folder).unwrap();
    let expected = match end {
        End::Success => status.is_some_and(|status| status.success()),
        End::Verdicts => status.is_some() && verdicts == n,
        End::Failure => status.is_some_and(|status| !status.success()) && verdicts == n,
    };
    // Of a launch that must fail, mpirun has much to say.
    if !expected {
        eprintln!("{}", fs::read_to_string(&log).unwrap());
    }
    fs::remove_file(&log).unwrap();
    let status = status.map_or("still running, and killed".to_owned(), |status| status.to_string());
    assert!(expected, "{name}, {n} processes: {status}, {verdicts} ranks passed");
    println!("{name}, {n} processes: ok, {:.1} s", start.elapsed().as_secs_f64());
}

/// The status, or none of a launch that ran past its time and was killed.
fn wait(mut child: Child) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(20));
    }
    // The ranks end when they lose the connection to mpirun.
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

/// A configuration whose decay is not the default, on one thread: there are as many processes as cores, or more.
fn config() -> Config {
    Config { average: Average::Ema { decay: 0.9 }, threads: 1, ..Config::new(K as u32) }
}

/// The numbers of all ranks, in their order, by an exchange that is not gradblend's.
fn all(world: &SimpleCommunicator, own: &[u8]) -> Vec<Vec<u8>> {
    let mut all = vec![0; own.len() * world.size() as usize];
    world.all_gather_into(own, &mut all[..]);
    all.chunks(own.len()).map(<[u8]>::to_vec).collect()
}

/// Fails unless `own` is the same on all ranks.
fn assert_same(world: &SimpleCommunicator, own: &[u8]) {
    for (rank, other) in all(world, own).iter().enumerate() {
        assert!(other == own, "ranks {rank} and {} differ", world.rank());
    }
}
