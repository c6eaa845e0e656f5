//! Compiles the naive CUDA kernels where the feature `cuda` asks for them. nvcc is found as gradblend's own build finds
//! it, whose error says what is missing.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "NVCC_CCBIN"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let image = Path::new(&env::var_os("OUT_DIR").unwrap_or_default()).join("naive.fatbin");
    // Machine code for each major architecture of the toolkit, and PTX for those to come.
    let nvcc = Command::new(nvcc())
        .args(["-std=c++17", "-O3", "-arch=all-major", "-fatbin", "kernels/naive.cu", "-o"])
        .arg(&image)
        .status();
    if !nvcc.as_ref().is_ok_and(|status| status.success()) {
        eprintln!("the naive kernels do not compile: {nvcc:?}");
        std::process::exit(1);
    }
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC").filter(|nvcc| !nvcc.is_empty()) {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let path = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect::<Vec<_>>();
    let folders = homes.map(|home| home.join("bin")).chain(path).chain(["/usr/local/cuda/bin".into()]);
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    folders.map(|folder| folder.join(&name)).find(|nvcc| nvcc.is_file()).unwrap_or(name.into())
}
