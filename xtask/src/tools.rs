//! Folders, commands, and the tools that a fresh machine lacks: each is installed at a pinned version.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xshell::{Cmd, Shell, cmd};

/// cargo-c, and the cargo that it is built around.
const CARGO_C: &str = "0.10.24+cargo-0.98.0";
const NUMPY: &str = "2.2.6";

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A shell at the root of the repository.
pub(crate) fn shell() -> Result<Shell> {
    let sh = Shell::new()?;
    sh.change_dir(root().canonicalize()?);
    Ok(sh)
}

/// Cargo's target folder.
pub(crate) fn target() -> Result<PathBuf> {
    let folder = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    fs::create_dir_all(&folder)?;
    Ok(folder.canonicalize()?)
}

/// The compiler that a variable such as CC names, or its default.
pub(crate) fn compiler(variable: &str, default: &str) -> String {
    env::var(variable).unwrap_or_else(|_| default.into())
}

/// The files of a folder whose names end in one of `extensions`, sorted.
pub(crate) fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut found = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    found.retain(|path| path.extension().is_some_and(|is| extensions.iter().any(|extension| is == *extension)));
    found.sort();
    Ok(found)
}

/// A folder of the cache. `install` fills it unless it was filled for the same `recipe`.
fn cached(name: &str, recipe: &str, install: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(env::home_dir()?.join(".cache"))).context("no home folder")?;
    let folder = cache.join("gradblend").join(name);
    let mark = folder.join("complete");
    if fs::read_to_string(&mark).is_ok_and(|text| text == recipe) {
        return Ok(folder);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    install(&folder)?;
    fs::write(mark, recipe)?;
    Ok(folder)
}

/// nvcc: the one that NVCC names, or a pinned one.
pub(crate) fn nvcc(sh: &Shell) -> Result<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC").filter(|nvcc| !nvcc.is_empty()) {
        return Ok(nvcc.into());
    }
    let list = root().join("xtask/cuda.txt");
    let folder = cached("cuda", &fs::read_to_string(&list)?, |folder| {
        packages(sh, &["python3-pip"], "pip3")?;
        Ok(cmd!(sh, "python3 -m pip install --quiet --target {folder} --requirement {list}").run()?)
    })?;
    Ok(folder.join("nvidia/cu13/bin/nvcc"))
}

/// The folder to put into PYTHONPATH for numpy.
pub(crate) fn numpy(sh: &Shell) -> Result<PathBuf> {
    let python = cmd!(sh, "python3 -c 'import sys; print(sys.implementation.cache_tag)'").quiet().read()?;
    let package = format!("numpy=={NUMPY}");
    cached(&format!("numpy-{python}"), &package, |folder| {
        packages(sh, &["python3-pip"], "pip3")?;
        Ok(cmd!(sh, "python3 -m pip install --quiet --target {folder} {package}").run()?)
    })
}

/// The folder of cargo-cinstall, of cargo-c.
pub(crate) fn cargo_c(sh: &Shell) -> Result<PathBuf> {
    packages(sh, &["libssl-dev", "pkg-config"], "")?;
    let folder = cached("cargo-c", CARGO_C, |folder| {
        // Optimised code, or code with debug information, would take longer to compile than it ever runs.
        let install = cmd!(sh, "nice cargo install cargo-c --version {CARGO_C} --locked --debug --bin cargo-cinstall");
        let build = folder.join("target");
        install
            .args(["--quiet", "--root"])
            .arg(folder)
            .env("CARGO_TARGET_DIR", &build)
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_PROFILE_DEV_DEBUG_ASSERTIONS", "false")
            .env("CARGO_PROFILE_DEV_OVERFLOW_CHECKS", "false")
            .run()?;
        Ok(fs::remove_dir_all(build)?)
    })?;
    Ok(folder.join("bin"))
}

/// Installs those of these Debian packages that are missing, unless `program` is there. Does nothing on other systems:
/// whatever needs them will say so.
pub(crate) fn packages(sh: &Shell, names: &[&str], program: &str) -> Result<()> {
    let is_there = |command: Cmd<'_>| command.quiet().ignore_stdout().ignore_stderr().run().is_ok();
    if !is_there(cmd!(sh, "dpkg --version")) || !program.is_empty() && is_there(cmd!(sh, "{program} --version")) {
        return Ok(());
    }
    let missing: Vec<_> = names.iter().filter(|name| !is_there(cmd!(sh, "dpkg -s {name}"))).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let root: &[&str] = if cmd!(sh, "id -u").quiet().read()? == "0" { &["env"] } else { &["sudo", "env"] };
    let (first, rest) = (root[0], &root[1..]);
    cmd!(sh, "{first} {rest...} apt-get update -qq").run()?;
    let install = cmd!(sh, "{first} {rest...} DEBIAN_FRONTEND=noninteractive apt-get install -qq -y {missing...}");
    Ok(install.arg("--no-install-recommends").ignore_stdout().run()?)
}
