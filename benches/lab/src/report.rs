//! Tables of raw results, and the summary in a document.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::case::{self, Operation};
use crate::plot;
use crate::record::{Skipped, Time};
use crate::results::{Cell, OURS, Results, Row, distinct, median, quantile};

/// Options of `report`.
#[derive(Args)]
pub(crate) struct Options {
    /// Raw results; NAME.jsonl gets NAME.md and NAME.svg beside it
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// A document: the summary goes between its lines `<!-- report: begin NAME -->` and `<!-- report: end NAME -->`
    #[arg(long, value_name = "DOCUMENT")]
    write: Option<PathBuf>,
    /// Write nothing; fail if a file is not what this would write
    #[arg(long)]
    check: bool,
}

pub(crate) fn report(options: &Options) -> Result<()> {
    let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| path.display().to_string());
    let mut document = options.write.as_ref().map(read).transpose()?;
    let mut files = Vec::new();
    for path in &options.files {
        let name = path.file_stem().and_then(|stem| stem.to_str());
        let name = name.with_context(|| format!("{} is not a file of raw results", path.display()))?;
        let is_written = path.extension().is_some_and(|end| end == "md" || end == "svg");
        ensure!(!is_written, "{}: the report would replace it; name raw results NAME.jsonl", path.display());
        let results = Results::read(path)?;
        files.push((path.with_extension("md"), results.page(name)));
        files.push((path.with_extension("svg"), plot::draw(&results)?));
        if let (Some(text), Some(target)) = (&mut document, &options.write) {
            let page = relative(target, &path.with_extension("md"))?;
            *text = replace(text, name, &results.summary(&page)).with_context(|| target.display().to_string())?;
        }
    }
    files.extend(options.write.clone().zip(document));
    if !options.check {
        // All are opened before any is changed.
        let open = |path| OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let context = |path: &Path| format!("cannot write {}", path.display());
        let opened = files.iter().map(|(path, _)| open(path).with_context(|| context(path)));
        let opened = opened.collect::<Result<Vec<_>>>()?;
        for (mut file, (path, text)) in opened.into_iter().zip(&files) {
            file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).with_context(|| context(path))?;
        }
        return Ok(());
    }
    for (path, text) in files {
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            println!("{}: up to date", path.display());
        } else {
            bail!("{} is not up to date: run the report without --check", path.display());
        }
    }
    Ok(())
}

impl Results {
    /// The few rows and columns that a document shows.
    fn summary(&self, page: &str) -> String {
        // Baselines by library, which is the first word of a name.
        let library = |time: &Time| time.implementation.split([' ', ',']).next().unwrap_or_default().to_owned();
        let baselines = || self.rows.iter().flat_map(|row| row.baselines());
        let libraries = distinct(baselines().map(|cell| library(&cell.time)));
        let mut table = vec![["operation", "case", "limit", OURS, "share of the limit"].map(String::from).to_vec()];
        table[0].extend(libraries.iter().map(|name| format!("over {name}")));
        for row in self.rows.iter().filter(|row| case::in_summary(row.case.operation, &row.case.case)) {
            let mut cells = row.head();
            cells.extend(libraries.iter().map(|name| {
                let of_library = row.baselines().filter(|cell| library(&cell.time) == *name);
                let fastest = of_library.filter_map(|cell| Some((cell.ratio?, &cell.time.implementation)));
                let Some((ratio, fastest)) = fastest.min_by(|a, b| a.0.total_cmp(&b.0)) else { return "-".into() };
                let which = fastest.strip_prefix(name.as_str()).unwrap_or_default().trim();
                let which = if which.is_empty() { String::new() } else { format!(" ({which})") };
                format!("{}x{which}", digits(ratio))
            }));
            table.push(cells);
        }
        let plot = page.replace(".md", ".svg");
        let caption = self.caption();
        format!("{caption} ([all rows]({page}), [plot]({plot})):\n\n{}", markdown(&table))
    }

