//! Breaks the kernels in ways that people do, one at a time, and demands that a test notices.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde::Deserialize;
use xshell::cmd;

use crate::emulator::Detect;
use crate::{cuda, emulator, tools};

/// Test programs that run on each broken kernel until one fails, the quickest first.
const PROGRAMS: [&str; 6] = ["solve", "cuda", "observe", "step", "blend", "dot"];
/// Orders of the emulated threads that each program runs in.
const SEEDS: [&str; 3] = ["1", "2", "3"];

#[derive(Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

/// One mistake.
#[derive(Deserialize)]
struct Mutant {
    name: String,
    /// A file in `kernels/`.
    file: String,
    /// A text that the file has once.
    old: String,
    /// The text that replaces it.
    new: String,
    /// Whether it changes no result on the emulator: the detection of data races must notice it.
    #[serde(default)]
    race: bool,
}

impl Mutant {
    fn detect(&self) -> Detect {
        if self.race { Detect::Races } else { Detect::Nothing }
    }

    /// The text of its file with the mistake.
    fn break_text(&self, text: &str) -> Result<String> {
        let times = text.matches(&self.old).count();
        ensure!(times == 1, "{}: {} has {:?} {times} times, expected once", self.name, self.file, self.old);
        Ok(text.replace(&self.old, &self.new))
    }
}

/// Runs the mutants of tests/emulator/mutants.toml whose names contain one of `names`, or all.
pub(crate) fn run(names: &[String]) -> Result<()> {
    let mut mutants = list()?;
    for name in names {
        ensure!(mutants.iter().any(|mutant| mutant.name.contains(name)), "no mutant has a name that contains {name:?}");
    }
    mutants.retain(|mutant| names.is_empty() || names.iter().any(|name| mutant.name.contains(name)));
    try_all(&mutants)
}

/// Runs a quarter of the mutants, another one for each commit: all take minutes.
pub(crate) fn run_quarter() -> Result<()> {
    const PARTS: usize = 4;
    let part = tools::by_commit("mutants", PARTS)?;
    let quarter = list()?.into_iter().skip(part).step_by(PARTS).collect::<Vec<_>>();
    println!("part {} of {PARTS}: {} mutants", part + 1, quarter.len());
    try_all(&quarter)
}

fn list() -> Result<Vec<Mutant>> {
    let text = fs::read_to_string(tools::root().join("tests/emulator/mutants.toml"))?;
    Ok(toml::from_str::<List>(&text)?.mutant)
}

fn try_all(mutants: &[Mutant]) -> Result<()> {
    let kernels = tools::root().join("kernels");
    for mutant in mutants {
        mutant.break_text(&fs::read_to_string(kernels.join(&mutant.file))?)?;
    }
    let base = emulator::build(Detect::Nothing, None)?;
    let races = emulator::build(Detect::Races, None)?;
    let built = cuda::tests()?;
    let programs = PROGRAMS.iter().map(|name| built.program(name)).collect::<Result<Vec<_>>>()?;
    check_unbroken(&base, &programs[..3])?;
    let try_one = |mutant: &Mutant| -> Result<bool> {
        let out = folder(&mutant.name)?;
        let base = if mutant.race { &races } else { &base };
        build(Some(mutant), base, &out).with_context(|| mutant.name.clone())?;
        let noticed = first_failure(&out, &programs)?.filter(|how| !mutant.race || how.ends_with(RACED));
        fs::remove_dir_all(out)?;
        println!(
            "{} {}",
            noticed.as_ref().map_or("MISSED".into(), |noticed| format!("noticed: {noticed}:")),
            mutant.name
        );
        Ok(noticed.is_some())
    };
    let noticed = mutants.par_iter().map(try_one).collect::<Result<Vec<_>>>()?;
    let missed = noticed.iter().filter(|noticed| !**noticed).count();
    ensure!(missed == 0, "{missed} of {} mutants were missed", noticed.len());
    println!("all {} mutants were noticed", noticed.len());
    Ok(())
}

fn folder(name: &str) -> Result<PathBuf> {
    Ok(tools::target()?.join("mutants").join(name.replace(' ', "-")))
}

/// Builds the unchanged kernels as mutants are built, and checks that the quick programs pass on them. Without this, a
/// library that does not load would count as noticed.
fn check_unbroken(base: &Path, programs: &[&PathBuf]) -> Result<()> {
    let out = folder("unbroken")?;
    build(None, base, &out)?;
    let failed = programs.par_iter().map(|program| first_failure(&out, &[program])).collect::<Result<Vec<_>>>()?;
    let failed: Vec<_> = failed.into_iter().flatten().collect();
    ensure!(failed.is_empty(), "on the kernels as they are: {}", failed.join(", "));
    Ok(fs::remove_dir_all(out)?)
}

/// Builds the emulator in `out`, of kernels with a mistake or of unchanged ones.
fn build(mutant: Option<&Mutant>, base: &Path, out: &Path) -> Result<()> {
    let kernels = out.join("kernels");
    fs::create_dir_all(&kernels)?;
    for file in tools::files(&tools::root().join("kernels"), &["cu", "cuh"])? {
        let name = file.file_name().unwrap_or_default();
        let mut text = fs::read_to_string(&file)?;
        if let Some(mutant) = mutant.filter(|mutant| name.to_str() == Some(&mutant.file)) {
            text = mutant.break_text(&text)?;
        }
        fs::write(kernels.join(name), text)?;
    }
    emulator::variant(&kernels, base, out, mutant.map_or(Detect::Nothing, Mutant::detect))
}

/// How `timeout` exits where it stopped the command.
const TIMED_OUT: [i32; 2] = [124, 137];
/// What is said of a program that ended with a data race.
const RACED: &str = "has a data race";

/// The first program that fails on an emulator or does not end, and how.
fn first_failure(library: &Path, programs: &[&PathBuf]) -> Result<Option<String>> {
    let sh = tools::shell()?;
    for seed in SEEDS {
        for program in programs {
            let command = cmd!(sh, "timeout --kill-after 5 300 {program} --skip cpu:: --skip ffi:: --test-threads 1");
            // A stable compiler's test programs take unstable options with RUSTC_BOOTSTRAP.
            let command = command.args(["-Zunstable-options", "--fail-fast"]).env("RUSTC_BOOTSTRAP", "1");
            let command = emulator::on(library, command).env("GRADBLEND_EMULATOR_SEED", seed);
            let output = command.quiet().ignore_status().ignore_stdout().output()?;
            if !output.status.success() {
                let timed_out = output.status.code().is_some_and(|code| TIMED_OUT.contains(&code));
                let raced = String::from_utf8_lossy(&output.stderr).contains(": data race");
                let name = program.file_name().unwrap_or_default().to_string_lossy();
                let how = match (timed_out, raced) {
                    (true, _) => "timed out",
                    (_, true) => RACED,
                    _ => "failed",
                };
                return Ok(Some(format!("{name} {how}")));
            }
        }
    }
    Ok(None)
}
