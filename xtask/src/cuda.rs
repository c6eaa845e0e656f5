//! Builds with the feature `cuda`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use cargo_metadata::Message;
use xshell::{Shell, cmd};

use crate::tools;

/// The packages and features of every build with CUDA. They are always the same, because other features of a package compile
/// it, and what depends on it, again.
pub(crate) const ALL: [&str; 5] = [
    "--package=gradblend",
    "--package=gradblend-testkit",
    "--package=gradblend-lab",
    "--features",
    "gradblend/cuda,gradblend/nccl,gradblend/capi,gradblend-testkit/cuda,gradblend-lab/cuda",
];

/// What a cargo command built.
#[derive(Default)]
pub(crate) struct Built {
    /// The folder with the kernels' images.
    pub(crate) images: Option<PathBuf>,
    /// Executables by the names of their targets.
    pub(crate) programs: BTreeMap<String, PathBuf>,
    /// The library for C.
    pub(crate) library: Option<PathBuf>,
}

impl Built {
    /// The executable of a target.
    pub(crate) fn program(&self, name: &str) -> Result<&PathBuf> {
        self.programs.get(name).with_context(|| format!("no program {name} was built"))
    }

    /// The kernels' images.
    pub(crate) fn images(&self) -> Result<Vec<PathBuf>> {
        tools::files(self.images.as_ref().context("no kernels were built")?, &["fatbin"])
    }
}

/// A shell whose nvcc takes a warning, a spill or a use of local memory as an error.
pub(crate) fn shell() -> Result<Shell> {
    let sh = tools::shell()?;
    sh.set_var("NVCC", tools::nvcc(&sh)?);
    sh.set_var("NVCC_APPEND_FLAGS", "-Werror all-warnings -Xptxas -warn-spills,-warn-lmem-usage");
    Ok(sh)
}

/// Runs a cargo command, and returns what it built.
pub(crate) fn build(sh: &Shell, arguments: &[&str]) -> Result<Built> {
    let text = cmd!(sh, "cargo {arguments...} --locked --message-format json-render-diagnostics").read()?;
    let mut built = Built::default();
    for message in Message::parse_stream(text.as_bytes()) {
        match message? {
            Message::BuildScriptExecuted(script) if script.env.iter().any(|(name, _)| name == "GRADBLEND_TOOLKIT") => {
                built.images = Some(script.out_dir.into());
            }
            Message::CompilerArtifact(artifact) => {
                if let Some(program) = artifact.executable {
                    built.programs.insert(artifact.target.name, program.into());
                } else if artifact.target.name == "gradblend" {
                    let shared = artifact.filenames.into_iter().find(|file| file.extension() == Some("so"));
                    built.library = shared.map(PathBuf::from).or(built.library);
                }
            }
            _ => {}
        }
    }
    Ok(built)
}

/// Compiles the kernels for every architecture.
pub(crate) fn kernels() -> Result<Built> {
    build(&shell()?, &[&["build"], &ALL[..]].concat())
}

/// Builds the library for C, with the C functions.
pub(crate) fn library() -> Result<PathBuf> {
    let built = build(&shell()?, &["rustc", "--features", "cuda,capi", "--crate-type", "cdylib"])?;
    built.library.context("no library was built")
}

/// Builds the test programs of the library.
pub(crate) fn tests() -> Result<Built> {
    build(&shell()?, &[&["test", "--no-run", "--lib", "--tests"], &ALL[..]].concat())
}
