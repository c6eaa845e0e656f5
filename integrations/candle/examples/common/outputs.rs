//! The files that an example writes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// The files of a run: those in the folder of `--out`, and that of `--json`.
pub(crate) struct Outputs {
    pub(crate) folder: PathBuf,
    json: Option<(PathBuf, File)>,
}

impl Outputs {
    /// Opens all files that will be written, without changing them, so that a mistake is told before the work. `inputs`
    /// are files that nothing may replace.
    pub(crate) fn open(folder: &Path, names: &[&str], json: Option<&Path>, inputs: &[PathBuf]) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot write the folder {}", folder.display()))?;
        let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
        for path in &paths {
            open(path)?;
            if let Some(input) = inputs.iter().find(|input| same(path, input)) {
                bail!("--out {} would replace {}", folder.display(), input.display());
            }
        }
        let json = json.map(|path| Ok::<_, anyhow::Error>((path.to_owned(), open(path)?))).transpose()?;
        if let Some((path, _)) = &json
            && let Some(other) = paths.iter().chain(inputs).find(|other| same(path, other))
        {
            bail!("--json {} would replace {}", path.display(), other.display());
        }
        Ok(Outputs { folder: folder.to_owned(), json })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes the file of `--json`, if there is one, and returns its path.
    pub(crate) fn write_json(&mut self, value: &impl Serialize) -> Result<Option<PathBuf>> {
        let Some((path, file)) = &mut self.json else { return Ok(None) };
        let json = serde_json::to_string_pretty(value)? + "\n";
        // What is no file, such as a pipe, has no length.
        let cleared = if file.metadata().is_ok_and(|metadata| metadata.is_file()) { file.set_len(0) } else { Ok(()) };
        cleared
            .and_then(|()| file.write_all(json.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Some(path.clone()))
    }
}

fn open(path: &Path) -> Result<File> {
    let file = File::options().write(true).create(true).truncate(false).open(path);
    file.with_context(|| format!("cannot write {}", path.display()))
}

fn same(a: &Path, b: &Path) -> bool {
    a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}
