//! Finds nvcc, and the architectures to compile for. The build scripts of gradblend and of benches/lab include this file.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compute capabilities that get machine code: A100, RTX 30, RTX 40, H100 and H200, B200, RTX 50.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];
/// Variables that this file reads.
const OWN_VARIABLES: [&str; 6] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "GRADBLEND_CUDA_ARCHS", "DOCS_RS"];
/// Variables that nvcc reads itself.
const NVCC_VARIABLES: [&str; 3] = ["NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "NVCC_CCBIN"];

/// A toolkit's compiler, and what it is to compile for.
pub(crate) struct Nvcc {
    pub(crate) path: PathBuf,
    /// What `nvcc --version` prints.
    pub(crate) version_text: String,
    /// Of the release, such as 12.8.
    pub(crate) version: String,
    /// Ascending, not empty.
    pub(crate) architectures: Vec<u32>,
}

impl Nvcc {
    /// The nvcc that the environment names, or an error that says what is missing.
    pub(crate) fn find() -> Result<Self, String> {
        let path = find()?;
        let version_text = run(Command::new(&path).arg("--version"))?;
        let version = version_text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
        let version = version.ok_or_else(|| format!("{} --version names no release", path.display()))?.to_owned();
        let supported = run(Command::new(&path).arg("--list-gpu-arch"))?;
        let supported: Vec<u32> =
            supported.lines().filter_map(|line| line.trim().strip_prefix("compute_")?.parse().ok()).collect();
        let architectures = architectures(&supported, &version)?;
        Ok(Nvcc { path, version_text, version, architectures })
    }

    /// Flags for machine code of each architecture, and PTX of the lowest one for later GPUs. The kernels use nothing that
    /// only some architectures have, so nvcc translates them to PTX once for all up to 90, and once more for later
    /// ones, which have another compiler to PTX. To do so for each architecture would take most of the build's time.
    pub(crate) fn target_flags(&self) -> Vec<String> {
        let lowest = self.architectures[0];
        let flag = |family: &[u32]| {
            let ptx = (family[0] == lowest).then(|| format!("compute_{lowest}"));
            let machine_code = family.iter().map(|number| format!("sm_{number}"));
            let codes: Vec<String> = ptx.into_iter().chain(machine_code).collect();
            format!("-gencode=arch=compute_{},code=[{}]", family[0], codes.join(","))
        };
        self.architectures.chunk_by(|before, after| (*before < 100) == (*after < 100)).map(flag).collect()
    }

    /// All that decides the contents of images of the folder `kernels`; `header` is one that is not there. The environment
    /// does so only by these variables: another `PATH` with the same version of nvcc does not compile again.
    pub(crate) fn key(&self, flags: &[String], header: &str) -> Result<String, String> {
        let mut key = format!("{}\n{flags:?}\n{header}\n", self.version_text);
        for name in NVCC_VARIABLES {
            key += &format!("{name}={:?}\n", env::var_os(name).unwrap_or_default());
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
}

/// Tells Cargo which variables decide what is compiled.
pub(crate) fn rerun_if_env_changed() {
    for name in OWN_VARIABLES.into_iter().chain(NVCC_VARIABLES) {
        println!("cargo:rerun-if-env-changed={name}");
    }
}

/// Whether this is a build of docs.rs, which has no toolkit and runs nothing: images are empty files there.
pub(crate) fn is_docs_rs() -> bool {
    env::var_os("DOCS_RS").is_some()
}

/// The nvcc of the first variable that is set, or else the first one that runs. A variable that names none is an error: to go
/// on would compile with another toolkit than its user asked for.
fn find() -> Result<PathBuf, String> {
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        let Some(value) = env::var_os(variable).filter(|value| !value.is_empty()) else { continue };
        let (value, is_file) = (PathBuf::from(value), variable == "NVCC");
        let nvcc = if is_file { value.clone() } else { value.join("bin").join(&name) };
        return match reason_not_to_run(&nvcc) {
            None => Ok(nvcc),
            Some(reason) if is_file => Err(format!("NVCC is {}, which does not run: {reason}", value.display())),
            Some(reason) => Err(format!(
                "{variable} is {}, but {} does not run: {reason}. Correct {variable}, or unset it",
                value.display(),
                nvcc.display()
            )),
        };
    }
    let path: Vec<PathBuf> = env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    path.into_iter()
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .map(|bin| bin.join(&name))
        .find(|nvcc| reason_not_to_run(nvcc).is_none())
        .ok_or_else(|| {
            "nvcc was not found: NVCC, CUDA_HOME and CUDA_PATH are not set, and there is none on PATH or in \
             /usr/local/cuda/bin. Install a CUDA toolkit (12.8 or newer has all architectures), or build without the \
             feature `cuda`"
                .into()
        })
}

fn reason_not_to_run(nvcc: &Path) -> Option<String> {
    if nvcc.is_dir() {
        return Some("it is a folder, not the program".into());
    }
    match Command::new(nvcc).arg("--version").output() {
        Ok(output) => (!output.status.success()).then(|| output.status.to_string()),
        Err(error) => Some(error.to_string()),
    }
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
            let chosen = words.map(parse).collect::<Result<Vec<u32>, String>>()?;
            if chosen.is_empty() {
                return Err("GRADBLEND_CUDA_ARCHS has no compute capability; expected some such as \"80 90\"".into());
            }
            chosen
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

/// The output of a command, stdout then stderr. An error gives it before the command, which is long.
pub(crate) fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{error}: {command:?}"))?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let failed = || format!("{}\n{} of {command:?}", text.trim_end(), output.status);
    if output.status.success() { Ok(text) } else { Err(failed()) }
}
