//! Breaks the kernels in ways that people do, one at a time, and demands that a test notices.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde::Deserialize;
use xshell::cmd;

use crate::{cuda, emulator, tools};

/// Test programs that run on each broken kernel until one fails.
const PROGRAMS: [&str; 5] = ["step", "observe", "blend", "cuda", "dot"];
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
}

/// Runs the mutants of tests/emulator/mutants.toml whose names contain one of `names`, or all.
pub(crate) fn run(names: &[String]) -> Result<()> {
    let text = fs::read_to_string(tools::root().join("tests/emulator/mutants.toml"))?;
    let mut mutants = toml::from_str::<List>(&text)?.mutant;
    mutants.retain(|mutant| names.is_empty() || names.iter().any(|name| mutant.name.contains(name)));
    ensure!(!mutants.is_empty(), "no mutant has such a name");
    let base = emulator::build(false, None)?;
    let built = cuda::tests()?;
    let programs = PROGRAMS.iter().map(|name| built.program(name)).collect::<Result<Vec<_>>>()?;
    let failed = programs.par_iter().map(|program| first_failure(&base, &[program])).collect::<Result<Vec<_>>>()?;
    let failed: Vec<_> = failed.into_iter().flatten().collect();
    ensure!(failed.is_empty(), "{failed:?} fails on the kernels as they are");
    let try_one = |mutant: &Mutant| -> Result<bool> {
        let out = tools::target()?.join("mutants").join(mutant.name.replace(' ', "-"));
        break_kernels(mutant, &base, &out).with_context(|| mutant.name.clone())?;
        let noticed = first_failure(&out, &programs)?;
        fs::remove_dir_all(out)?;
        println!("{} {}", noticed.map_or("MISSED".into(), |program| format!("noticed by {program}:")), mutant.name);
        Ok(noticed.is_some())
    };
    let noticed = mutants.par_iter().map(try_one).collect::<Result<Vec<_>>>()?;
    let missed = noticed.iter().filter(|noticed| !**noticed).count();
    ensure!(missed == 0, "{missed} of {} mutants were missed", noticed.len());
    println!("all {} mutants were noticed", noticed.len());
    Ok(())
}

/// Builds the emulator of broken kernels in `out`.
fn break_kernels(mutant: &Mutant, base: &Path, out: &Path) -> Result<()> {
    let kernels = out.join("kernels");
    fs::create_dir_all(&kernels)?;
    for file in tools::files(&tools::root().join("kernels"), &["cu", "cuh"])? {
        let name = file.file_name().unwrap_or_default();
        let mut text = fs::read_to_string(&file)?;
        if name.to_str() == Some(&mutant.file) {
            let times = text.matches(&mutant.old).count();
            ensure!(times == 1, "{} has {:?} {times} times, expected once", mutant.file, mutant.old);
            text = text.replace(&mutant.old, &mutant.new);
        }
        fs::write(kernels.join(name), text)?;
    }
    emulator::variant(&kernels, base, out)
}

/// The first program that fails on an emulator, or runs for too long.
fn first_failure<'a>(library: &Path, programs: &[&'a PathBuf]) -> Result<Option<&'a str>> {
    let sh = tools::shell()?;
    for seed in SEEDS {
        for program in programs {
            let command = cmd!(sh, "timeout --kill-after 5 300 {program} --skip cpu:: --skip ffi:: --test-threads 1");
            let command = emulator::on(library, command).env("GRADBLEND_EMULATOR_SEED", seed);
            if command.quiet().ignore_stdout().ignore_stderr().run().is_err() {
                return Ok(program.file_name().and_then(|name| name.to_str()));
            }
        }
    }
    Ok(None)
}
