//! Compiles the kernels: one fat binary for each source, with machine code for each architecture of the list that the
//! toolkit supports, and PTX of the lowest one for later GPUs.

#[path = "header.rs"]
mod header;
#[path = "nvcc.rs"]
mod nvcc;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nvcc::Nvcc;

/// The sources that become images; they include the `.cuh` files.
const SOURCES: [&str; 2] = ["kernels/pass.cu", "kernels/state.cu"];
/// Flags of nvcc that decide what an image contains, besides the architectures.
const FLAGS: [&str; 4] = ["-std=c++17", "-O3", "-fatbin", "-fmad=false"];
/// The file beside the images that says what they were compiled from.
const KEY: &str = "images.key";

/// Compiles the kernels, or ends the build with the reason.
pub(crate) fn build() {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=src/abi.rs");
    nvcc::rerun_if_env_changed();
    if let Err(reason) = compile() {
        println!("cargo:warning=gradblend: {}", reason.replace('\n', " | "));
        eprintln!("\ngradblend cannot build its CUDA kernels: {reason}\n");
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set; is this run by cargo?")?);
    let header = header::header();
    write(&out.join("abi.cuh"), header.as_bytes())?;
    let key_file = out.join(KEY);
    if nvcc::is_docs_rs() {
        write(&key_file, &[])?;
        for source in SOURCES {
            write(&image(&out, source), &[])?;
        }
        set_build_info("none", &[]);
        return Ok(());
    }
    let nvcc = Nvcc::find()?;
    let flags: Vec<String> = FLAGS.map(String::from).into_iter().chain(nvcc.target_flags()).collect();
    let key = nvcc.key(&flags, &header)?;
    if !has_images(&out, &key) {
        // The key is written last, so that interrupted work does not count.
        write(&key_file, &[])?;
        if !copy_images(&out, &key) {
            compile_images(&nvcc, &flags, &out)?;
        }
        write(&key_file, key.as_bytes())?;
    }
    set_build_info(&nvcc.version, &nvcc.architectures);
    Ok(())
}

fn compile_images(nvcc: &Nvcc, flags: &[String], out: &Path) -> Result<(), String> {
    let threads = env::var("NUM_JOBS").unwrap_or_else(|_| "1".into());
    for source in SOURCES {
        let mut command = Command::new(&nvcc.path);
        command.args(flags).args(["--threads", &threads, "-Ikernels", "-I"]).arg(out).arg(source);
        let output = nvcc::run(command.arg("-o").arg(image(out, source)))?;
        for line in output.lines().filter(|line| line.contains("warning")) {
            println!("cargo:warning={line}");
        }
    }
    Ok(())
}

/// Whether a folder has the images that `key` describes.
fn has_images(folder: &Path, key: &str) -> bool {
    fs::read_to_string(folder.join(KEY)).is_ok_and(|kept| kept == key)
        && SOURCES.iter().all(|source| image(folder, source).exists())
}

/// Copies the images from the output folder of another build of this crate, if one has them. Profiles and features change
/// that folder, not the images, which take minutes to compile.
fn copy_images(out: &Path, key: &str) -> bool {
    // TARGET/PROFILE/build/gradblend-HASH/out
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let Some(target) = out.ancestors().nth(4) else { return false };
    let builds = entries(target).flat_map(|profile| entries(&profile.join("build")).collect::<Vec<_>>());
    let other = builds.map(|build| build.join("out")).find(|other| has_images(other, key));
    other.is_some_and(|other| SOURCES.iter().all(|source| fs::copy(image(&other, source), image(out, source)).is_ok()))
}

/// The path of a source's image.
fn image(out: &Path, source: &str) -> PathBuf {
    out.join(Path::new(source).with_extension("fatbin").file_name().unwrap_or_default())
}

/// Passes the toolkit's version and the architectures to the crate, for its error messages.
fn set_build_info(version: &str, architectures: &[u32]) {
    let list: Vec<String> = architectures.iter().map(u32::to_string).collect();
    println!("cargo:rustc-env=GRADBLEND_TOOLKIT={version}");
    println!("cargo:rustc-env=GRADBLEND_ARCHITECTURES={}", list.join(" "));
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
