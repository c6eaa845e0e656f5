//! Compiles the naive CUDA kernels where the feature `cuda` asks for them, by the nvcc and for the architectures of
//! gradblend's own build.

#[path = "../../kernels/nvcc.rs"]
#[allow(dead_code, reason = "only gradblend's build needs the version")]
mod nvcc;

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    for path in ["build.rs", "kernels", "../../kernels/nvcc.rs"] {
        println!("cargo:rerun-if-changed={path}");
    }
    nvcc::rerun_if_env_changed();
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(reason) = compile() {
        eprintln!("\nthe laboratory cannot build its CUDA kernels: {reason}\n");
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    let image = Path::new(&env::var_os("OUT_DIR").unwrap_or_default()).join("naive.fatbin");
    if nvcc::is_docs_rs() {
        return std::fs::write(&image, []).map_err(|error| format!("{}: {error}", image.display()));
    }
    let nvcc = nvcc::Nvcc::find()?;
    let mut command = Command::new(&nvcc.path);
    command.args(["-std=c++17", "-O3", "-fatbin"]).args(nvcc.target_flags());
    nvcc::run(command.args(["kernels/naive.cu", "-o"]).arg(&image)).map(|_| ())
}
