//! Builds the emulator of the CUDA driver: kernels and driver functions, compiled by the host's C++ compiler.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use rayon::prelude::*;
use regex::Regex;
use xshell::{Cmd, Shell, cmd};

use crate::{header, tools};

const SOURCES: &str = "tests/emulator";
/// Kernels of the laboratory.
const NAIVE: &str = "benches/lab/kernels/naive.cu";
const EXPORTS: &str = "{ global: cu*; emulator_*; local: *; };";
/// A driver that lacks almost all functions, as one of another version might.
const INCOMPLETE: &str = "extern \"C\" int cuInit(unsigned) { return 0; }
extern \"C\" int cuDriverGetVersion(int *version) { return *version = 13000, 0; }\n";

/// What an emulator detects besides what all do.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Detect {
    /// Nothing
    Nothing,
    /// Accesses out of bounds and undefined behavior: AddressSanitizer and UndefinedBehaviorSanitizer
    Sanitize,
    /// Data races in a thread block: tests/emulator/races.cpp
    Races,
}

impl Detect {
    /// The folder in cargo's target folder.
    fn folder(self) -> &'static str {
        match self {
            Self::Nothing => "emulator",
            Self::Sanitize => "emulator-sanitize",
            Self::Races => "emulator-races",
        }
    }

    /// Flags of the compiler for all sources, and of the linker.
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Sanitize => {
                &["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=shared_memory"]
            }
            Self::Nothing | Self::Races => &[],
        }
    }

    /// Flags of the compiler for kernels alone.
    fn kernel_flags(self) -> &'static [&'static str] {
        match self {
            // Calls functions before accesses to memory. The linker must not add ThreadSanitizer's own.
            Self::Races => &["-fsanitize=thread"],
            Self::Nothing | Self::Sanitize => &[],
        }
    }
}

/// The result of each function of a toolkit's stub of the driver: CUDA_ERROR_STUB_LIBRARY.
const STUB: &str = "extern \"C\" int NAME() { return 34; }\n";

/// Builds libcuda.so.1 and libcublas.so.13 in `out`, in `out/incomplete` a driver that lacks functions, and in `out/stub`
/// one like a toolkit's stub. Returns `out`, which goes into LD_LIBRARY_PATH.
pub(crate) fn build(detect: Detect, out: Option<PathBuf>) -> Result<PathBuf> {
    let out = out.map_or_else(|| tools::target().map(|target| target.join(detect.folder())), Ok)?;
    for folder in ["incomplete", "stub"] {
        fs::create_dir_all(out.join(folder)).with_context(|| out.display().to_string())?;
    }
    let out = out.canonicalize()?;
    if fs::read_to_string(out.join("abi.cuh")).ok().as_deref() != Some(header::header().as_str()) {
        fs::write(out.join("abi.cuh"), header::header())?;
    }
    let (root, sources) = (tools::root(), Sources::find()?);
    let kernels = root.join("kernels");
    let included = [tools::files(&root.join(SOURCES), &["hpp"])?, tools::files(&kernels, &["cuh"])?].concat();
    let library = out.join("libcuda.so.1");
    let cublas = out.join("libcublas.so.13");
    let (incomplete, stub) = (out.join("incomplete/libcuda.so.1"), out.join("stub/libcuda.so.1"));
    let all = [sources.all(), included, vec![out.join("abi.cuh")]].concat();
    // The last one that is linked: after a failure it is missing or old.
    if is_newest(&stub, &all)? {
        return Ok(out);
    }
    let flags = detect.flags();
    compile(&sources.all(), &[&kernels, &out], &out, flags, detect)?;
    link(&objects(&[sources.host, sources.kernels].concat(), &out), &library, EXPORTS, flags)?;
    link(&[object(&sources.cublas, &out), library], &cublas, "{ global: cublas*; local: *; };", flags)?;
    let host = tools::files(&root.join(SOURCES), &["cpp"])?;
    let driver: String = host.iter().map(fs::read_to_string).collect::<std::io::Result<_>>()?;
    let exported = Regex::new(r"(?:EXPORT int |API\()(cu\w+)")?;
    let functions: String = exported.captures_iter(&driver).map(|found| STUB.replace("NAME", &found[1])).collect();
    for (library, text) in [(&incomplete, INCOMPLETE), (&stub, &functions)] {
        let source = library.with_file_name("driver.cpp");
        fs::write(&source, text)?;
        link(&[source], library, EXPORTS, &["-fPIC"])?;
    }
    Ok(out)
}

/// Builds libcuda.so.1 of other kernels in `out`, with all else from the emulator in `base`.
pub(crate) fn variant(kernels: &Path, base: &Path, out: &Path, detect: Detect) -> Result<()> {
    // Such a library runs until the first test that fails: compiling it takes most of the time.
    let own = tools::files(kernels, &["cu"])?;
    compile(&own, &[kernels, base], out, &["-O0", "-g0"], detect)?;
    let inputs = [objects(&Sources::find()?.host, base), objects(&own, out)].concat();
    link(&inputs, &out.join("libcuda.so.1"), EXPORTS, &[])
}

