//! Builds the emulator of the CUDA driver: kernels and driver functions, compiled by the host's C++ compiler.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::SystemTime;

use anyhow::{Context, Result};
use xshell::{Cmd, Shell, cmd};

use crate::{header, tools};

/// Sources of the emulator that do not depend on the kernels of the library.
const DRIVER: [&str; 3] = ["tests/emulator/threads.cpp", "tests/emulator/driver.cpp", "tests/emulator/streams.cpp"];
const CUBLAS: &str = "tests/emulator/cublas.cpp";
/// Kernels of the laboratory.
const NAIVE: &str = "benches/lab/kernels/naive.cu";
/// Kernels of the library.
pub(crate) const KERNELS: [&str; 2] = ["pass.cu", "state.cu"];

const EXPORTS: &str = "{ global: cu*; emulator_*; local: *; };";
const CUBLAS_EXPORTS: &str = "{ global: cublas*; local: *; };";
/// A driver that lacks almost all functions, as one of another version might.
const INCOMPLETE: &str = r#"
extern "C" int cuInit(unsigned) { return 0; }
extern "C" int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
"#;
const SANITIZE: [&str; 3] =
    ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=shared_memory"];

/// Builds libcuda.so.1 and libcublas.so.13 in `out`, and in `out/incomplete` a driver that lacks functions. Returns
/// `out`, which goes into LD_LIBRARY_PATH.
pub(crate) fn build(sanitize: bool, out: Option<PathBuf>) -> Result<PathBuf> {
    let sh = tools::shell()?;
    let name = if sanitize { "emulator-sanitize" } else { "emulator" };
    let out = out.map_or_else(|| tools::target().map(|target| target.join(name)), Ok)?;
    fs::create_dir_all(out.join("incomplete"))?;
    let out = out.canonicalize()?;
    let abi = out.join("abi.cuh");
    if fs::read_to_string(&abi).ok().as_deref() != Some(header::header().as_str()) {
        fs::write(&abi, header::header())?;
    }
    let library = out.join("libcuda.so");
    if is_newest(&library, &abi)? {
        println!("{} is up to date", out.display());
        return Ok(out);
    }
    let sanitize: &[&str] = if sanitize { &SANITIZE } else { &[] };
    let kernels = tools::root().join("kernels");
    let mut sources: Vec<PathBuf> = DRIVER.iter().chain([&NAIVE]).map(|path| tools::root().join(path)).collect();
    sources.extend(KERNELS.iter().map(|name| kernels.join(name)));
    let objects: Vec<PathBuf> = sources.iter().map(|source| object(&out, source)).collect();
    sources.push(tools::root().join(CUBLAS));
    compile(&sources, &kernels, &out, &out, sanitize)?;
    link(&sh, &objects, &out.join("libcuda.so.1"), EXPORTS, sanitize)?;
    let cublas = [out.join("cublas.o"), out.join("libcuda.so.1")];
    link(&sh, &cublas, &out.join("libcublas.so.13"), CUBLAS_EXPORTS, sanitize)?;
    let incomplete = out.join("incomplete/driver.cpp");
    fs::write(&incomplete, INCOMPLETE)?;
    link(&sh, &[incomplete], &out.join("incomplete/libcuda.so.1"), EXPORTS, &["-fPIC"])?;
    for (name, folder) in [("libcublas.so", ""), ("libcuda.so", "incomplete"), ("libcuda.so", "")] {
        let so = out.join(folder).join(name);
        cmd!(sh, "ln -sf").arg(format!("{name}.{}", if name == "libcuda.so" { 1 } else { 13 })).arg(so).quiet().run()?;
    }
    println!("built {}", out.display());
    Ok(out)
}

