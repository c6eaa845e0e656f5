//! Raw results: one JSON object a line, tagged by `record`. benches/README.md describes the fields.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::case::{Operation, Shapes};

#[derive(Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase")]
pub(crate) enum Record {
    Run(Run),
    Case(CaseRecord),
    Time(Time),
    Skipped(Skipped),
}

/// One run of a program. The records up to the next one belong to it.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) date: String,
    pub(crate) commit: String,
    pub(crate) command: String,
    #[serde(flatten)]
    pub(crate) machine: Machine,
}

/// Where implementations run.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// `cpu` or `cuda`.
    pub(crate) device: String,
    /// Of the processor, or of the GPU.
    pub(crate) name: String,
    /// Versions of the GPU's driver.
    pub(crate) driver: Option<String>,
    /// Bytes of a GPU's second-level cache.
    pub(crate) cache_bytes: Option<u64>,
    pub(crate) software: String,
}

/// An operation on a case, with all that another program needs to make the same inputs and to check its results.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct CaseRecord {
    pub(crate) operation: Operation,
    pub(crate) case: String,
    pub(crate) shapes: Shapes,
    pub(crate) modalities: usize,
    pub(crate) dtype: String,
    pub(crate) misaligned: bool,
    pub(crate) tensors: usize,
    /// Minimum traffic.
    pub(crate) bytes: u64,
    pub(crate) weights: Vec<f32>,
    /// The exact sums, and those of their absolute terms.
    pub(crate) c: Vec<f64>,
    pub(crate) d: Vec<f64>,
    pub(crate) c_size: Vec<f64>,
    pub(crate) d_size: Vec<f64>,
}

/// What an implementation is measured for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Moves the bytes of the minimum traffic and does nothing else.
    Limit,
    Ours,
    Baseline,
}

/// The times of one implementation.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Time {
    pub(crate) operation: Operation,
    pub(crate) case: String,
    pub(crate) implementation: String,
    pub(crate) kind: Kind,
    /// Nanoseconds of one execution of the operation, a number for each round.
    pub(crate) times_ns: Vec<f64>,
    /// Executions in a round.
    pub(crate) repeats: usize,
    /// Input sets that executions take in turn.
    pub(crate) sets: usize,
    /// On a GPU: the same by the host's clock, without waiting for the device.
    pub(crate) host_ns: Option<Vec<f64>>,
    /// Peak memory beside the buffers of the case.
    pub(crate) extra_bytes: Option<u64>,
    #[serde(flatten)]
    pub(crate) errors: Errors,
}

/// The largest error of a result, relative to the sum of the absolute terms.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Errors {
    pub(crate) error_c: Option<f64>,
    pub(crate) error_d: Option<f64>,
    pub(crate) error_blend: Option<f64>,
}

#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Skipped {
    pub(crate) operation: Operation,
    pub(crate) case: String,
    /// None: all of them.
    pub(crate) implementation: Option<String>,
    pub(crate) reason: String,
}

/// Appends records to a file, if there is one.
pub(crate) struct Log(Option<File>);

impl Log {
    pub(crate) fn open(path: Option<&Path>, machine: Machine) -> Result<Self> {
        let Some(path) = path else { return Ok(Log(None)) };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        let mut log = Log(Some(file.with_context(|| path.display().to_string())?));
        let date = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let features = if cfg!(feature = "cuda") { " --features cuda" } else { "" };
        let command = format!("cargo run --release -p gradblend-lab{features} -- {}", arguments.join(" "));
        log.write(&Record::Run(Run { date, commit: commit(), command, machine }))?;
        Ok(log)
    }

    pub(crate) fn write(&mut self, record: &Record) -> Result<()> {
        if let Some(file) = &mut self.0 {
            writeln!(file, "{}", serde_json::to_string(record)?)?;
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