/// The sources of the two libraries.
struct Sources {
    /// The driver, and the kernels of the laboratory.
    host: Vec<PathBuf>,
    kernels: Vec<PathBuf>,
    cublas: PathBuf,
}

impl Sources {
    fn find() -> Result<Self> {
        let folder = tools::root().join(SOURCES);
        let cublas = folder.join("cublas.cpp");
        let mut host = tools::files(&folder, &["cpp"])?;
        host.retain(|source| *source != cublas);
        host.push(tools::root().join(NAIVE));
        Ok(Self { host, kernels: tools::files(&tools::root().join("kernels"), &["cu"])?, cublas })
    }

    fn all(&self) -> Vec<PathBuf> {
        [&self.host[..], &self.kernels, std::slice::from_ref(&self.cublas)].concat()
    }
}

/// The object that `compile` makes of a source in `out`.
fn object(source: &Path, out: &Path) -> PathBuf {
    out.join(source.with_extension("o").file_name().unwrap_or_default())
}

fn objects(sources: &[PathBuf], out: &Path) -> Vec<PathBuf> {
    sources.iter().map(|source| object(source, out)).collect()
}

/// Lets a command find the emulator. Tests that need a device or the emulator then fail where they do not find it.
pub(crate) fn on<'sh>(out: &Path, command: Cmd<'sh>) -> Cmd<'sh> {
    let command = command.env("LD_LIBRARY_PATH", out);
    command.env("GRADBLEND_REQUIRE_CUDA", "1").env("GRADBLEND_REQUIRE_EMULATOR", "1")
}

/// Lets a test program run on an emulator with sanitizers. These must be loaded first, and with them the runtime of C++
/// exceptions, which a Rust program does not have.
pub(crate) fn on_sanitized<'sh>(sh: &Shell, out: &Path, command: Cmd<'sh>) -> Result<Cmd<'sh>> {
    let cxx = tools::compiler("CXX", "g++");
    let find = |name: &str| cmd!(sh, "{cxx} -print-file-name={name}").quiet().read();
    let preload = format!("{} {}", find("libasan.so")?, find("libstdc++.so.6")?);
    Ok(on(out, command).env("LD_PRELOAD", preload).env("ASAN_OPTIONS", "detect_leaks=0"))
}

/// Whether a library is newer than all of its sources.
fn is_newest(library: &Path, sources: &[PathBuf]) -> Result<bool> {
    let Ok(built) = fs::metadata(library) else { return Ok(false) };
    let built = built.modified()?;
    let newer = |source: &PathBuf| Ok(fs::metadata(source)?.modified()? > built);
    Ok(!sources.iter().map(newer).collect::<Result<Vec<bool>>>()?.contains(&true))
}

/// Compiles each source into an object in `out`, all at the same time.
fn compile(sources: &[PathBuf], include: &[&Path], out: &Path, flags: &[&str], detect: Detect) -> Result<()> {
    let (cxx, cuda) = (tools::compiler("CXX", "g++"), tools::root().join("tests/emulator/cuda.hpp"));
    let compile = |source: &PathBuf| -> Result<()> {
        let sh = tools::shell()?;
        let object = object(source, out);
        let mut command = cmd!(sh, "{cxx} -std=c++17 -O2 -g -fPIC -fvisibility=hidden -ffp-contract=off")
            .args(["-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
            .args(flags)
            .args(include.iter().flat_map(|folder| [Path::new("-I"), folder]));
        if source.extension().is_some_and(|extension| extension == "cu") {
            command = command.args(detect.kernel_flags()).args(["-x", "c++", "-include"]).arg(&cuda);
        }
        command.arg("-c").arg(source).arg("-o").arg(object).quiet().run().with_context(|| source.display().to_string())
    };
    sources.par_iter().try_for_each(compile)
}

/// Links a shared library NAME.so.N, which exports what `exports` says, and a link NAME.so to it.
fn link(inputs: &[PathBuf], library: &Path, exports: &str, flags: &[&str]) -> Result<()> {
    let (sh, cxx) = (tools::shell()?, tools::compiler("CXX", "g++"));
    let script = library.with_extension("exports");
    fs::write(&script, exports)?;
    let name = library.file_name().unwrap_or_default();
    let command = cmd!(sh, "{cxx} -shared -pthread {flags...} {inputs...} -o {library} -Wl,--no-undefined");
    let command = command.args(["-Xlinker", "-soname", "-Xlinker"]).arg(name);
    command.args(["-Xlinker", "--version-script", "-Xlinker"]).arg(script).quiet().run()?;
    let alias = library.with_extension("");
    Ok(cmd!(sh, "ln -sf {name} {alias}").quiet().run()?)
}
