//! The Python package: its wheel, style, types, tests, examples and benchmark.

use anyhow::{Context, Result, ensure};
use xshell::{Shell, cmd};

use crate::{cuda, emulator, tools};

/// Builds the wheel, installs it into a folder, and runs everything that uses it.
pub(crate) fn run(sh: &Shell) -> Result<()> {
    let (packages, out) = (tools::python(sh)?, tools::target()?.join("python"));
    let (wheels, installed, examples) = (out.join("wheels"), out.join("installed"), out.join("examples"));
    for folder in [&wheels, &installed, &examples] {
        sh.remove_path(folder)?;
        sh.create_dir(folder)?;
    }
    let package = tools::root().canonicalize()?.join("integrations/python");
    let _folder = sh.push_dir(&package);
    let _no_bytecode = sh.push_env("PYTHONDONTWRITEBYTECODE", "1");
    let _path = sh.push_env("PYTHONPATH", &packages);
    cmd!(sh, "python3 -m ruff format --check --no-cache .").run()?;
    cmd!(sh, "python3 -m ruff check --no-cache .").run()?;
    cmd!(sh, "python3 -m mypy --cache-dir {out} python/gradblend").run()?;

    // The source distribution, and the wheel from that. Not `--locked`: the source distribution has fewer packages.
    cmd!(sh, "{packages}/bin/maturin build --release --sdist --out {wheels}").run()?;
    let wheel = tools::files(&wheels, &["whl"])?.pop().context("no wheel was built")?;
    let name = wheel.display().to_string();
    ensure!(name.contains("-py3-none-"), "{name} is not for every Python");
    ensure!(!cfg!(target_os = "linux") || name.contains("-manylinux_"), "{name} is not for other Linux systems");
    cmd!(sh, "python3 -m pip install --quiet --no-deps --target {installed} {wheel}").run()?;

    let _path = sh.push_env("PYTHONPATH", format!("{}:{}", installed.display(), packages.display()));
    cmd!(sh, "python3 -m pytest -p no:cacheprovider --quiet -rs tests").run()?;
    cmd!(sh, "python3 benches/step.py --quick").run()?;
    {
        let _folder = sh.push_dir(&examples);
        let path = package.join("examples");
        cmd!(sh, "python3 {path}/late_fusion.py --quick --plot weights.svg --json runs.json").run()?;
        cmd!(sh, "python3 {path}/late_fusion.py --quick --views kar,zer --nuisance shortcut").run()?;
        cmd!(sh, "python3 {path}/lightning_late_fusion.py --epochs 2").run()?;
    }

    // The same package with a library that has the CUDA backend, on the emulator.
    sh.copy_file(cuda::library()?, installed.join("gradblend/_native/lib_native.so"))?;
    let test = cmd!(sh, "python3 -m pytest -p no:cacheprovider --quiet tests/test_emulator.py");
    Ok(emulator::on(&emulator::build(emulator::Detect::Nothing, None)?, test).run()?)
}
