//! Folders, commands, and the tools that a fresh machine lacks: each is installed at a pinned version.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use xshell::{Cmd, Shell, cmd};

/// cargo-c, and the cargo that it is built around.
const CARGO_C: &str = "0.10.24+cargo-0.98.0";
const CARGO_FUZZ: &str = "0.13.2";

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

/// A number below `parts`, another one for each commit: for a check of which each run of CI makes a part. The numbers of two
/// checks do not depend on each other.
pub(crate) fn by_commit(check: &str, parts: usize) -> Result<usize> {
    let sh = shell()?;
    let mut hasher = DefaultHasher::new();
    (check, cmd!(sh, "git rev-parse HEAD").quiet().read()?).hash(&mut hasher);
    Ok((hasher.finish() % parts as u64) as usize)
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

/// A folder of the cache. `install` fills it unless it was filled for the same `recipe`; meanwhile other threads that want
/// the folder wait.
fn cached(name: &str, recipe: &str, install: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    static LOCKS: Mutex<BTreeMap<String, &'static Mutex<()>>> = Mutex::new(BTreeMap::new());
    let mut locks = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    let lock: &Mutex<()> = locks.entry(name.into()).or_insert_with(|| Box::leak(Box::default()));
    drop(locks);
    let _one_at_a_time = lock.lock();
    let home = || Some(env::home_dir()?.join(".cache"));
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).context("no home folder")?;
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
        Ok(cmd!(sh, "python3 -m pip install --quiet --target {folder} --requirement {list}").run()?)
    })?;
    Ok(folder.join("nvidia/cu13/bin/nvcc"))
}

/// The folder to put into PYTHONPATH for what checks the Python package.
pub(crate) fn python(sh: &Shell) -> Result<PathBuf> {
    let list = root().canonicalize()?.join("integrations/python/requirements.txt");
    let python = cmd!(sh, "python3 -c 'import sys; print(sys.implementation.cache_tag)'").quiet().read()?;
    cached(&format!("python-{python}"), &fs::read_to_string(&list)?, |folder| {
        Ok(cmd!(sh, "python3 -m pip install --quiet --target {folder} --requirement {list}").run()?)
    })
}

/// The folder of cargo-cinstall, of cargo-c.
pub(crate) fn cargo_c(sh: &Shell) -> Result<PathBuf> {
    packages(sh, &["libssl-dev", "pkg-config"])?;
    cargo_install(sh, "cargo-c", CARGO_C, "cargo-cinstall")
}

/// The folder of cargo-fuzz.
pub(crate) fn cargo_fuzz(sh: &Shell) -> Result<PathBuf> {
    cargo_install(sh, "cargo-fuzz", CARGO_FUZZ, "cargo-fuzz")
}

fn cargo_install(sh: &Shell, name: &str, version: &str, program: &str) -> Result<PathBuf> {
    let folder = cached(name, version, |folder| {
        let build = folder.join("target");
        // Optimised code, or code with debug information, would take longer to compile than it ever runs.
        cmd!(
            sh,
            "nice cargo install {name} --version {version} --locked --debug --quiet --bin {program} --root {folder}"
        )
        .env("CARGO_TARGET_DIR", &build)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("CARGO_PROFILE_DEV_DEBUG_ASSERTIONS", "false")
        .env("CARGO_PROFILE_DEV_OVERFLOW_CHECKS", "false")
        .run()?;
        Ok(fs::remove_dir_all(build)?)
    })?;
    Ok(folder.join("bin"))
}

/// Installs those of these Debian packages that are missing. Does nothing on other systems: whatever needs a package
/// will say so.
pub(crate) fn packages(sh: &Shell, names: &[&str]) -> Result<()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOCK.lock();
    let runs = |command: Cmd<'_>| command.quiet().ignore_stdout().ignore_stderr().run().is_ok();
    let missing: Vec<_> = names.iter().filter(|name| !runs(cmd!(sh, "dpkg -s {name}"))).collect();
    if missing.is_empty() || !runs(cmd!(sh, "dpkg --version")) {
        return Ok(());
    }
    let root: &[&str] = if cmd!(sh, "id -u").quiet().read()? == "0" { &[] } else { &["sudo"] };
    let apt = [root, &["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]].concat();
    let (env, apt) = (apt[0], &apt[1..]);
    cmd!(sh, "{env} {apt...} update").run()?;
    Ok(cmd!(sh, "{env} {apt...} install -y --no-install-recommends {missing...}").ignore_stdout().run()?)
}
