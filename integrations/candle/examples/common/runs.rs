//! Runs in parallel, with a bar that shows the time left. Each result is on disk as soon as it is there.

use std::fs::File;
use std::io::Write;
use std::num::NonZero;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Whether Ctrl-C was pressed.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The main function of an example. After Ctrl-C the exit code is 130, as that of programs which it ends.
pub(crate) fn main<T>(compare: impl FnOnce() -> Result<T>) -> ExitCode {
    multiply_on_one_thread();
    sigpipe::reset(); // the end of `example | head` is no panic
    match catch_interrupts().and_then(|()| compare()) {
        Ok(_) if interrupted() => ExitCode::from(130),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The threads that are wanted, or one per processor.
pub(crate) fn threads(wanted: Option<usize>) -> usize {
    wanted.or(thread::available_parallelism().ok().map(NonZero::get)).unwrap_or(1)
}

/// Makes candle multiply matrices on the thread of the run: more threads for one product take three times as long as the
/// same runs side by side. To be called before the program has another thread.
fn multiply_on_one_thread() {
    const THREADS: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        // SAFETY: the program has one thread, so no other reads or writes the environment.
        unsafe { std::env::set_var(THREADS, "1") };
    }
}

/// Lets Ctrl-C end the runs, but not the program, which then shows the results that it has.
fn catch_interrupts() -> Result<()> {
    let handler = || {
        // Who presses it twice does not want to wait.
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    };
    Ok(ctrlc::set_handler(handler)?)
}

pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// A file of results: a line of JSON about the program, then a line for each run.
pub(crate) struct Log(Mutex<File>);

#[derive(Serialize)]
struct Program {
    command: String,
    commit: String,
    machine: String,
    date: String,
}

impl Log {
    /// Replaces the file.
    pub(crate) fn create(path: &Path, threads: usize) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let log = Log(Mutex::new(file));
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = text.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
        let arguments = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        log.write(&Program {
            command: format!("cargo run --release --example {} -- {arguments}", env!("CARGO_CRATE_NAME")),
            commit: commit(),
            machine: format!("{}, {threads} threads", model.unwrap_or(std::env::consts::ARCH).trim()),
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        })?;
        Ok(log)
    }

    fn write(&self, value: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(value)? + "\n";
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(line.as_bytes()).context("cannot write the results of a run")
    }
}

/// The commit of the sources, with `-dirty` where files of the repository have changed.
fn commit() -> String {
    let mut git = Command::new("git");
    let output = git.args(["describe", "--always", "--dirty"]).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    output
        .ok()
        .filter(|output| output.status.success())
        .map_or("unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Does all jobs, `threads` at a time, and returns their results in order. Which thread does a job, and when, has no effect
/// on results. A job calls its second argument for each of its `steps`; after Ctrl-C that is an error, and the results of
/// the jobs that were not finished are missing.
pub(crate) fn run_all<J: Sync, R: Serialize + Send>(
    jobs: &[J],
    steps: u64,
    threads: usize,
    log: &Log,
    name: impl Fn(&J) -> String + Sync,
    work: impl Fn(&J, &dyn Fn() -> Result<()>) -> Result<R> + Sync,
) -> Result<Vec<Option<R>>> {
    let bar = ProgressBar::new(jobs.len() as u64 * steps);
    bar.set_style(ProgressStyle::with_template("{msg:40!} {wide_bar} {percent:>3} %  {elapsed} elapsed, {eta} left")?);
    let next = AtomicUsize::new(0);
    let step = || {
        bar.inc(1);
        ensure!(!interrupted(), "interrupted");
        Ok(())
    };
    let work = || -> Result<Vec<(usize, R)>> {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(at).filter(|_| !interrupted()) else { return Ok(done) };
            bar.set_message(name(job));
            match work(job, &step).and_then(|result| log.write(&result).map(|()| result)) {
                Ok(result) => done.push((at, result)),
                Err(_) if interrupted() => return Ok(done),
                Err(error) => {
                    // No other run has to start.
                    next.store(jobs.len(), Ordering::Relaxed);
                    return Err(error.context(name(job)));
                }
            }
        }
    };
    let done: Result<Vec<_>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(jobs.len())).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    bar.finish_and_clear();
    let mut results: Vec<Option<R>> = jobs.iter().map(|_| None).collect();
    for (at, result) in done?.into_iter().flatten() {
        results[at] = Some(result);
    }
    Ok(results)
}

/// The position and the results of each seed of which all `of_seed` results are there: methods are compared seed by seed.
/// An error if there is none, which names the file that has the other results.
pub(crate) fn complete<'a, R>(
    results: &'a [Option<R>],
    of_seed: usize,
    log: &Path,
) -> Result<Vec<(usize, Vec<&'a R>)>> {
    let seeds = results.chunks(of_seed).map(|of| of.iter().map(Option::as_ref).collect());
    let complete: Vec<(usize, Vec<&R>)> =
        seeds.enumerate().filter_map(|(nth, of): (_, Option<_>)| Some((nth, of?))).collect();
    let path = log.display();
    ensure!(!complete.is_empty(), "interrupted before all runs of a seed were done; those that were are in {path}");
    Ok(complete)
}
