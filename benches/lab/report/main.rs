//! Makes tables and plots of raw benchmark results, whose format benches/README.md describes.
//!
//! `cargo run --release --example report -- FILE... [--out DIR] [--readme README.md] [--check]`

mod axes;
mod figures;
mod page;
mod plots;
mod raw;
mod readme;
mod share;
mod speedup;
mod table;
mod tensors;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::figures::Figures;

/// Makes tables and plots of raw benchmark results.
#[derive(Parser)]
#[command(name = "report")]
struct Args {
    /// Raw results: STEM.jsonl becomes STEM.md, STEM-share.svg, STEM-tensors.svg and STEM-speedup.svg.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Where they are written [default: beside each FILE].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Fills what is between `<!-- report: begin STEM -->` and `<!-- report: end -->` in this file, too; the newest
    /// results alone may be in it.
    #[arg(long, value_name = "FILE")]
    readme: Option<PathBuf>,
    /// Writes nothing; fails if anything that would be written differs from what is there.
    #[arg(long)]
    check: bool,
}

/// A file as it should be: its content, or not there.
struct Output {
    path: PathBuf,
    content: Option<String>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let outputs = outputs(&args)?;
    if args.check {
        let differ: Vec<&Output> = outputs.iter().filter(|output| !output.is_there()).collect();
        for output in &differ {
            let what = if output.content.is_some() { "differs" } else { "should not be there" };
            eprintln!("{}: {what}", output.path.display());
        }
        return Ok(if differ.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    for output in outputs.iter().filter(|output| !output.is_there()) {
        output.write()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// All of them, before the first is written.
fn outputs(args: &Args) -> Result<Vec<Output>> {
    let mut outputs = Vec::new();
    let mut filled = Vec::new();
    let mut readme = match &args.readme {
        Some(path) => Some((path, std::fs::read_to_string(path).with_context(|| path.display().to_string())?)),
        None => None,
    };
    for file in &args.files {
        let name = file.display().to_string();
        let stem = file.file_stem().and_then(|stem| stem.to_str()).with_context(|| format!("{name}: no name"))?;
        let content = std::fs::read_to_string(file).with_context(|| name.clone())?;
        let sections = figures::newest(raw::parse(&content, &name)?);
        let figures = Figures::new(&sections);
        let plots = plots::plots(&figures)?;
        let beside = file.parent().unwrap_or(Path::new(""));
        let folder = args.out.as_deref().unwrap_or(beside);
        outputs.push(Output {
            path: folder.join(format!("{stem}.md")),
            content: Some(page::page(stem, &figures, &plots)),
        });
        if let Some((path, text)) = readme.as_mut().filter(|(_, text)| readme::stems(text).contains(&stem)) {
            filled.push(stem.to_owned());
            let way = readme::way(path.parent().unwrap_or(Path::new("")), folder)?;
            *text = readme::replace(text, stem, &readme::block(stem, &figures, &plots, &way))
                .with_context(|| path.display().to_string())?;
        }
        for plot in plots {
            if let Err(reason) = &plot.svg {
                eprintln!("{name}: no plot of {}: {reason}", plot.name);
            }
            outputs.push(Output { path: folder.join(plot.file(stem)), content: plot.svg.ok() });
        }
    }
    if let Some((path, text)) = &readme {
        for stem in readme::stems(text) {
            ensure!(filled.iter().any(|name| name == stem), "{}: no FILE is named {stem}", path.display());
        }
        ensure!(!filled.is_empty(), "{} has no block for any FILE", path.display());
    }
    outputs.extend(readme.map(|(path, text)| Output { path: path.clone(), content: Some(text) }));
    let mut paths = args.files.iter().map(|file| readme::whole(file)).collect::<Result<BTreeSet<PathBuf>>>()?;
    for Output { path, .. } in &outputs {
        ensure!(paths.insert(readme::whole(path)?), "{} would be written over", path.display());
    }
    Ok(outputs)
}

impl Output {
    fn is_there(&self) -> bool {
        match &self.content {
            Some(content) => std::fs::read(&self.path).is_ok_and(|there| there == content.as_bytes()),
            None => !self.path.exists(),
        }
    }

    /// A plot of an earlier result would be taken for one of this.
    fn write(&self) -> Result<()> {
        let at = || self.path.display().to_string();
        let Some(content) = &self.content else {
            println!("removing {}", at());
            return std::fs::remove_file(&self.path).with_context(at);
        };
        if let Some(folder) = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        println!("writing {}", at());
        std::fs::write(&self.path, content).with_context(at)
    }
}