/// Builds libcuda.so.1 of other kernels in `out`, with all else from the folder `base`.
pub(crate) fn variant(kernels: &Path, base: &Path, out: &Path) -> Result<()> {
    let sources = KERNELS.map(|name| kernels.join(name));
    // Such a library is built once and runs briefly.
    compile(&sources, kernels, base, out, &["-O1"])?;
    let others = DRIVER.iter().chain([&NAIVE]).map(|path| object(base, Path::new(path)));
    let objects: Vec<PathBuf> = sources.iter().map(|source| object(out, source)).chain(others).collect();
    link(&tools::shell()?, &objects, &out.join("libcuda.so.1"), EXPORTS, &[])
}

/// Lets a command find the emulator, and fail where it finds no device.
pub(crate) fn on<'sh>(out: &Path, command: Cmd<'sh>) -> Cmd<'sh> {
    command.env("LD_LIBRARY_PATH", out).env("GRADBLEND_REQUIRE_CUDA", "1")
}

/// Lets a test program run on an emulator with sanitizers. These must be loaded first, and the runtime of C++
/// exceptions, which a Rust program does not have, with them.
pub(crate) fn on_sanitized<'sh>(sh: &Shell, out: &Path, command: Cmd<'sh>) -> Result<Cmd<'sh>> {
    let cxx = tools::compiler("CXX", "g++");
    let find = |name: &str| cmd!(sh, "{cxx} -print-file-name={name}").quiet().read();
    let preload = format!("{} {}", find("libasan.so")?, find("libstdc++.so.6")?);
    Ok(on(out, command).env("LD_PRELOAD", preload).env("ASAN_OPTIONS", "detect_leaks=0"))
}

/// Whether a library is newer than all of its sources.
fn is_newest(library: &Path, abi: &Path) -> Result<bool> {
    let date = |path: &Path| -> Result<SystemTime> { Ok(fs::metadata(path)?.modified()?) };
    let Ok(built) = date(library) else { return Ok(false) };
    let root = tools::root();
    let mut sources = tools::files(&root.join("tests/emulator"), &["cpp", "hpp"])?;
    sources.extend(tools::files(&root.join("kernels"), &["cu", "cuh"])?);
    sources.extend([root.join(NAIVE), root.join("xtask/src/emulator.rs"), abi.to_owned()]);
    for source in sources {
        if date(&source)? > built {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The object that `compile` makes of a source.
fn object(out: &Path, source: &Path) -> PathBuf {
    out.join(Path::new(source.file_name().unwrap_or_default())).with_extension("o")
}

/// Compiles sources, each by a process of its own.
fn compile(sources: &[PathBuf], kernels: &Path, abi: &Path, out: &Path, flags: &[&str]) -> Result<()> {
    let cuda = tools::root().join("tests/emulator/cuda.hpp");
    let cxx = tools::compiler("CXX", "g++");
    let compile = |source: &PathBuf| -> Result<()> {
        let sh = tools::shell()?;
        let object = object(out, source);
        let mut command = cmd!(sh, "{cxx} -std=c++17 -O2 -g -fPIC -fvisibility=hidden -ffp-contract=off")
            .args(["-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
            .args(flags)
            .args([Path::new("-I"), kernels, Path::new("-I"), abi]);
        if source.extension().is_some_and(|extension| extension == "cu") {
            command = command.args(["-x", "c++", "-include"]).arg(&cuda);
        }
        command.arg("-c").arg(source).arg("-o").arg(object).quiet().run().context(source.display().to_string())
    };
    thread::scope(|scope| {
        let running: Vec<_> = sources.iter().map(|source| scope.spawn(|| compile(source))).collect();
        running.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a compiler thread ended"))?)
    })
}

/// Links a shared library that exports what `exports` says.
fn link(sh: &Shell, inputs: &[PathBuf], library: &Path, exports: &str, flags: &[&str]) -> Result<()> {
    let script = library.with_extension("exports");
    fs::write(&script, exports)?;
    let name = library.file_name().unwrap_or_default().to_string_lossy();
    let options = format!("-Wl,--no-undefined,-soname,{name},--version-script={}", script.display());
    let cxx = tools::compiler("CXX", "g++");
    Ok(cmd!(sh, "{cxx} -shared -pthread {flags...} {options} {inputs...} -o {library}").quiet().run()?)
}
