//! The figures that a file's times lead to: one row for each operation and case.

use std::collections::BTreeSet;

use crate::raw::{Case, List, Role, Run, Section, Skipped, Time};

/// The contender that all figures are about.
pub(crate) const OURS: &str = "gradblend";

/// Quartiles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) low: f64,
    pub(crate) middle: f64,
    pub(crate) high: f64,
}

impl Spread {
    /// Of those values that can be a time, or a ratio of two.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| value.is_finite() && *value > 0.0).collect();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        // Between two values, in proportion.
        let at = |part: f64| {
            let place = part * last as f64;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Some(Spread { low: at(0.25), middle: at(0.5), high: at(0.75) })
    }

    /// Half the interquartile range, in percent of the median.
    pub(crate) fn percent(&self) -> f64 {
        50.0 * (self.high - self.low) / self.middle
    }
}

/// One contender of a row.
pub(crate) struct Contender {
    pub(crate) raw: Time,
    pub(crate) time: Option<Spread>,
    /// How many times gradblend's time it takes, both of one run.
    pub(crate) over: Option<f64>,
}

pub(crate) struct Row {
    pub(crate) case: Case,
    pub(crate) contenders: Vec<Contender>,
}

impl Row {
    pub(crate) fn find(&self, name: &str) -> Option<&Contender> {
        self.contenders.iter().find(|contender| contender.raw.contender == name)
    }

    pub(crate) fn ours(&self) -> Option<&Contender> {
        self.find(OURS)
    }

    /// The fastest of the limits.
    pub(crate) fn limit(&self) -> Option<(&Contender, Spread)> {
        let limits = self.contenders.iter().filter(|contender| contender.raw.role == Role::Limit);
        let timed = limits.filter_map(|limit| Some((limit, limit.time?)));
        timed.min_by(|(_, a), (_, b)| a.middle.total_cmp(&b.middle))
    }

    /// What part of the limit is reached. Turns alternate, so the two times of a turn are compared: what slows the
    /// machine for a while slows both.
    pub(crate) fn share(&self) -> Option<Spread> {
        let ((limit, limit_time), ours) = (self.limit()?, self.ours()?);
        let (limits, turns) = (&limit.raw.times_ns, &ours.raw.times_ns);
        if limits.len() == turns.len() {
            return Spread::of(limits.iter().zip(turns).filter_map(|(limit, ours)| Some((*limit)? / (*ours)?)));
        }
        Spread::of([limit_time.middle / ours.time?.middle])
    }

    /// GB/s.
    pub(crate) fn bandwidth(&self, time: &Spread) -> f64 {
        self.case.bytes as f64 / time.middle
    }

    pub(crate) fn is(&self, operation: &str) -> bool {
        self.case.operation == operation
    }

    /// Elements of the one tensor, where inputs are as usual.
    pub(crate) fn flat(&self) -> Option<u64> {
        match self.case.list {
            List::Flat(len) if self.case.plain() => Some(len),
            _ => None,
        }
    }

    /// The network, where inputs are as usual.
    pub(crate) fn model(&self) -> Option<&str> {
        match &self.case.list {
            List::Model(name) if self.case.plain() => Some(name),
            _ => None,
        }
    }
}

/// Leaves out what the same program has measured again since.
pub(crate) fn newest(mut sections: Vec<Section>) -> Vec<Section> {
    let mut measured = BTreeSet::new();
    for section in sections.iter_mut().rev() {
        let program = section.run.command.split(' ').next().unwrap_or("").to_owned();
        let key = |operation: &str, case: &str| (program.clone(), operation.to_owned(), case.to_owned());
        let new = |operation: &str, case: &str| !measured.contains(&key(operation, case));
        section.times.retain(|time| new(&time.operation, &time.case));
        section.skipped.retain(|skipped| new(&skipped.operation, &skipped.case));
        section.cases.retain(|case| new(&case.operation, &case.case));
        let now: Vec<_> = section.times.iter().map(|time| key(&time.operation, &time.case)).collect();
        measured.extend(now);
    }
    sections.retain(|section| !section.cases.is_empty() || !section.skipped.is_empty());
    sections
}

/// All that is shown of a file.
pub(crate) struct Figures {
    pub(crate) runs: Vec<Run>,
    pub(crate) rows: Vec<Row>,
    /// Who, and of what.
    pub(crate) skipped: Vec<(String, Skipped)>,
}

