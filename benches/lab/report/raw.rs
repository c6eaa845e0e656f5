//! Raw results, one JSON object a line, as benches/README.md describes them.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// What one program measured in one go.
pub(crate) struct Section {
    pub(crate) run: Run,
    pub(crate) cases: Vec<Case>,
    pub(crate) times: Vec<Time>,
    pub(crate) skipped: Vec<Skipped>,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line {
    Run(Run),
    Case(Case),
    Time(Time),
    Skipped(Skipped),
}

#[derive(Clone, Deserialize)]
pub(crate) struct Run {
    pub(crate) date: String,
    pub(crate) commit: String,
    pub(crate) device: String,
    pub(crate) name: String,
    #[serde(default, deserialize_with = "text")]
    pub(crate) driver: Option<String>,
    pub(crate) cache_bytes: Option<u64>,
    #[serde(default, deserialize_with = "text")]
    pub(crate) software: Option<String>,
    pub(crate) command: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum List {
    /// One tensor of so many elements.
    Flat(u64),
    /// Tensors of one length.
    Equal { count: u64, len: u64 },
    /// The parameters of a network.
    Model(String),
}

#[derive(Clone, Deserialize)]
pub(crate) struct Case {
    pub(crate) operation: String,
    pub(crate) case: String,
    pub(crate) list: List,
    pub(crate) modalities: u32,
    pub(crate) dtype: String,
    #[serde(default)]
    pub(crate) misaligned: bool,
    #[serde(default)]
    pub(crate) near: bool,
    #[serde(default)]
    pub(crate) threads: u32,
    pub(crate) tensors: u64,
    pub(crate) elements: u64,
    pub(crate) bytes: u64,
}

impl Case {
    /// Numbers that do not cancel, where the allocator puts them.
    pub(crate) fn plain(&self) -> bool {
        !self.near && !self.misaligned
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Limit,
    Ours,
    Peer,
}

#[derive(Clone, Deserialize)]
pub(crate) struct Time {
    pub(crate) operation: String,
    pub(crate) case: String,
    pub(crate) contender: String,
    pub(crate) role: Role,
    /// A turn that was lost is null.
    pub(crate) times_ns: Vec<Option<f64>>,
    pub(crate) host_ns: Option<Vec<Option<f64>>>,
    pub(crate) launches: Option<u64>,
    pub(crate) allocations: Option<u64>,
    pub(crate) extra_bytes: Option<u64>,
    pub(crate) error_c: Option<f64>,
    pub(crate) error_d: Option<f64>,
    pub(crate) error_blend: Option<f64>,
    /// Where it stands in the file.
    #[serde(skip)]
    pub(crate) line: usize,
}

#[derive(Clone, Deserialize)]
pub(crate) struct Skipped {
    pub(crate) operation: String,
    pub(crate) case: String,
    pub(crate) contender: Option<String>,
    pub(crate) reason: String,
}

/// A version may be a string, a number, or a record of several.
fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(words(&Value::deserialize(from)?))
}

fn words(value: &Value) -> Option<String> {
    let joined = |all: Vec<String>| (!all.is_empty()).then(|| all.join(", "));
    match value {
        Value::Null => None,
        Value::String(text) => (!text.is_empty()).then(|| text.clone()),
        Value::Array(all) => joined(all.iter().filter_map(words).collect()),
        Value::Object(all) => {
            joined(all.iter().filter_map(|(key, value)| Some(format!("{key} {}", words(value)?))).collect())
        }
        other => Some(other.to_string()),
    }
}

/// The sections of a file; `file` is its name, for errors.
pub(crate) fn parse(content: &str, file: &str) -> Result<Vec<Section>> {
    let mut sections: Vec<Section> = Vec::new();
    for (number, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = || format!("{file}, line {}", number + 1);
        let line = match serde_json::from_str::<Line>(line) {
            Ok(line) => line,
            // Of the one line that it was given.
            Err(error) => bail!("{}: {}", at(), error.to_string().replace("at line 1 column", "at column")),
        };
        if let Line::Run(run) = line {
            sections.push(Section { run, cases: Vec::new(), times: Vec::new(), skipped: Vec::new() });
            continue;
        }
        let Some(section) = sections.last_mut() else { bail!("{}: no run comes before it", at()) };
        match line {
            Line::Run(_) => {}
            Line::Case(case) => {
                let same = |other: &Case| other.operation == case.operation && other.case == case.case;
                ensure!(!section.cases.iter().any(same), "{}: a case a second time in one run", at());
                section.cases.push(case);
            }
            Line::Time(mut time) => {
                let same = |other: &Time| {
                    (&other.operation, &other.case, &other.contender) == (&time.operation, &time.case, &time.contender)
                };
                ensure!(!section.times.iter().any(same), "{}: a time a second time in one run", at());
                time.line = number + 1;
                section.times.push(time);
            }
            Line::Skipped(skipped) => section.skipped.push(skipped),
        }
    }
    let Some(first) = sections.first() else { bail!("{file}: no run in it") };
    // Programs know the name alike, but some add a number of threads.
    let machine = |run: &Run| (run.device.clone(), run.name.split(", ").next().map(str::to_owned));
    for Section { run, .. } in &sections {
        let (a, b) = (&first.run.name, &run.name);
        ensure!(machine(&first.run) == machine(run), "{file}: runs on {a} and on {b}: one file, one device");
    }
    for time in sections.iter().flat_map(|section| &section.times) {
        let of = |case: &Case| case.operation == time.operation && case.case == time.case;
        let known = sections.iter().flat_map(|section| &section.cases).any(of);
        ensure!(known, "{file}, line {}: a time of {} {}, which is no case", time.line, time.operation, time.case);
    }
    Ok(sections)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = r#"{"kind":"run","date":"2026-01-02","commit":"abc","device":"cpu","name":"a processor","driver":null,"software":{"rustc":"1.90","torch":null},"command":"cargo bench"}"#;
    const CASE: &str = r#"{"kind":"case","operation":"dot","case":"a","list":{"equal":{"count":2,"len":3}},"modalities":2,"dtype":"f32","tensors":2,"elements":6,"bytes":96}"#;

    fn error(content: &str) -> String {
        parse(content, "a.jsonl").err().map(|error| format!("{error:#}")).unwrap_or_default()
    }

    #[test]
    fn reads_sections() -> Result<()> {
        let sections = parse(&[RUN, CASE, "", RUN].join("\n"), "a.jsonl")?;
        assert_eq!(sections.len(), 2);
        assert_eq!(sections[0].run.software.as_deref(), Some("rustc 1.90"));
        assert_eq!(sections[0].cases[0].list, List::Equal { count: 2, len: 3 });
        Ok(())
    }

    #[test]
    fn names_the_line_of_an_error() {
        assert!(error(&format!("{RUN}\n{}", &CASE[..60])).starts_with("a.jsonl, line 2: EOF"));
        assert_eq!(error(&format!("\n{CASE}")), "a.jsonl, line 2: no run comes before it");
        assert_eq!(error(""), "a.jsonl: no run in it");
        let time = r#"{"kind":"time","operation":"dot","case":"b","contender":"x","role":"peer","times_ns":[]}"#;
        let unknown = error(&format!("{RUN}\n{CASE}\n{time}"));
        assert_eq!(unknown, "a.jsonl, line 3: a time of dot b, which is no case");
    }

    #[test]
    fn refuses_two_devices_in_one_file() {
        let other = RUN.replace("a processor", "another");
        assert!(error(&format!("{RUN}\n{other}")).ends_with("one file, one device"));
        let threads = RUN.replace("a processor", "a processor, 2 threads");
        assert_eq!(error(&format!("{RUN}\n{threads}")), "");
    }
}
