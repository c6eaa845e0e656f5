//! Everything that must pass before a change lands, in an order that fails early.

use std::env;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use xshell::{Cmd, Shell, cmd};

use crate::emulator::Detect;
use crate::{cuda, emulator, ffi, gpu_bundle, integrations, machine_code, mutants, python, rules, tools};

/// A named part. It runs its commands, then its function.
type Section = (&'static str, &'static [&'static str], fn(&Shell) -> Result<()>);

/// The signal of a write into a pipe that nobody reads.
const SIGPIPE: i32 = 13;

/// What could not be checked on this machine, printed at the end.
static NOT_CHECKED: Mutex<Vec<String>> = Mutex::new(Vec::new());

const SECTIONS: [Section; 20] = [
    ("rules", &[], |_| rules::check()),
    ("format", FORMAT, |_| Ok(())),
    ("clippy", CLIPPY, |_| Ok(())),
    ("tests", TESTS, |_| Ok(())),
    ("docs", &["cargo doc --locked --workspace --no-deps"], package),
    ("minimum-rust", &[], minimum_rust),
    ("cuda", &[], cuda),
    ("machine-code", &[], |_| machine_code::run(&[])),
    ("emulator", &[], on_emulator),
    ("sanitizers", &[], sanitizers),
    ("ffi", &[], ffi::run),
    ("python", &[], python::run),
    ("integrations", &[], integrations::run),
    ("install", &[], install),
    ("optimised", OPTIMISED, |_| Ok(())),
    ("laboratory", &[], laboratory),
    ("closed-pipes", CLOSED_PIPES, closed_pipes),
    ("fuzz", &[], |_| fuzz(30)),
    ("mutants", &[], |_| mutants::run_quarter()),
    ("gpu-bundle", &[], bundle),
];
/// A run without names has one of these thirds, by the commit: with all it takes an hour on two cores.
const SLOW: [&[&str]; 3] = [
    &["machine-code", "sanitizers", "closed-pipes"],
    &["optimised", "laboratory", "fuzz", "mutants"],
    &["install", "gpu-bundle"],
];
/// The commands of the README, and the other example.
const TESTS: &[&str] = &[
    "cargo test --locked --workspace",
    "cargo run --locked --release --package gradblend-candle --example late_fusion -- --quick",
    "cargo run --locked --release --package gradblend-candle --example two_towers -- --quick",
];
const FORMAT: &[&str] = &[
    "cargo fmt --all --check",
    "cargo fmt --check --manifest-path integrations/tch/Cargo.toml",
    "cargo fmt --check --manifest-path integrations/burn/Cargo.toml",
    "cargo fmt --check --manifest-path integrations/mpi/Cargo.toml",
];
/// Tests switch on the C functions, so the library is also checked without them.
const CLIPPY: &[&str] = &[
    "cargo clippy --locked --package gradblend -- -D warnings",
    "cargo clippy --locked --workspace --all-targets -- -D warnings",
];
const OPTIMISED: &[&str] = &[
    "cargo test --locked --release --package gradblend --lib --tests",
    "cargo bench --locked --package gradblend -- --test",
];
const CLOSED_PIPES: &[&str] = &[
    "cargo build --locked --release --package gradblend --example step",
    "cargo build --locked --release --package gradblend-candle --examples",
    "cargo build --locked --release --package gradblend-lab",
];
/// Test programs that run kernels, on one order of threads, another one for each commit. `alloc` has an allocator of its own.
const SANITIZED: [&str; 13] = [
    "step",
    "blend",
    "observe",
    "cuda",
    "graph",
    "traffic",
    "driver",
    "dot",
    "random",
    "plan",
    "checkpoint",
    "solve",
    "dlpack",
];
/// Test programs that execute all lines of the kernels, to detect data races.
const RACED: [&str; 5] = ["step", "blend", "observe", "cuda", "solve"];

/// The names of the sections.
pub(crate) fn sections() -> Vec<&'static str> {
    SECTIONS.iter().map(|section| section.0).collect()
}

/// Runs the named sections; without names those of a change, or all.
pub(crate) fn run(names: &[String], all: bool) -> Result<()> {
    let started = Instant::now();
    let mut left_out = Vec::new();
    if names.is_empty() && !all {
        let third = tools::by_commit("sections", SLOW.len())?;
        left_out = SLOW.iter().enumerate().filter(|(i, _)| *i != third).flat_map(|(_, names)| names.to_vec()).collect();
        not_checked(format!("{}: another third for each commit, and all with --all", left_out.join(", ")));
    }
    let sh = tools::shell()?;
    sh.set_var("RUSTDOCFLAGS", "-D warnings");
    if names.is_empty() {
        // These take minutes to compile on a fresh machine, and some of what runs meanwhile keeps one core busy. A
        // section that needs them waits, and reports an error.
        thread::spawn(|| tools::cargo_c(&tools::shell()?).and_then(|_| tools::cargo_fuzz(&tools::shell()?)));
        // Gigabytes to download, and hundreds of crates.
        thread::spawn(|| tools::python(&tools::shell()?));
        thread::spawn(integrations::fetch);
    }
    for (name, commands, function) in SECTIONS {
        if names.iter().any(|wanted| wanted == name) || (names.is_empty() && !left_out.contains(&name)) {
            println!("\n== {name} ({} min)", started.elapsed().as_secs() / 60);
            for command in commands {
                let words = command.split(' ').skip(1);
                cmd!(sh, "cargo {words...}").run().with_context(|| format!("section {name}"))?;
            }
            function(&sh).with_context(|| format!("section {name}"))?;
        }
    }
    let reasons = NOT_CHECKED.lock().unwrap_or_else(PoisonError::into_inner);
    let but = if reasons.is_empty() { "" } else { ", except what was NOT CHECKED:" };
    println!("\n== all passed ({} min){but}", started.elapsed().as_secs() / 60);
    reasons.iter().for_each(|reason| println!("{reason}"));
    Ok(())
}

fn not_checked(reason: String) {
    println!("NOT CHECKED: {reason}");
    NOT_CHECKED.lock().unwrap_or_else(PoisonError::into_inner).push(reason);
}

fn package(sh: &Shell) -> Result<()> {
    let package = cmd!(sh, "cargo package --locked --allow-dirty --list").read()?;
    for file in ["README.md", "build.rs", "kernels/pass.cu", "include/gradblend.h"] {
        ensure!(package.lines().any(|line| line == file), "the package lacks {file}");
    }
    rules::check_links(&package)?;
    // Rejects a manifest that cannot be packaged. The packaged crate is not compiled again.
    let packages = ["--package=gradblend", "--package=gradblend-candle"];
    Ok(cmd!(sh, "cargo package --locked --allow-dirty --no-verify {packages...}").run()?)
}

fn minimum_rust(sh: &Shell) -> Result<()> {
    let version = env!("CARGO_PKG_RUST_VERSION");
    let runs = |command: Cmd<'_>| command.ignore_stdout().ignore_stderr().run().is_ok();
    let installed = runs(cmd!(sh, "rustup run {version} cargo --version"))
        || runs(cmd!(sh, "rustup toolchain install {version} --profile minimal --no-self-update"));
    if !installed {
        not_checked(format!("Rust {version} is not installed"));
        return Ok(());
    }
    Ok(cmd!(sh, "rustup run {version} cargo check --locked --features capi").run()?)
}

fn cuda(plain: &Shell) -> Result<()> {
    let (sh, out) = (cuda::shell()?, tools::target()?.join("toolkit"));
    cmd!(plain, "tests/toolkit/run --out {out}").run()?;
    cuda::kernels()?;
    let all = cuda::ALL;
    cmd!(sh, "cargo clippy --locked {all...} --all-targets -- -D warnings").run()?;
    cmd!(sh, "cargo doc --locked {all...} --no-deps").env("RUSTDOCFLAGS", "-D warnings").run()?;
    // Beside a user of cudarc who links to the driver, as candle's feature `cuda` does. DOCS_RS leaves out the kernels.
    Ok(cmd!(sh, "cargo check --locked --features cuda,cudarc/dynamic-linking").env("DOCS_RS", "1").run()?)
}

fn on_emulator(_: &Shell) -> Result<()> {
    let (sh, emulator) = (cuda::shell()?, emulator::build(Detect::Nothing, None)?);
    let all = cuda::ALL;
    emulator::on(&emulator, cmd!(sh, "cargo test --locked {all...} --lib --tests")).run()?;
    let built = cuda::build(&sh, &[&["build", "--bins", "--examples"], &all[..]].concat())?;
    let (example, lab) = (built.program("cuda_step")?, built.program("gradblend-lab")?);
    emulator::on(&emulator, cmd!(sh, "{example}")).run()?;

    let results = tools::target()?.join("ci-cuda.jsonl");
    sh.remove_path(&results)?;
    emulator::on(&emulator, cmd!(sh, "{lab} run --device cuda --test --results {results}")).run()?;
    ensure!(!fs::read_to_string(&results)?.contains("skipped"), "{} has skipped cases", results.display());
    cmd!(sh, "{lab} report {results}").run()?;

    let step = cuda::tests()?.program("step")?.clone();
    let said = cmd!(sh, "{step} --nocapture cuda").env("LD_LIBRARY_PATH", "").output()?;
    let said = String::from_utf8([said.stdout, said.stderr].concat())?;
    ensure!(said.contains("skipped: no CUDA device"), "without a device, no test says that it is skipped");
    let required = cmd!(sh, "{step} cuda").env("LD_LIBRARY_PATH", "").env("GRADBLEND_REQUIRE_CUDA", "1");
    ensure!(required.ignore_stdout().ignore_stderr().run().is_err(), "tests pass without the device that they require");
    Ok(())
}

fn sanitizers(_: &Shell) -> Result<()> {
    // Each seed is another order of threads.
    let seed = ["1", "2"][tools::by_commit("seed", 2)?];
    on_kernels(Detect::Sanitize, &SANITIZED.map(|name| (name, seed)))?;
    // Whether a barrier orders two accesses does not depend on the order of threads.
    on_kernels(Detect::Races, &RACED.map(|name| (name, "1")))
}

/// Runs the CUDA tests of programs, each with a seed, on an emulator. A program uses one core, so as many run at a time.
fn on_kernels(detect: Detect, programs: &[(&str, &str)]) -> Result<()> {
    let (emulator, built) = (emulator::build(detect, None)?, cuda::tests()?);
    programs.par_iter().try_for_each(|(name, seed)| {
        let (sh, program) = (tools::shell()?, built.program(name)?);
        let test = cmd!(sh, "{program} --quiet --skip cpu:: --skip ffi::").env("GRADBLEND_EMULATOR_SEED", seed);
        let test = match detect {
            Detect::Sanitize => emulator::on_sanitized(&sh, &emulator, test)?,
            Detect::Nothing | Detect::Races => emulator::on(&emulator, test),
        };
        Ok(test.run()?)
    })
}

fn install(sh: &Shell) -> Result<()> {
    tools::packages(sh, &["cmake", "pkg-config", "binutils"])?;
    let out = tools::target()?.join("install");
    let cinstall = tools::cargo_c(sh)?.join("cargo-cinstall");
    Ok(cmd!(sh, "tests/install/run --out {out}").env("CARGO_CINSTALL", cinstall).run()?)
}

fn laboratory(sh: &Shell) -> Result<()> {
    let results = tools::target()?.join("ci-cpu.jsonl");
    sh.remove_path(&results)?;
    let lab = ["run", "--locked", "--release", "--package=gradblend-lab", "--"];
    cmd!(sh, "cargo {lab...} run --device cpu --test --results {results}").run()?;
    // As if it had been stopped while it wrote. The next run appends to that.
    let file = fs::OpenOptions::new().write(true).open(&results)?;
    file.set_len(file.metadata()?.len() - 20)?;
    cmd!(sh, "cargo {lab...} run --device cpu --test --operation dot --results {results}").run()?;
    let said = cmd!(sh, "cargo {lab...} report {results}").read_stderr()?;
    ensure!(said.contains("is cut off, and left out"), "the report does not warn of a line that is cut off: {said}");
    // The committed tables and plots are those of the committed raw results.
    let committed = tools::files(&tools::root().join("benches/results"), &["jsonl"])?;
    // As its manual has them, from the root: the links in the tables depend on it.
    let committed: Vec<_> = committed.iter().filter_map(|file| file.strip_prefix(tools::root()).ok()).collect();
    cmd!(sh, "cargo {lab...} report {committed...} --write docs/performance.md --check").run()?;
    let python = tools::target()?.join("python");
    Ok(cmd!(sh, "python3 -m py_compile benches/lab/pytorch.py").env("PYTHONPYCACHEPREFIX", python).run()?)
}

/// A program whose reader has gone, as in `PROGRAM | head -1`, ends without an error.
fn closed_pipes(_: &Shell) -> Result<()> {
    let built = tools::target()?.join("release");
    let bench = cuda::build(&tools::shell()?, &["bench", "--no-run", "--package=gradblend", "--bench=solve"])?;
    let programs: [(PathBuf, &[&str]); 6] = [
        (bench.program("solve")?.clone(), &["--bench", "--list"]),
        (built.join("examples/step"), &[]),
        (built.join("examples/late_fusion"), &["--quick"]),
        (built.join("examples/two_towers"), &["--quick"]),
        (built.join("gradblend-lab"), &["run", "--device=cpu", "--test"]),
        (env::current_exe()?, &["ci", "format"]),
    ];
    for (program, arguments) in programs {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let mut command = Command::new(&program);
        command.args(arguments).current_dir(tools::root()).stdout(writer).stderr(Stdio::piped());
        let output = command.output().with_context(|| program.display().to_string())?;
        let said = String::from_utf8_lossy(&output.stderr);
        let ended = output.status.signal() == Some(SIGPIPE) && !said.contains("panicked") && !said.contains("error");
        ensure!(ended, "{}: {}: {said}", program.display(), output.status);
    }
    Ok(())
}

/// Runs each fuzz target for its part of a time.
pub(crate) fn fuzz(seconds: u32) -> Result<()> {
    let sh = tools::shell()?;
    sh.set_var("PATH", format!("{}:{}", tools::cargo_fuzz(&sh)?.display(), sh.var("PATH")?));
    // Lets a stable compiler take the flags of sanitizers.
    sh.set_var("RUSTC_BOOTSTRAP", "1");
    let targets = tools::files(&tools::root().join("fuzz/fuzz_targets"), &["rs"])?;
    let each = format!("-max_total_time={}", seconds.div_ceil(targets.len().max(1) as u32));
    for target in targets {
        let name = target.file_stem().context("a fuzz target without a name")?;
        cmd!(sh, "cargo fuzz run --fuzz-dir fuzz {name} -- {each} -timeout=20").run()?;
    }
    Ok(())
}

fn bundle(sh: &Shell) -> Result<()> {
    let out = tools::target()?.join("ci-gpu-bundle");
    gpu_bundle::build(true, Some(out.clone()))?;
    let script = out.join("run.sh");
    let run = emulator::on(&emulator::build(Detect::Nothing, None)?, cmd!(sh, "{script} --quick"));
    Ok(run.env("OUT", tools::target()?.join("ci-gpu-results")).run()?)
}
