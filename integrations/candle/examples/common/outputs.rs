//! The files that an example writes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// The result of each run, and the tables.
pub(crate) const RUNS: &str = "runs.jsonl";
pub(crate) const TABLES: &str = "results.md";

/// The files of a run: those in the folder of `--out`, and that of `--json`.
pub(crate) struct Outputs {
    pub(crate) folder: PathBuf,
    /// The names of those in the folder.
    names: Vec<String>,
    json: Option<(PathBuf, File)>,
}

impl Outputs {
    /// Opens all files that will be written, without changing them, so that a mistake is told before the work. `plots` are
    /// names in the folder, `inputs` files that nothing may replace.
    pub(crate) fn open(folder: &Path, plots: &[&str], json: Option<&Path>, inputs: &[PathBuf]) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot write the folder {}", folder.display()))?;
        let names: Vec<String> = plots.iter().chain(&[RUNS, TABLES]).map(|name| (*name).to_owned()).collect();
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
        Ok(Outputs { folder: folder.to_owned(), names, json })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes the tables and the file of `--json`, and prints what is to be printed. `drawn` is whether the plots were.
    pub(crate) fn finish(
        mut self,
        drawn: Result<()>,
        tables: &str,
        printed: &str,
        json: &impl Serialize,
    ) -> Result<()> {
        // Before the tables are printed, whose reader may have gone; and the tables even where a file cannot be written.
        let path = self.path(TABLES);
        let written = fs::write(&path, tables).with_context(|| format!("cannot write {}", path.display()));
        let json = self.write_json(json);
        println!("\n{printed}");
        drawn.with_context(|| format!("cannot draw plots in {}", self.folder.display()))?;
        written?;
        if let Some(path) = json? {
            println!("json: {}", path.display());
        }
        println!("in {}: {}", self.folder.display(), self.names.join(", "));
        Ok(())
    }

    /// Writes the file of `--json`, if there is one, and returns its path.
    fn write_json(&mut self, value: &impl Serialize) -> Result<Option<PathBuf>> {
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