    /// Everything.
    fn page(&self, name: &str) -> String {
        let mut page = format!(
            "# {name}\n\n{}.\n\nRatios are times over gradblend's, the median of the rounds of one run; the share is \
             the limit's. ± is half the interquartile range. Errors are relative to the sum of the absolute terms.\n\n\
             ![plot]({name}.svg)\n",
            self.caption()
        );
        for operation in Operation::ALL {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.case.operation == operation).collect();
            let others = distinct(rows.iter().flat_map(|row| &row.cells).map(|cell| cell.time.implementation.clone()));
            let others: Vec<String> = others.into_iter().filter(|name| name != OURS).collect();
            let mut table = vec![["case", "tensors", "bytes", "limit", OURS, "share"].map(String::from).to_vec()];
            table[0].extend(others.iter().cloned());
            let mut details = vec![
                ["case", "implementation", "time", "host", "memory", "error c", "d", "blend"]
                    .map(String::from)
                    .to_vec(),
            ];
            for row in rows {
                let [_, case, limit, ours, share] = row.head().try_into().unwrap_or_default();
                let bytes = format!("{:.3e}", row.case.bytes as f64);
                let mut cells = vec![case.clone(), row.case.tensors.to_string(), bytes, limit, ours, share];
                cells.extend(others.iter().map(|name| {
                    let ratio = row.find(name).and_then(|cell| cell.ratio);
                    ratio.map_or("-".into(), |ratio| format!("{}x", digits(ratio)))
                }));
                table.push(cells);
                for Cell { time, .. } in &row.cells {
                    let error = |error: Option<f64>| error.map_or("-".into(), |error| format!("{error:.1e}"));
                    let microseconds = |ns: f64| format!("{} µs", digits(ns / 1e3));
                    details.push(vec![
                        case.clone(),
                        time.implementation.clone(),
                        median(&time.times_ns).map_or("-".into(), microseconds) + &spread(&time.times_ns),
                        time.host_ns.as_deref().and_then(median).map_or("-".into(), microseconds),
                        time.extra_bytes.map_or("-".into(), |bytes| format!("{:.1e}", bytes as f64)),
                        error(time.errors.error_c),
                        error(time.errors.error_d),
                        error(time.errors.error_blend),
                    ]);
                }
            }
            if table.len() > 1 {
                page += &format!("\n## {operation}\n\n{}\n{}", markdown(&table), markdown(&details));
            }
        }
        if !self.skipped.is_empty() {
            page += "\n## Skipped\n\n";
            for Skipped { operation, case, implementation, reason } in &self.skipped {
                page += &format!("- `{operation}` {case}, {}: {reason}\n", implementation.as_deref().unwrap_or("all"));
            }
        }
        page += "\n## Runs\n\n";
        for run in &self.runs {
            page += &format!("- {}, commit {}, {}: `{}`\n", run.date, run.commit, run.machine.software, run.command);
        }
        page
    }
}

impl Row {
    /// Operation, case, the limit's bandwidth, gradblend's, and the share of the limit.
    fn head(&self) -> Vec<String> {
        let bandwidth =
            |time: &Time| median(&time.times_ns).map(|ns| format!("{} GB/s", digits(self.case.bytes as f64 / ns)));
        let ours = self.find(OURS).map(|cell| bandwidth(&cell.time).unwrap_or_default() + &spread(&cell.time.times_ns));
        vec![
            format!("`{}`", self.case.operation),
            self.case.case.clone(),
            self.limit().and_then(|(cell, _)| bandwidth(&cell.time)).unwrap_or("-".into()),
            ours.unwrap_or("-".into()),
            self.limit().map_or("-".into(), |(_, ratio)| format!("{ratio:.2}")),
        ]
    }
}

/// Half the interquartile range, in percent of the median.
fn spread(values: &[f64]) -> String {
    let quartiles = [0.25, 0.5, 0.75].map(|part| quantile(values, part).unwrap_or(f64::NAN));
    format!(" ± {:.1} %", 50.0 * (quartiles[2] - quartiles[0]) / quartiles[1])
}

