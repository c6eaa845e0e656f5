//! The results of a file: ratios of times of one run, compared round by round.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::record::{CaseRecord, Kind, Record, Run, Skipped, Time};

/// The implementation that all others are compared with.
pub(crate) const OURS: &str = "gradblend";

/// The results of a file.
pub(crate) struct Results {
    pub(crate) runs: Vec<Run>,
    /// By operation, then in order of the file.
    pub(crate) rows: Vec<Row>,
    pub(crate) skipped: Vec<Skipped>,
}

/// An operation on a case.
pub(crate) struct Row {
    pub(crate) case: CaseRecord,
    pub(crate) cells: Vec<Cell>,
}

/// An implementation in a row.
pub(crate) struct Cell {
    pub(crate) time: Time,
    /// Its time over gradblend's: the median of the rounds of one run. None if gradblend was not in that run.
    pub(crate) ratio: Option<f64>,
}

impl Results {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Results::new(read(path)?).with_context(|| path.display().to_string())
    }

    /// Later times of a program replace its earlier ones of the same operation and case, and what it skipped before.
    fn new(records: Numbered) -> Result<Self> {
        let mut runs: Vec<Run> = Vec::new();
        let mut cases: Vec<CaseRecord> = Vec::new();
        // Of one operation and case in one run, with its program.
        let mut groups: Vec<(String, Vec<Time>)> = Vec::new();
        // By program, too.
        let mut skipped: Vec<(String, Skipped)> = Vec::new();
        let mut start = true;
        for (number, record) in records {
            match record {
                Record::Run(run) => {
                    runs.push(run);
                    start = true;
                }
                Record::Case(case) => {
                    if !cases.iter().any(|known| (known.operation, &known.case) == (case.operation, &case.case)) {
                        cases.push(case);
                    }
                    start = true;
                }
                Record::Time(time) => {
                    let program = program(&runs, number)?;
                    skipped.retain(|(by, one)| {
                        (one.operation, &one.case, by) != (time.operation, &time.case, &program)
                            || one.implementation.as_ref().is_some_and(|name| *name != time.implementation)
                    });
                    if start {
                        let same = |old: &(String, Vec<Time>)| {
                            old.0 == program && (old.1[0].operation, &old.1[0].case) == (time.operation, &time.case)
                        };
                        groups.retain(|old| !same(old));
                        groups.push((program, Vec::new()));
                        start = false;
                    }
                    groups.last_mut().context("a group")?.1.push(time);
                }
                Record::Skipped(one) => {
                    let program = program(&runs, number)?;
                    let key = |one: &Skipped| (one.operation, one.case.clone(), one.implementation.clone());
                    skipped.retain(|(by, old)| *by != program || key(old) != key(&one));
                    skipped.push((program, one));
                }
            }
        }
        cases.sort_by_key(|case| case.operation);
        let mut rows = Vec::new();
        for case in cases {
            let mut cells: Vec<Cell> = Vec::new();
            for (_, group) in
                groups.iter().filter(|(_, group)| (group[0].operation, &group[0].case) == (case.operation, &case.case))
            {
                let ours = group.iter().find(|time| time.implementation == OURS);
                for time in group {
                    // gradblend and the limits are those of the first run that has them.
                    if !cells.iter().any(|cell| cell.time.implementation == time.implementation) {
                        cells.push(Cell { time: time.clone(), ratio: ours.and_then(|ours| ratio(time, ours)) });
                    }
                }
            }
            rows.push(Row { case, cells });
        }
        ensure!(!rows.is_empty(), "no results");
        let skipped = skipped.into_iter().map(|(_, one)| one).collect();
        Ok(Results { runs, rows, skipped })
    }

    /// A line about machine, date and commits.
    pub(crate) fn caption(&self) -> String {
        let all = |value: &dyn Fn(&Run) -> String| {
            let values: BTreeSet<String> = self.runs.iter().map(value).collect();
            values.into_iter().collect::<Vec<_>>().join(" and ")
        };
        let machine = &self.runs[0].machine;
        let driver = machine.driver.as_ref().map_or(String::new(), |driver| format!(", driver {driver}"));
        let date = all(&|run| run.date.split('T').next().unwrap_or_default().into());
        format!("{}{driver}, {date}, commit {}", machine.name, all(&|run| run.commit.clone()))
    }
}