impl Figures {
    pub(crate) fn new(sections: &[Section]) -> Self {
        let mut cases: Vec<&Case> = Vec::new();
        for case in sections.iter().flat_map(|section| &section.cases) {
            if !cases.iter().any(|other| (&other.operation, &other.case) == (&case.operation, &case.case)) {
                cases.push(case);
            }
        }
        cases.sort_by_key(|case| place(&case.operation));
        let rows = cases.into_iter().map(|case| row(case, sections)).filter(|row| !row.contenders.is_empty()).collect();
        let runs = sections.iter().map(|section| section.run.clone()).collect();
        let mut skipped = Vec::new();
        for Section { run, skipped: all, .. } in sections {
            let who =
                |skipped: &Skipped| skipped.contender.clone().unwrap_or_else(|| format!("all of `{}`", run.command));
            skipped.extend(all.iter().map(|one| (who(one), one.clone())));
        }
        Figures { runs, rows, skipped }
    }

    /// In the usual order, then by appearance.
    pub(crate) fn operations(&self) -> Vec<&str> {
        distinct(self.rows.iter().map(|row| row.case.operation.as_str()))
    }

    pub(crate) fn dtypes(&self) -> Vec<&str> {
        distinct(self.rows.iter().map(|row| row.case.dtype.as_str()))
    }

    /// Names of contenders of a role, gradblend left out, by appearance.
    pub(crate) fn names(&self, role: Role) -> Vec<&str> {
        let all = self.rows.iter().flat_map(|row| &row.contenders).map(|contender| &contender.raw);
        distinct(all.filter(|raw| raw.role == role && raw.contender != OURS).map(|raw| raw.contender.as_str()))
    }

    /// The K that most flat lists have; of several, 4, else the smallest.
    pub(crate) fn modalities(&self) -> u32 {
        let flats: Vec<u32> =
            self.rows.iter().filter(|row| row.flat().is_some()).map(|row| row.case.modalities).collect();
        let count = |k: u32| flats.iter().filter(|other| **other == k).count();
        flats.iter().copied().max_by_key(|k| (count(*k), *k == 4, std::cmp::Reverse(*k))).unwrap_or(4)
    }

    /// The most threads that a case uses.
    pub(crate) fn threads(&self) -> u32 {
        self.rows.iter().map(|row| row.case.threads).max().unwrap_or(0)
    }

    /// For each dtype the longest flat list of the usual K.
    pub(crate) fn longest(&self, operation: &str) -> Vec<&Row> {
        let modalities = self.modalities();
        let of = |dtype: &&str| {
            let rows = self.rows.iter().filter(|row| row.is(operation) && row.case.dtype == *dtype);
            let rows = rows.filter(|row| row.case.modalities == modalities && row.flat().is_some());
            rows.max_by_key(|row| (row.flat(), row.case.threads))
        };
        self.dtypes().iter().filter_map(of).collect()
    }

    /// Of each network the list that comes first.
    pub(crate) fn networks(&self, operation: &str) -> Vec<&Row> {
        let mut first: Vec<&Row> = Vec::new();
        for row in self.models(operation) {
            if !first.iter().any(|other| other.model() == row.model()) {
                first.push(row);
            }
        }
        first
    }

    pub(crate) fn models(&self, operation: &str) -> Vec<&Row> {
        self.rows.iter().filter(|row| row.is(operation) && row.model().is_some()).collect()
    }
}

pub(crate) fn distinct<'a>(values: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut all = Vec::new();
    for value in values {
        if !all.contains(&value) {
            all.push(value);
        }
    }
    all
}

fn place(operation: &str) -> usize {
    let usual = ["dot", "blend", "step"];
    usual.iter().position(|name| *name == operation).unwrap_or(usual.len())
}

