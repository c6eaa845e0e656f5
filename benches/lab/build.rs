//! Compiles the naive CUDA kernels where the feature `cuda` asks for them, by the nvcc and for the architectures of
//! gradblend's own build.

#[path = "../../kernels/nvcc.rs"]
#[allow(dead_code, reason = "only gradblend's build needs the version")]
mod nvcc;

use std::env;
use std::fs;
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
    let key_file = image.with_extension("key");
    let write = |path: &Path, text: &str| fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()));
    if nvcc::is_docs_rs() {
        write(&key_file, "")?;
        return write(&image, "");
    }
    let nvcc = nvcc::Nvcc::find()?;
    let flags: Vec<String> =
        ["-std=c++17", "-O3", "-fatbin"].map(String::from).into_iter().chain(nvcc.target_flags()).collect();
    let key = nvcc.key(&flags, "")?;
    if image.exists() && fs::read_to_string(&key_file).is_ok_and(|kept| kept == key) {
        return Ok(());
    }
    nvcc::run(Command::new(&nvcc.path).args(&flags).args(["kernels/naive.cu", "-o"]).arg(&image))?;
    write(&key_file, &key)
}
