//! Raw results: one JSON object a line. `record` says which kind; the fields of a kind are those of its type below.
#![warn(clippy::missing_docs_in_private_items)]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::case::{Operation, Shapes};

/// A line of the file.
#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase")]
pub(crate) enum Record {
    /// `run`: a program started.
    Run(Run),
    /// `case`: it starts to measure an operation on a case.
    Case(CaseRecord),
    /// `time`: it has measured an implementation of that operation on that case.
    Time(Time),
    /// `skipped`: it has not.
    Skipped(Skipped),
}

/// One run of a program. The records up to the next one belong to it.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    /// When it started, in UTC, such as `2026-01-02T03:04:05Z`.
    pub(crate) date: String,
    /// Of the measured source: `git describe --always`, with `-dirty` where tracked files differ from it.
    pub(crate) commit: String,
    /// The command line. The report takes its first word for the program's name.
    pub(crate) command: String,
    /// Its fields are fields of this record.
    #[serde(flatten)]
    pub(crate) machine: Machine,
}

/// Where implementations run.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// `cpu` or `cuda`.
    pub(crate) device: String,
    /// Name of the processor with its number of threads, or of the GPU.
    pub(crate) name: String,
    /// Versions of the GPU's driver and of CUDA. Null on the CPU.
    pub(crate) driver: Option<String>,
    /// Bytes of the GPU's second-level cache. Null on the CPU.
    pub(crate) cache_bytes: Option<u64>,
    /// Versions of the compiler or of the libraries that are compared with.
    pub(crate) software: String,
}

/// An operation on a case, with all that another program needs to make the same inputs and to check its results.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct CaseRecord {
    /// `dot`, `blend` or `step`.
    pub(crate) operation: Operation,
    /// Name of the case.
    pub(crate) case: String,
    /// Lengths of the tensors: `{"flat": LENGTH}`, `{"equal": {"count": COUNT, "len": LENGTH}}`, or `{"model": NAME}` for
    /// a network of shapes.json.
    pub(crate) shapes: Shapes,
    /// K.
    pub(crate) modalities: usize,
    /// `f32`, `f16` or `bf16`.
    pub(crate) dtype: String,
    /// Whether tensors start one element after an aligned address.
    pub(crate) misaligned: bool,
    /// Number of tensors.
    pub(crate) tensors: usize,
    /// Bytes of the minimum traffic.
    pub(crate) bytes: u64,
    /// The K weights of the blend.
    pub(crate) weights: Vec<f32>,
    /// The K sums c_k, computed by naive loops in f64. Empty for `blend`, like the next three.
    pub(crate) c: Vec<f64>,
    /// The K sums d_k.
    pub(crate) d: Vec<f64>,
    /// The sum of the absolute terms of each c_k: sum |g v_k|.
    pub(crate) c_size: Vec<f64>,
    /// The sum of the absolute terms of each d_k: sum |(t - g) v_k|.
    pub(crate) d_size: Vec<f64>,
}

/// What an implementation is measured for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Moves the bytes of the minimum traffic and does nothing else.
    Limit,
    /// gradblend.
    Ours,
    /// Computes the same results by other means.
    Baseline,
}

/// The times of one implementation.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Time {
    /// As in the `case` record.
    pub(crate) operation: Operation,
    /// Name of the case, as in its `case` record.
    pub(crate) case: String,
    /// Name of the implementation. The report takes its first word for the library's name.
    pub(crate) implementation: String,
    /// `limit`, `ours` or `baseline`.
    pub(crate) kind: Kind,
    /// Nanoseconds of one execution of the operation, a number for each round.
    pub(crate) times_ns: Vec<f64>,
    /// Executions in a round.
    pub(crate) repeats: usize,
    /// Input sets that executions take in turn.
    pub(crate) sets: usize,
    /// On a GPU: nanoseconds that one call takes on the host, which does not synchronize, a number for each round. Null
    /// on the CPU and from PyTorch.
    pub(crate) host_ns: Option<Vec<f64>>,
    /// Bytes of the peak memory beside the buffers of the case. Null for a limit and from PyTorch on the CPU.
    pub(crate) extra_bytes: Option<u64>,
    /// Its fields are fields of this record.
    #[serde(flatten)]
    pub(crate) errors: Errors,
}

/// The largest errors of the results, relative to the sum of the absolute terms. Null where the operation has no such
/// result, and for a limit.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Errors {
    /// Of the c_k.
    pub(crate) error_c: Option<f64>,
    /// Of the d_k.
    pub(crate) error_d: Option<f64>,
    /// Of the elements of the blended gradient; relative to 2^-12 where the sum of the absolute terms is smaller.
    pub(crate) error_blend: Option<f64>,
}

/// An implementation that was not measured.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Skipped {
    /// As in a `case` record.
    pub(crate) operation: Operation,
    /// Name of the case.
    pub(crate) case: String,
    /// Name of the implementation. Null: none was measured.
    pub(crate) implementation: Option<String>,
    /// Why, as an English phrase.
    pub(crate) reason: String,
}

/// Appends records to a file, if there is one.
pub(crate) struct Log(Option<(PathBuf, File)>);

impl Log {
    /// Opens the file and appends the `run` record of this program.
    pub(crate) fn open(path: Option<&Path>, machine: Machine) -> Result<Self> {
        let Some(path) = path else { return Ok(Log(None)) };
        let context = || path.display().to_string();
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(context)?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path).with_context(context)?;
        // After a line that is cut off, the next record gets a line of its own. A pipe has no lines before.
        let before = if path.is_file() { fs::read(path).with_context(context)? } else { Vec::new() };
        if before.last().is_some_and(|last| *last != b'\n') {
            writeln!(file).with_context(context)?;
        }
        let mut log = Log(Some((path.to_owned(), file)));
        let date = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let features = if cfg!(feature = "cuda") { " --features cuda" } else { "" };
        let command = format!("cargo run --release -p gradblend-lab{features} -- {}", arguments.join(" "));
        log.write(&Record::Run(Run { date, commit: commit(), command, machine }))?;
        Ok(log)
    }

    /// Appends a record.
    pub(crate) fn write(&mut self, record: &Record) -> Result<()> {
        if let Some((path, file)) = &mut self.0 {
            let line = serde_json::to_string(record)?;
            writeln!(file, "{line}").with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

/// The commit, as `GRADBLEND_COMMIT` names it where there is no repository. New results do not make a tree dirty: they
/// change nothing that is measured.
fn commit() -> String {
    if let Ok(given) = std::env::var("GRADBLEND_COMMIT") {
        return given;
    }
    let Some(commit) = output("git", &["describe", "--always"]) else { return "unknown".into() };
    let unchanged = ["diff", "--quiet", "HEAD", "--", ".", ":!benches/results"];
    let dirty = Command::new("git").args(unchanged).status().is_ok_and(|status| !status.success());
    if dirty { commit + "-dirty" } else { commit }
}

/// What a command prints, if it exists and succeeds.
pub(crate) fn output(command: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(command).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}
