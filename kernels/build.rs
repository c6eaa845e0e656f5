//! Compiles the kernels: one fat binary for each source, with machine code for each architecture of the list that the
//! toolkit supports, and PTX of the lowest one for later GPUs.

#[path = "header.rs"]
mod header;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compute capabilities that get machine code: A100, RTX 30, RTX 40, H100 and H200, B200, RTX 50.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// The sources that become images; they include the `.cuh` files.
const SOURCES: [&str; 2] = ["kernels/pass.cu", "kernels/state.cu"];
/// Flags of nvcc that decide what an image contains, besides the architectures.
const FLAGS: [&str; 4] = ["-std=c++17", "-O3", "-fatbin", "-fmad=false"];
/// The file beside the images that says what they were compiled from.
const KEY: &str = "images.key";
/// Variables that nvcc reads itself.
const NVCC_VARIABLES: [&str; 3] = ["NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "NVCC_CCBIN"];

/// Compiles the kernels, or ends the build with the reason.
pub(crate) fn build() {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=src/abi.rs");
    let read = ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "GRADBLEND_CUDA_ARCHS", "DOCS_RS"];
    for name in read.into_iter().chain(NVCC_VARIABLES) {
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
    let header = header::header();
    write(&out.join("abi.cuh"), header.as_bytes())?;
    let key_file = out.join(KEY);
    if env::var_os("DOCS_RS").is_some() {
        // docs.rs has no toolkit, and runs nothing.
        write(&key_file, &[])?;
        for source in SOURCES {
            write(&image(&out, source), &[])?;
        }
        set_build_info("none", &[]);
        return Ok(());
    }
    let nvcc = find_nvcc()?;
    let version_text = run(Command::new(&nvcc).arg("--version"))?;
    let version = version_text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    let version = version.ok_or_else(|| format!("{} --version names no release", nvcc.display()))?;
    let supported = run(Command::new(&nvcc).arg("--list-gpu-arch"))?;
    let supported: Vec<u32> =
        supported.lines().filter_map(|line| line.trim().strip_prefix("compute_")?.parse().ok()).collect();
    let architectures = architectures(&supported, version)?;
    let mut flags: Vec<String> = FLAGS.map(String::from).to_vec();
    for architecture in &architectures {
        flags.push(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
    }
    flags.push(format!("-gencode=arch=compute_{0},code=compute_{0}", architectures[0]));
    let key = key(&version_text, &flags, &header)?;
    if !has_images(&out, &key) && !copy_images(&out, &key) {
        write(&key_file, &[])?;
        let threads = env::var("NUM_JOBS").unwrap_or_else(|_| "1".into());
        for source in SOURCES {
            let mut command = Command::new(&nvcc);
            command.args(&flags).args(["--threads", &threads, "-Ikernels", "-I"]).arg(&out).arg(source);
            let output = run(command.arg("-o").arg(image(&out, source)))?;
            for line in output.lines().filter(|line| line.contains("warning")) {
                println!("cargo:warning={line}");
            }
        }
        write(&key_file, key.as_bytes())?;
    }
    set_build_info(version, &architectures);
    Ok(())
}

/// All that decides the contents of the images. The environment does so only by these variables: another `PATH` with
/// the same version of nvcc does not compile again.
fn key(version: &str, flags: &[String], header: &str) -> Result<String, String> {
    let mut key = format!("{version}\n{flags:?}\n{header}\n");
    for name in NVCC_VARIABLES {
        key += &format!("{name}={:?}\n", env::var_os(name));
    }
    let folder = fs::read_dir("kernels").map_err(|error| format!("kernels: {error}"))?;
    let mut paths: Vec<PathBuf> = folder.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|end| end == "cu" || end == "cuh")) {
        let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        key += &format!("{}\n{text}\n", path.display());
    }
    Ok(key)
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
    let Some(other) = builds.map(|build| build.join("out")).find(|other| other != out && has_images(other, key)) else {
        return false;
    };
    // The key last, so that an interrupted copy does not count.
    fs::write(out.join(KEY), []).is_ok()
        && SOURCES.iter().all(|source| fs::copy(image(&other, source), image(out, source)).is_ok())
        && fs::write(out.join(KEY), key).is_ok()
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

/// The first nvcc that runs, in the order that the error message names.
fn find_nvcc() -> Result<PathBuf, String> {
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

/// The architectures to compile for, ascending: those of `GRADBLEND_CUDA_ARCHS`, or else those of the list that the toolkit
/// supports.
fn architectures(supported: &[u32], version: &str) -> Result<Vec<u32>, String> {
    let mut chosen = match env::var("GRADBLEND_CUDA_ARCHS") {
        Ok(list) if !list.trim().is_empty() => {
            let parse = |one: &str| {
                let number: u32 = one.parse().map_err(|_| {
                    format!("GRADBLEND_CUDA_ARCHS has {one:?}; expected compute capabilities such as \"80 90\"")
                })?;
                if number < 80 {
                    return Err(format!("GRADBLEND_CUDA_ARCHS has {number}; the kernels need 80 or higher"));
                }
                if !supported.contains(&number) {
                    return Err(format!("GRADBLEND_CUDA_ARCHS has {number}, which nvcc {version} does not know"));
                }
                Ok(number)
            };
            let words = list.split(|c: char| c == ',' || c == ';' || c.is_whitespace()).filter(|word| !word.is_empty());
            words.map(parse).collect::<Result<Vec<u32>, String>>()?
        }
        _ => ARCHITECTURES.into_iter().filter(|architecture| supported.contains(architecture)).collect(),
    };
    chosen.sort_unstable();
    chosen.dedup();
    if chosen.is_empty() {
        return Err(format!("nvcc {version} knows none of the architectures {ARCHITECTURES:?}; a newer one is needed"));
    }
    Ok(chosen)
}

/// The output of a command, stdout then stderr.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(text) } else { Err(format!("{command:?}: {}\n{text}", output.status)) }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}
