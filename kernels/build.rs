//! Compiles the kernels into one image a source: machine code for each architecture that the toolkit knows of those
//! listed, and PTX of the lowest for those to come.

#[path = "header.rs"]
mod header;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compute capabilities that get machine code: A100, RTX 30, RTX 40, H100 and H200, B200, RTX 50.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// What is compiled, and what it includes.
const SOURCES: [&str; 2] = ["kernels/pass.cu", "kernels/state.cu"];

/// Compiles, or ends the build with what is missing.
pub(crate) fn build() {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=src/abi.rs");
    let read = ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "GRADBLEND_CUDA_ARCHS", "DOCS_RS"];
    for name in read.into_iter().chain(["NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "NVCC_CCBIN"]) {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if let Err(reason) = compile() {
        println!("cargo:warning=gradblend: {}", reason.replace('\n', " | "));
        eprintln!("\ngradblend cannot build its CUDA kernels: {reason}\n");
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set; is this run by cargo?")?);
    write(&out.join("abi.cuh"), header::header().as_bytes())?;
    if env::var_os("DOCS_RS").is_some() {
        // Documentation is built where no toolkit is; nothing runs there.
        for source in SOURCES {
            write(&image(&out, source), &[])?;
        }
        return tell("none", &[]);
    }
    let nvcc = find()?;
    let version = run(Command::new(&nvcc).arg("--version"))?;
    let version = version.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    let version = version.ok_or_else(|| format!("{} --version names no release", nvcc.display()))?.to_owned();
    let known = run(Command::new(&nvcc).arg("--list-gpu-arch"))?;
    let known: Vec<u32> = known.lines().filter_map(|line| line.trim().strip_prefix("compute_")?.parse().ok()).collect();
    let architectures = architectures(&known, &version)?;
    let threads = env::var("NUM_JOBS").unwrap_or_else(|_| "1".into());
    for source in SOURCES {
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "-fatbin", "-fmad=false", "--threads", &threads]);
        for architecture in &architectures {
            command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
        }
        command.arg(format!("-gencode=arch=compute_{0},code=compute_{0}", architectures[0]));
        command.arg("-Ikernels").arg("-I").arg(&out).arg(source);
        let said = run(command.arg("-o").arg(image(&out, source)))?;
        for line in said.lines().filter(|line| line.contains("warning")) {
            println!("cargo:warning={line}");
        }
    }
    tell(&version, &architectures)
}

/// Where a source's image goes.
fn image(out: &Path, source: &str) -> PathBuf {
    out.join(Path::new(source).with_extension("fatbin").file_name().unwrap_or_default())
}

/// Hands what was built to the crate, for its error messages.
fn tell(version: &str, architectures: &[u32]) -> Result<(), String> {
    let list: Vec<String> = architectures.iter().map(u32::to_string).collect();
    println!("cargo:rustc-env=GRADBLEND_TOOLKIT={version}");
    println!("cargo:rustc-env=GRADBLEND_ARCHITECTURES={}", list.join(" "));
    Ok(())
}

/// The first nvcc among those that the environment names.
fn find() -> Result<PathBuf, String> {
    if let Some(nvcc) = env::var_os("NVCC").filter(|nvcc| !nvcc.is_empty()) {
        let nvcc = PathBuf::from(nvcc);
        return if runs(&nvcc) { Ok(nvcc) } else { Err(format!("NVCC is {}, which does not run", nvcc.display())) };
    }
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| Path::new(&home).join("bin"));
    let path: Vec<PathBuf> = env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    homes
        .chain(path)
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .map(|bin| bin.join(&name))
        .find(|nvcc| runs(nvcc))
        .ok_or_else(|| {
            "nvcc was not found: looked at NVCC, in bin of CUDA_HOME and of CUDA_PATH, on PATH, and in \
             /usr/local/cuda/bin. Install a CUDA toolkit (12.8 or newer has all architectures), or build without the \
             feature `cuda`"
                .into()
        })
}

fn runs(nvcc: &Path) -> bool {
    Command::new(nvcc).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// The architectures to compile for, ascending: those listed as far as the toolkit knows them, or those asked for.
fn architectures(known: &[u32], version: &str) -> Result<Vec<u32>, String> {
    let mut chosen = match env::var("GRADBLEND_CUDA_ARCHS") {
        Ok(list) if !list.trim().is_empty() => {
            let parse = |one: &str| {
                let number: u32 = one.parse().map_err(|_| {
                    format!("GRADBLEND_CUDA_ARCHS has {one:?}; expected compute capabilities such as \"80 90\"")
                })?;
                if number < 80 {
                    return Err(format!("GRADBLEND_CUDA_ARCHS has {number}; the kernels need 80 or higher"));
                }
                if !known.contains(&number) {
                    return Err(format!("GRADBLEND_CUDA_ARCHS has {number}, which nvcc {version} does not know"));
                }
                Ok(number)
            };
            let words = list.split(|c: char| c == ',' || c == ';' || c.is_whitespace()).filter(|word| !word.is_empty());
            words.map(parse).collect::<Result<Vec<u32>, String>>()?
        }
        _ => ARCHITECTURES.into_iter().filter(|architecture| known.contains(architecture)).collect(),
    };
    chosen.sort_unstable();
    chosen.dedup();
    if chosen.is_empty() {
        return Err(format!("nvcc {version} knows none of the architectures {ARCHITECTURES:?}; a newer one is needed"));
    }
    Ok(chosen)
}

/// What a command prints, both streams.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(said) } else { Err(format!("{command:?}: {}\n{said}", output.status)) }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