/// Three significant digits, without an exponent.
fn digits(value: f64) -> String {
    let decimals = (2 - value.abs().log10().floor() as i32).clamp(0, 2) as usize;
    format!("{value:.decimals$}")
}

/// A table whose first row is its head. Columns from the third on are aligned to the right.
fn markdown(rows: &[Vec<String>]) -> String {
    let line = |row: &Vec<String>| format!("| {} |\n", row.join(" | "));
    let marks: Vec<&str> = (0..rows[0].len()).map(|column| if column < 2 { "---" } else { "---:" }).collect();
    let rest: String = rows[1..].iter().map(line).collect();
    format!("{}|{}|\n{rest}", line(&rows[0]), marks.join("|"))
}

/// `document` with new text between the markers of `name`.
fn replace(document: &str, name: &str, text: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- report: begin {name} -->\n"), format!("<!-- report: end {name} -->"));
    let (before, rest) = document.split_once(&begin).with_context(|| format!("no line {}", begin.trim()))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("no line {end}"))?;
    Ok(format!("{before}{begin}{text}{end}{after}"))
}

/// The path of a file as a link in `document`; both are given from the same folder.
fn relative(document: &Path, file: &Path) -> Result<String> {
    ensure!(document.is_relative() == file.is_relative(), "both paths absolute, or both relative");
    let folder: Vec<_> = document.parent().unwrap_or(Path::new("")).components().collect();
    let file: Vec<_> = file.components().collect();
    let shared = folder.iter().zip(&file).take_while(|(a, b)| a == b).count();
    let down = file[shared..].iter().map(|part| part.as_os_str().to_string_lossy().into_owned());
    let parts: Vec<String> = folder[shared..].iter().map(|_| "..".into()).chain(down).collect();
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::{CASE, RUN, parse, time};

    #[test]
    fn ratios_are_of_the_same_round_and_run() -> Result<()> {
        let (read, ours) = (time("read", "limit", "[8,9,10]"), time(OURS, "ours", "[10,10,20]"));
        let (a, b) = (time("PyTorch loop", "baseline", "[50]"), time("PyTorch foreach", "baseline", "[60]"));
        let results = parse(&[RUN, CASE, &read, &ours, &a])?;
        let summary = results.summary("results/x.md");
        assert!(summary.starts_with("CPU, 2026-01-02, commit abc ([all rows](results/x.md), [plot](results/x.svg)):"));
        let row = "| `step` | ResNet-50/K3/bf16 | 66.7 GB/s | 60.0 GB/s ± 25.0 % | 0.80 | 5.00x (loop) |";
        assert!(summary.contains(row), "{summary}");
        // A run without gradblend cannot be compared.
        let other = RUN.replace("cargo run", "python3 x");
        let results = parse(&[RUN, CASE, &read, &ours, &a, &other, &b])?;
        assert_eq!(results.rows[0].find("PyTorch foreach").map(|cell| cell.ratio), Some(None));
        // A second run of the same program replaces the first.
        assert_eq!(parse(&[RUN, CASE, &read, &ours, RUN, &a])?.rows[0].cells.len(), 1);
        Ok(())
    }

    #[test]
    fn only_the_text_between_the_markers_changes() -> Result<()> {
        let document = "a\n<!-- report: begin x -->\nold\n<!-- report: end x -->\nb\n";
        assert_eq!(replace(document, "x", "new\n")?, document.replace("old", "new"));
        assert!(replace(document, "y", "").is_err());
        assert_eq!(relative(Path::new("docs/a.md"), Path::new("benches/results/x.md"))?, "../benches/results/x.md");
        assert_eq!(relative(Path::new("a.md"), Path::new("x.md"))?, "x.md");
        Ok(())
    }

    #[test]
    fn three_digits() {
        assert_eq!([31.24, 3.0, 1234.5, 0.0995].map(digits), ["31.2", "3.00", "1234", "0.10"]);
    }
}