impl Row {
    pub(crate) fn find(&self, name: &str) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.time.implementation == name)
    }

    pub(crate) fn baselines(&self) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(|cell| cell.time.kind == Kind::Baseline)
    }

    /// The faster limit of gradblend's run, the first one.
    pub(crate) fn limit(&self) -> Option<(&Cell, f64)> {
        let limits = self.cells.iter().filter(|cell| cell.time.kind == Kind::Limit);
        let timed = limits.filter_map(|cell| Some((cell, cell.ratio?)));
        timed.min_by(|(_, a), (_, b)| a.total_cmp(b))
    }
}

/// Checks that a file has raw results, if it is there: what a run appends to another file would be lost in it.
pub(crate) fn check(path: &Path) -> Result<()> {
    if path.is_file() { read(path).map(drop) } else { Ok(()) }
}

/// The records of a file. Warns of lines that are cut off.
fn read(path: &Path) -> Result<Numbered> {
    let context = || path.display().to_string();
    let bytes = fs::read(path).with_context(context)?;
    // A line that is cut off may end within a character.
    let (records, cut_off) = records(&String::from_utf8_lossy(&bytes)).with_context(context)?;
    for number in cut_off {
        eprintln!("warning: {}: line {number} is cut off, and left out", path.display());
    }
    Ok(records)
}

/// Records with the numbers of their lines.
type Numbered = Vec<(usize, Record)>;

/// The records, and the numbers of the lines at which a program was stopped while it wrote: the last one of the file, or one
/// before a run. Any other line that is not a record is an error.
fn records(text: &str) -> Result<(Numbered, Vec<usize>)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    // A machine that lost its power may leave zero bytes.
    let lines = (1..).zip(text.lines().map(|line| line.trim_matches('\0').trim()));
    let parsed = lines.filter(|(_, line)| !line.is_empty()).map(|(number, line)| (number, serde_json::from_str(line)));
    let mut parsed = parsed.peekable();
    let (mut records, mut cut_off) = (Vec::new(), Vec::new());
    while let Some((number, record)) = parsed.next() {
        match record {
            Ok(record) => records.push((number, record)),
            Err(error) => {
                let at_the_end = parsed.peek().is_none_or(|(_, next)| match next {
                    Ok(next) => matches!(next, Record::Run(_)),
                    Err(next) => next.is_eof(),
                });
                let reason = error.to_string();
                let reason = reason.split(" at line ").next().unwrap_or_default();
                ensure!(error.is_eof() && at_the_end, "line {number}, column {}: {reason}", error.column());
                cut_off.push(number);
            }
        }
    }
    Ok((records, cut_off))
}

/// What the command of the last run starts with, for a record of a line.
fn program(runs: &[Run], number: usize) -> Result<String> {
    let run = runs.last().with_context(|| format!("line {number}: no run before it"))?;
    Ok(run.command.split(' ').next().unwrap_or_default().to_owned())
}

/// The median over the rounds of a time over another of the same round. A slow baseline has the first rounds only.
fn ratio(time: &Time, ours: &Time) -> Option<f64> {
    let ratios: Vec<f64> = time.times_ns.iter().zip(&ours.times_ns).map(|(time, ours)| time / ours).collect();
    median(&ratios)
}

/// The quantile of a probability `part`, interpolated between the two nearest ranks.
pub(crate) fn quantile(values: &[f64], part: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = part * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    Some(below + (above - below) * rank.fract())
}

pub(crate) fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

