//! Packs the test programs and the laboratory for a machine that has a GPU but no Rust.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use xshell::cmd;

use crate::{cuda, tools};

/// What the programs read, or what runs there from its source.
const FILES: [&str; 7] = [
    "benches/lab/pytorch.py",
    "benches/lab/shapes.json",
    "examples/c",
    "examples/cpp",
    "include",
    "integrations/candle/examples/data",
    "tests/ffi",
];

/// Builds the folder `out`, and an archive of it beside it.
pub(crate) fn build(debug: bool, out: Option<PathBuf>) -> Result<()> {
    let sh = cuda::shell()?;
    let out = std::path::absolute(out.map_or_else(|| tools::target().map(|target| target.join("gpu-bundle")), Ok)?)?;
    let empty =
        || -> Result<bool> { Ok(fs::read_dir(&out).with_context(|| out.display().to_string())?.next().is_none()) };
    let ours = !out.exists() || out.join("MANIFEST").exists() || empty()?;
    ensure!(ours, "{} is not empty and has no MANIFEST: name another folder", out.display());
    let profile = if debug { "--profile=dev" } else { "--profile=release" };
    // No unit tests: those of the C ABI compile the header where it was built. `--test '*'` is all files of `tests`.
    let tests = cuda::build(&sh, &[&["test", "--no-run", "--test", "*", profile], &cuda::ALL[..]].concat())?;
    let built = cuda::build(&sh, &[&["build", "--bins", "--examples", profile], &cuda::ALL[..]].concat())?;
    let library = cuda::build(&sh, &["rustc", "--features=cuda,capi", "--crate-type=cdylib", profile])?;

    sh.remove_path(&out)?;
    for folder in ["tests", "lib"] {
        sh.create_dir(out.join(folder))?;
    }
    // Written first, so that an incomplete folder can be replaced.
    let commit = cmd!(sh, "git describe --always --dirty").quiet().read()?;
    let date = cmd!(sh, "date --utc +%Y-%m-%dT%H:%MZ").quiet().read()?;
    let (nvcc, rustc) = (tools::nvcc(&sh)?, cmd!(sh, "rustc --version").quiet().read()?);
    let nvcc = cmd!(sh, "{nvcc} --version").quiet().read()?;
    let nvcc = nvcc.lines().find(|line| line.contains("release")).context("nvcc names no release")?;
    sh.write_file(out.join("MANIFEST"), format!("commit {commit}\nbuilt {date}, {profile}\n{rustc}\nnvcc {nvcc}\n"))?;

    let copy = |from: &Path, to: PathBuf| -> Result<()> {
        fs::copy(from, &to).with_context(|| from.display().to_string())?;
        Ok(cmd!(sh, "strip {to}").quiet().run()?)
    };
    for (name, program) in &tests.programs {
        copy(program, out.join("tests").join(name))?;
    }
    copy(built.program("cuda_step")?, out.join("cuda_step"))?;
    copy(built.program("gradblend-lab")?, out.join("gradblend-lab"))?;
    copy(library.library.as_ref().context("no library was built")?, out.join("lib/libgradblend.so"))?;
    cmd!(sh, "cp --recursive --parents").args(FILES).arg(&out).quiet().run()?;
    cmd!(sh, "cp xtask/gpu/run.sh {out}").quiet().run()?;

    let archive = out.with_extension("tar.xz");
    let (folder, name) = (out.parent().context("no parent folder")?, out.file_name().context("no name")?);
    // The programs have the same machine code in them, which xz stores once: its window is larger than a program.
    cmd!(sh, "tar --create --xz --file {archive} --directory {folder} {name}")
        .env("XZ_OPT", "--lzma2=preset=3,dict=64MiB")
        .quiet()
        .run()?;
    println!("{} and {} ({} MiB)", out.display(), archive.display(), fs::metadata(&archive)?.len() >> 20);
    Ok(())
}