/// All contenders of a case. Where several runs have the case, gradblend and the limits are those of one of them, and
/// every other contender is compared with gradblend as timed in its own run.
fn row(case: &Case, sections: &[Section]) -> Row {
    let of = |section: &Section| -> Vec<Time> {
        let times = section.times.iter().filter(|time| time.operation == case.operation && time.case == case.case);
        times.cloned().collect()
    };
    let mut runs: Vec<Vec<Time>> = sections.iter().map(of).filter(|times| !times.is_empty()).collect();
    let ours = |times: &Vec<Time>| times.iter().any(|time| time.contender == OURS);
    let limit = |times: &Vec<Time>| times.iter().any(|time| time.role == Role::Limit);
    let main = runs.iter().position(|times| ours(times) && limit(times)).or_else(|| runs.iter().position(ours));
    let main = main.or_else(|| runs.iter().position(limit)).unwrap_or(0);
    if !runs.is_empty() {
        runs[..=main].rotate_right(1);
    }
    let mut contenders: Vec<Contender> = Vec::new();
    for (place, times) in runs.into_iter().enumerate() {
        let spread = |time: &Time| Spread::of(time.times_ns.iter().copied().flatten());
        let unit = times.iter().find(|time| time.contender == OURS).and_then(spread);
        for raw in times {
            let other = place > 0 && (raw.role == Role::Limit || raw.contender == OURS);
            if !other && !contenders.iter().any(|known| known.raw.contender == raw.contender) {
                let time = spread(&raw);
                let over = time.zip(unit).map(|(time, unit)| time.middle / unit.middle);
                contenders.push(Contender { raw, time, over });
            }
        }
    }
    Row { case: case.clone(), contenders }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raw::parse;

    const RUN: &str = r#"{"kind":"run","date":"d","commit":"c","device":"cpu","name":"n","command":"x"}"#;
    const CASE: &str = r#"{"kind":"case","operation":"dot","case":"a","list":{"flat":8},"modalities":4,"dtype":"f32","tensors":1,"elements":8,"bytes":80}"#;

    fn time(contender: &str, role: &str, times: &str) -> String {
        format!(
            r#"{{"kind":"time","operation":"dot","case":"a","contender":"{contender}","role":"{role}","times_ns":{times}}}"#
        )
    }

    fn figures(lines: &[&str]) -> anyhow::Result<Figures> {
        Ok(Figures::new(&parse(&lines.join("\n"), "a.jsonl")?))
    }

    #[test]
    fn quartiles() {
        assert_eq!(Spread::of([4.0, 1.0, 3.0, 2.0]), Some(Spread { low: 1.75, middle: 2.5, high: 3.25 }));
        assert_eq!(Spread::of([2.0]), Some(Spread { low: 2.0, middle: 2.0, high: 2.0 }));
        assert_eq!(Spread::of([f64::NAN, 0.0, 5.0]).map(|spread| spread.middle), Some(5.0));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn turns_are_compared_in_pairs() -> anyhow::Result<()> {
        let limit = time("read", "limit", "[1, 2, 30]");
        // Medians alone would say 2 / 4.
        let rows = figures(&[RUN, CASE, &limit, &time("gradblend", "ours", "[1, 4, 30]")])?.rows;
        assert_eq!(rows[0].share().map(|share| share.middle), Some(1.0));
        let rows = figures(&[RUN, CASE, &limit, &time("gradblend", "ours", "[4, 4]")])?.rows;
        assert_eq!(rows[0].share().map(|share| share.middle), Some(0.5));
        Ok(())
    }

    #[test]
    fn every_run_has_its_own_unit() -> anyhow::Result<()> {
        let python = [RUN, CASE, &time("gradblend", "ours", "[5]"), &time("PyTorch", "peer", "[50]")].map(String::from);
        let limits = [time("read abreast", "limit", "[1]"), time("read", "limit", "[2]")];
        let rust =
            [RUN, CASE, &limits[0], &limits[1], &time("naive", "peer", "[6]"), &time("gradblend", "ours", "[2]")]
                .map(String::from);
        let lines: Vec<&str> = python.iter().chain(&rust).map(String::as_str).collect();
        let rows = figures(&lines)?.rows;
        assert_eq!(rows.len(), 1);
        let row = &rows[0];
        let over = |name: &str| row.find(name).and_then(|contender| contender.over);
        assert_eq!((over("PyTorch"), over("naive"), over("gradblend")), (Some(10.0), Some(3.0), Some(1.0)));
        assert_eq!(row.limit().map(|(limit, _)| limit.raw.contender.as_str()), Some("read abreast"));
        assert_eq!(row.share().map(|share| share.middle), Some(0.5));
        Ok(())
    }

    #[test]
    fn what_is_measured_again_counts() -> anyhow::Result<()> {
        let other = RUN.replace("\"x\"", "\"y -a\"");
        let [first, second, ours] = ["[9]", "[3]", "[1]"].map(|times| time("naive", "peer", times)).map(String::from);
        let ours = ours.replace("naive", "gradblend").replace("peer", "ours");
        // The last one says that there was no time for the case.
        let lines = [RUN, CASE, &first, &other, CASE, &ours, RUN, CASE, &second, RUN, CASE];
        let sections = newest(parse(&lines.join("\n"), "a.jsonl")?);
        let times: Vec<usize> = sections.iter().map(|section| section.times.len()).collect();
        assert_eq!(times, [1, 1, 0]);
        assert_eq!(sections[1].times[0].times_ns, [Some(3.0)]);
        Ok(())
    }

    #[test]
    fn nothing_is_made_of_nothing() -> anyhow::Result<()> {
        let (empty, lost) = (time("gradblend", "ours", "[]"), time("read", "limit", "[0, null]"));
        let rows = figures(&[RUN, CASE, &empty, &lost, &time("naive", "peer", "[1]")])?.rows;
        assert!(rows[0].share().is_none() && rows[0].limit().is_none());
        assert!(rows[0].contenders.iter().all(|contender| contender.over.is_none()));
        assert!(figures(&[RUN, CASE])?.rows.is_empty());
        Ok(())
    }
}