pub(crate) fn distinct(values: impl Iterator<Item = String>) -> Vec<String> {
    let mut all = Vec::new();
    values.for_each(|value| {
        if !all.contains(&value) {
            all.push(value)
        }
    });
    all
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const RUN: &str = r#"{"record":"run","date":"2026-01-02T03:04:05Z","commit":"abc","command":"cargo run","device":"cpu",
        "name":"CPU","driver":null,"cache_bytes":null,"software":"rustc"}"#;
    pub(crate) const CASE: &str = r#"{"record":"case","operation":"step","case":"ResNet-50/K3/bf16","shapes":{"model":"ResNet-50"},
        "modalities":3,"dtype":"bf16","misaligned":false,"tensors":161,"bytes":600,"weights":[],"c":[],"d":[],
        "c_size":[],"d_size":[]}"#;

    pub(crate) fn time(implementation: &str, kind: &str, times: &str) -> String {
        format!(
            r#"{{"record":"time","operation":"step","case":"ResNet-50/K3/bf16","implementation":"{implementation}",
            "kind":"{kind}","times_ns":{times},"repeats":1,"sets":1}}"#
        )
    }

    pub(crate) fn parse(lines: &[&str]) -> Result<Results> {
        Results::new(records(&text(lines))?.0)
    }

    fn text(lines: &[&str]) -> String {
        lines.iter().map(|line| line.replace('\n', "")).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn lines_that_are_cut_off_are_left_out() -> Result<()> {
        let ours = time(OURS, "ours", "[10]").replace("\"kind\"", "\"µ\":1,\"kind\"");
        let whole = text(&[RUN, CASE, &ours, RUN, CASE, &ours]);
        let lines: Vec<&str> = whole.lines().collect();
        for end in 1..whole.len() {
            // What a program leaves that was stopped, and what the next one appends, which was stopped as well.
            let start = String::from_utf8_lossy(&whole.as_bytes()[..end]).into_owned();
            let (kept, cut_off) = records(&start)?;
            let complete = lines
                .iter()
                .scan(0, |at, line| {
                    *at += line.len() + 1;
                    Some(*at)
                })
                .filter(|at| at - 1 <= end)
                .count();
            let is_cut = !start.ends_with('\n') && !lines.contains(&start.lines().last().unwrap_or_default());
            assert_eq!((kept.len(), cut_off.len()), (complete, usize::from(is_cut)), "{start}");
            let again = format!("{}\n{}", start.trim_end(), &whole[..whole.len() / 2 + 30]);
            assert_eq!(records(&again)?.0.len(), complete + 3, "{again}");
        }
        let zeros = text(&[RUN, CASE, &ours, "\0\0\0"]);
        assert_eq!(records(&zeros)?.0.len(), 3);
        assert_eq!(records(&format!("\u{feff}{RUN}\n\n", RUN = RUN.replace('\n', "")))?.0.len(), 1);
        for (lines, expected) in [
            ([RUN, &CASE[..30], &ours], "line 2, column 30: EOF"),
            ([RUN, CASE, "{}"], "line 3, column 2: missing field `record`"),
            ([RUN, CASE, "x"], "line 3, column 1: expected value"),
            (["{\"a", "{\"b", CASE], "line 2, column 3: EOF"),
        ] {
            let error = records(&text(&lines)).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.starts_with(expected), "{error}");
        }
        Ok(())
    }

    #[test]
    fn a_later_time_replaces_what_was_skipped() -> Result<()> {
        let skip = |implementation: &str| {
            format!(
                r#"{{"record":"skipped","operation":"step","case":"ResNet-50/K3/bf16",
                "implementation":{implementation},"reason":"no memory"}}"#
            )
        };
        let (one, all, ours) = (skip("\"naive\""), skip("null"), time(OURS, "ours", "[10]"));
        let skipped = |lines: &[&str]| -> Result<usize> { Ok(parse(lines)?.skipped.len()) };
        assert_eq!(skipped(&[RUN, CASE, &one, &all, RUN, &one, &all])?, 2);
        assert_eq!(skipped(&[RUN, CASE, &one, &all, RUN, CASE, &ours])?, 1);
        assert_eq!(skipped(&[RUN, CASE, &one, &all, RUN, CASE, &ours, &time("naive", "baseline", "[9]")])?, 0);
        // Another program's times say nothing about this one's.
        let other = RUN.replace("cargo run", "python3 x");
        assert_eq!(skipped(&[RUN, CASE, &one, &all, &other, &ours])?, 2);
        Ok(())
    }
}
