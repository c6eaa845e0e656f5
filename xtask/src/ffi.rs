//! The library for C: its symbols, tests and examples.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use regex::Regex;
use xshell::{Shell, cmd};

use crate::{cuda, emulator, tools};

const C: [&str; 5] = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"];

/// Builds the library and runs everything that uses it from C and C++.
pub(crate) fn run(sh: &Shell) -> Result<()> {
    tools::packages(sh, &["clang-14", "libclang-rt-14-dev", "valgrind", "libc6-dbg", "binutils"])?;
    for kind in ["cdylib", "staticlib"] {
        cmd!(sh, "cargo rustc --locked --release --features capi --crate-type {kind}").run()?;
    }
    let target = tools::target()?;
    let library = target.join("release");
    symbols(sh, &library)?;
    // nvcc compiles the headers once.
    let nvcc = tools::nvcc(sh)?;
    cmd!(sh, "tests/ffi/run {library}").arg("--out").arg(target.join("ffi")).env("NVCC", nvcc).run()?;
    for mode in ["--sanitize", "--valgrind"] {
        let out = target.join(format!("ffi{mode}"));
        cmd!(sh, "tests/ffi/run {library} {mode} --out {out}").env_remove("NVCC").run()?;
    }
    documented(sh)?;

    // The README's commands.
    let readme = fs::read_to_string(tools::root().join("README.md"))?;
    let script = Regex::new(r"(?s)\n## From C.*?\n```sh\n(.*?)\n```")?;
    let script = script.captures(&readme).context("README has no commands for C")?[1].to_owned();
    cmd!(sh, "bash -euxo pipefail -c {script}").env_remove("CARGO_TARGET_DIR").run()?;

    for cc in ["gcc", "clang-14"] {
        example(sh, cc, &library, "-1")?;
    }
    let sh = cuda::shell()?;
    let library = cuda::library()?;
    let library = library.parent().context("a library without a folder")?;
    let emulator = emulator::build(emulator::Detect::Nothing, None)?;
    sh.set_var("LD_LIBRARY_PATH", emulator);
    let out = target.join("ffi-cuda");
    cmd!(sh, "tests/ffi/run {library} --device 0 --out {out}").run()?;
    example(&sh, "gcc", library, "0")
}

/// The library exports what the header declares, and nothing else.
fn symbols(sh: &Shell, library: &Path) -> Result<()> {
    let (cc, library) = (tools::compiler("CC", "gcc"), library.join("libgradblend.so"));
    let header = cmd!(sh, "{cc} -E -P include/gradblend.h").quiet().read()?;
    // An inline function is no symbol.
    let header = Regex::new(r"static\s+inline\s+\w+ \w+")?.replace_all(&header, "");
    let declaration = Regex::new(r"\b(gradblend_[a-z_]+) *\(")?;
    let declared: BTreeSet<_> = declaration.captures_iter(&header).map(|found| found[1].to_owned()).collect();
    let symbols = cmd!(sh, "nm -D --defined-only {library}").quiet().read()?;
    let exported: BTreeSet<_> =
        symbols.lines().filter_map(|line| Some(line.split_whitespace().last()?.into())).collect();
    let difference: Vec<_> = declared.symmetric_difference(&exported).collect();
    ensure!(difference.is_empty(), "either declared or exported, but not both: {difference:?}");
    Ok(())
}

/// Compiles the lines of C of the documentation, as the body of a function that has what they name.
fn documented(sh: &Shell) -> Result<()> {
    let text = fs::read_to_string(tools::root().join("docs/c-api.md"))?;
    let block = Regex::new(r"(?s)\n```c\n(.*?)\n```")?;
    let lines = block.captures(&text).context("docs/c-api.md has no lines of C")?[1].to_owned();
    let parameters = "const float *audio, const float *fused, const float *t, const float *g, float *blended, \
                      uint64_t len, void *stream";
    let program =
        format!("#include \"gradblend.h\"\nvoid lines({parameters});\nvoid lines({parameters}) {{\n{lines}\n}}\n");
    let cc = tools::compiler("CC", "gcc");
    let compile = cmd!(sh, "{cc} {C...} -x c -fsyntax-only -Iinclude -").stdin(program);
    compile.run().context("the lines of C in docs/c-api.md")
}

/// Compiles and runs the example in C on a device.
fn example(sh: &Shell, cc: &str, library: &Path, device: &str) -> Result<()> {
    let out = tools::target()?.join("ffi-example");
    let search = [format!("-L{}", library.display()), format!("-Wl,-rpath,{}", library.display())];
    cmd!(sh, "{cc} {C...} -Iinclude examples/c/step.c -o {out} {search...} -lgradblend -ldl -lm").run()?;
    Ok(cmd!(sh, "{out} --device {device}").run()?)
}
