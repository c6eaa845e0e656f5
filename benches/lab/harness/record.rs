//! Raw results, a line each; benches/README.md says what they hold.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::cases::Case;
use super::oracle::{Errors, Exact};
use super::{Measured, Operation};

/// Where contenders run.
pub(crate) struct Machine {
    /// `cpu` or `cuda`.
    pub(crate) device: &'static str,
    pub(crate) name: String,
    /// CUDA version of the driver.
    pub(crate) driver: Option<String>,
    pub(crate) cache_bytes: Option<u64>,
    /// Besides this crate and the compiler.
    pub(crate) software: Option<String>,
}

/// What is written to; nothing in a test.
pub(crate) struct Log {
    file: Option<(File, PathBuf)>,
    operation: Operation,
}

impl Log {
    /// Appends to `path`, or to a file of the day.
    pub(crate) fn open(path: Option<&Path>, operation: Operation, machine: &Machine) -> std::io::Result<Self> {
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let path = path.map_or_else(
            || {
                PathBuf::from(format!(
                    "target/benches/{}-{}.jsonl",
                    now.split('T').next().unwrap_or(""),
                    machine.device
                ))
            },
            Path::to_path_buf,
        );
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let mut log = Log { file: Some((file, path)), operation };
        let rustc = output("rustc", &["--version"]).map_or(String::new(), |version| format!(", {version}"));
        let more = machine.software.as_ref().map_or(String::new(), |more| format!(", {more}"));
        log.write(json!({
            "kind": "run",
            "date": now,
            "commit": commit(),
            "device": machine.device,
            "name": machine.name,
            "driver": machine.driver,
            "cache_bytes": machine.cache_bytes,
            "software": format!("gradblend {}{rustc}{more}", env!("CARGO_PKG_VERSION")),
            "command": command(operation),
        }))?;
        Ok(log)
    }

    pub(crate) fn none(operation: Operation) -> Self {
        Log { file: None, operation }
    }

    pub(crate) fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|(_, path)| path.as_path())
    }

    pub(crate) fn case(&mut self, case: &Case, threads: usize, weights: &[f32], exact: &Exact) -> std::io::Result<()> {
        let tensors = case.tensors();
        let dots = self.operation.dots();
        let sums = |sums: &Vec<f64>| dots.then(|| sums.clone());
        self.write(json!({
            "kind": "case",
            "operation": self.operation.name(),
            "case": case.to_string(),
            "list": case.source(),
            "modalities": case.modalities,
            "dtype": case.dtype.name(),
            "misaligned": case.misaligned,
            "near": case.near,
            "threads": threads,
            "tensors": tensors.len(),
            "elements": tensors.iter().map(|tensor| tensor.len as u64).sum::<u64>(),
            "bytes": case.bytes(self.operation),
            "weights": weights,
            "c": sums(&exact.c),
            "d": sums(&exact.d),
            "c_size": sums(&exact.c_size),
            "d_size": sums(&exact.d_size),
        }))
    }

    pub(crate) fn time(&mut self, case: &Case, measured: &Measured) -> std::io::Result<()> {
        let nanoseconds = |seconds: &[f64]| -> Vec<f64> { seconds.iter().map(|s| (s * 1e10).round() / 10.0).collect() };
        let Errors { c, d, blend } = measured.errors;
        self.write(json!({
            "kind": "time",
            "operation": self.operation.name(),
            "case": case.to_string(),
            "contender": measured.name,
            "role": measured.role.name(),
            "times_ns": nanoseconds(&measured.seconds),
            "repeats": measured.repeats,
            "sets": measured.sets,
            "host_ns": measured.host.as_deref().map(nanoseconds),
            "launches": measured.launches,
            "allocations": measured.allocations,
            "extra_bytes": measured.extra_bytes,
            "error_c": c,
            "error_d": d,
            "error_blend": blend,
        }))
    }

    pub(crate) fn skipped(&mut self, case: &Case, contender: Option<&str>, reason: &str) -> std::io::Result<()> {
        println!("{case}: {}skipped: {reason}", contender.map_or(String::new(), |name| format!("{name} ")));
        self.write(json!({
            "kind": "skipped",
            "operation": self.operation.name(),
            "case": case.to_string(),
            "contender": contender,
            "reason": reason,
        }))
    }

    fn write(&mut self, line: Value) -> std::io::Result<()> {
        let Some((file, _)) = &mut self.file else { return Ok(()) };
        writeln!(file, "{line}")
    }
}

/// The commit: as the environment says where there is no repository, such as on another machine. Results that are being
/// added to change nothing that is measured.
fn commit() -> String {
    if let Ok(given) = std::env::var("GRADBLEND_COMMIT") {
        return given;
    }
    let Some(commit) = output("git", &["describe", "--always"]) else { return "unknown".into() };
    let unchanged = ["diff", "--quiet", "HEAD", "--", ".", ":!benches/results"];
    let dirty = Command::new("git").args(unchanged).status().is_ok_and(|status| !status.success());
    if dirty { commit + "-dirty" } else { commit }
}

/// The command again, without what cargo puts in front of it and behind.
fn command(operation: Operation) -> String {
    let features = if cfg!(feature = "bench-cuda") { " --features bench-cuda" } else { "" };
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if !arguments.is_empty() {
        arguments.insert(0, "--".into());
    }
    let mut command = format!("cargo bench{features} --bench {}", operation.name());
    for argument in arguments {
        command.push(' ');
        command.push_str(&argument);
    }
    command
}

/// What a command prints, if there is such a command.
fn output(command: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(command).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}
