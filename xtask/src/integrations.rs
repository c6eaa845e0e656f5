//! The crates for candle with CUDA, tch, burn and MPI, and the header for libtorch: style, tests, examples, packages.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use rayon::prelude::*;
use xshell::{Shell, cmd};

use crate::tools;

/// Runs all of them, as many at a time as there are cores: each has long commands that use one.
pub(crate) fn run(sh: &Shell) -> Result<()> {
    tools::packages(sh, &["cmake", "libclang-dev", "libopenmpi-dev", "openmpi-bin"])?;
    // The longest first, as halves of this list start together.
    let parts: [fn() -> Result<()>; 5] = [tch, libtorch, burn, candle_on_cuda, mpi];
    parts.par_iter().try_for_each(|part| part())
}

/// Downloads what the crates depend on that are workspaces of their own.
pub(crate) fn fetch() -> Result<()> {
    for name in ["tch", "burn", "mpi"] {
        let sh = workspace(name)?;
        cmd!(sh, "cargo fetch --locked --quiet").run()?;
    }
    Ok(())
}

/// A shell in a crate that is a workspace of its own. Its builds stay in a folder of the target folder.
fn workspace(name: &str) -> Result<Shell> {
    let sh = tools::shell()?;
    sh.set_var("CARGO_TARGET_DIR", tools::target()?.join(name));
    sh.change_dir(tools::root().join("integrations").join(name));
    Ok(sh)
}

/// Lets programs find the PyTorch of pip.
fn with_pytorch(sh: &Shell) -> Result<()> {
    let packages = tools::python(sh)?;
    sh.set_var("LD_LIBRARY_PATH", packages.join("torch/lib"));
    sh.set_var("PYTHONPATH", packages);
    // Threads of PyTorch that wait for each other slow down whatever runs beside them.
    sh.set_var("OMP_NUM_THREADS", "1");
    Ok(())
}

fn tch() -> Result<()> {
    let sh = workspace("tch")?;
    with_pytorch(&sh)?;
    sh.set_var("LIBTORCH_USE_PYTORCH", "1");
    checked(&sh, &[])?;
    Ok(cmd!(sh, "cargo run --locked --example digits").run()?)
}

fn burn() -> Result<()> {
    let (sh, features) = (workspace("burn")?, ["--features=ndarray"]);
    checked(&sh, &features)?;
    Ok(cmd!(sh, "cargo run --locked {features...} --example digits").run()?)
}

/// The crate for MPI, whose tests start mpirun, and the example in C.
fn mpi() -> Result<()> {
    let sh = workspace("mpi")?;
    checked(&sh, &[])?;
    let (sh, target) = (tools::shell()?, tools::target()?);
    let out = target.join("mpi");
    // CI may be root, and have fewer cores than processes.
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        sh.set_var(name, "1");
    }
    cmd!(sh, "mpirun --oversubscribe -n 4 {out}/debug/examples/sharded --epochs 2").run()?;
    cmd!(sh, "cargo rustc --locked --release --features capi --crate-type cdylib").run()?;
    let strict = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Iinclude"];
    let library = [format!("-L{0}/release", target.display()), "-lgradblend".into(), "-lm".into()];
    cmd!(sh, "mpicc {strict...} examples/c/mpi.c {library...} -o {out}/c_mpi").run()?;
    sh.set_var("LD_LIBRARY_PATH", target.join("release"));
    let run = |ranks: &str| cmd!(sh, "mpirun --oversubscribe -n {ranks} {out}/c_mpi").read();
    let said = run("1")?;
    println!("{said}");
    ensure!(run("2")? == said && run("4")? == said, "the weights depend on the number of ranks");
    Ok(())
}

/// Checks a crate that is a workspace of its own.
fn checked(sh: &Shell, features: &[&str]) -> Result<()> {
    // Clippy in place of the compiler. A run of its own would compile all that the crate depends on once more, which takes
    // minutes, and so would its documentation.
    sh.set_var("RUSTC_WORKSPACE_WRAPPER", "clippy-driver");
    sh.set_var("CLIPPY_ARGS", "-Dwarnings");
    cmd!(sh, "cargo test --locked {features...}").run()?;
    // gradblend as it will be in the registry.
    let patch = "patch.crates-io.gradblend.path='../..'";
    Ok(cmd!(sh, "cargo package --locked --allow-dirty --no-verify --config {patch}").run()?)
}

fn libtorch() -> Result<()> {
    let (sh, out) = (tools::shell()?, tools::target()?.join("libtorch"));
    with_pytorch(&sh)?;
    let pytorch = tools::python(&sh)?.join("torch");
    cmd!(sh, "cmake -S tests/libtorch -B {out} -DCMAKE_BUILD_TYPE=Debug -DCMAKE_PREFIX_PATH={pytorch}").run()?;
    cmd!(sh, "cmake --build {out}").run()?;
    cmd!(sh, "{out}/torch_test").run()?;
    Ok(cmd!(sh, "{out}/example/late_fusion --epochs 3").run()?)
}

/// candle's storage on CUDA devices: a check of the Rust code. candle's kernels, which take minutes to compile, stay empty.
fn candle_on_cuda() -> Result<()> {
    let (sh, folder) = (tools::shell()?, tools::target()?.join("no-nvcc"));
    let nvcc = folder.join("nvcc");
    sh.write_file(&nvcc, NO_NVCC)?;
    fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755))?;
    sh.set_var("PATH", format!("{}:{}", folder.display(), sh.var("PATH")?));
    sh.set_var("NVCC", nvcc);
    sh.set_var("CUDA_COMPUTE_CAP", "80");
    // Leaves out our own kernels.
    sh.set_var("DOCS_RS", "1");
    let crates = ["--package=gradblend-candle", "--features=cuda", "--lib"];
    Ok(cmd!(sh, "cargo clippy --locked {crates...} -- -D warnings").run()?)
}

/// Makes the files that candle's build script asks a compiler for.
const NO_NVCC: &str = r#"#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        -o) : > "$2" ;;
        --output-directory) folder=$2 ;;
        *.cu) test -z "$folder" || : > "$folder/$(basename "$1" .cu).ptx" ;;
    esac
    shift
done
"#;
