//! Tables as Markdown, and numbers as text.

use crate::figures::{Spread, distinct};
use crate::raw::Run;

/// What stands where there is no value.
const NONE: &str = "-";

pub(crate) struct Table {
    header: Vec<String>,
    /// Columns that are text, from the left.
    text: usize,
    rows: Vec<Vec<Option<String>>>,
}

impl Table {
    pub(crate) fn new(text: usize, header: Vec<String>) -> Self {
        Table { header, text, rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, row: Vec<Option<String>>) {
        self.rows.push(row);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Columns without any value are left out.
    pub(crate) fn markdown(&self) -> String {
        let filled = |column: &usize| self.rows.iter().any(|row| row.get(*column).is_some_and(Option::is_some));
        let columns: Vec<usize> = (0..self.header.len()).filter(filled).collect();
        let line = |cells: Vec<&str>| {
            let cells: Vec<String> = cells.into_iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let mut markdown = line(columns.iter().map(|column| self.header[*column].as_str()).collect());
        let rule = |column: &usize| if *column < self.text { "---|" } else { "---:|" };
        markdown += &format!("|{}\n", columns.iter().map(rule).collect::<String>());
        for row in &self.rows {
            let cell = |column: &usize| row.get(*column).and_then(Option::as_deref).unwrap_or(NONE);
            markdown += &line(columns.iter().map(cell).collect());
        }
        markdown
    }
}

/// Three digits.
pub(crate) fn digits(value: f64) -> String {
    match value {
        v if !v.is_finite() => NONE.to_owned(),
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v if v >= 0.0995 => format!("{v:.2}"),
        0.0 => "0".to_owned(),
        v => format!("{v:.1e}"),
    }
}

/// A speed-up: two digits, more where there are more before the point.
pub(crate) fn times(value: f64) -> String {
    match value {
        v if v >= 9.95 => format!("{v:.0}"),
        v if v >= 0.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

pub(crate) fn plus_minus(spread: &Spread) -> String {
    let percent = spread.percent();
    if percent >= 9.95 { format!("± {percent:.0} %") } else { format!("± {percent:.1} %") }
}

pub(crate) fn share(spread: &Spread) -> String {
    format!("{:.2}", spread.middle)
}

/// In powers of 1000.
pub(crate) fn bytes(value: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    scaled(value, &units)
}

pub(crate) fn nanoseconds(value: f64) -> String {
    scaled(value, &["ns", "µs", "ms", "s"])
}

fn scaled(value: f64, units: &[&str]) -> String {
    let mut scaled = value;
    let mut unit = 0;
    while scaled >= 999.5 && unit + 1 < units.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    let whole = scaled.fract() == 0.0;
    let number = if whole { format!("{scaled:.0}") } else { digits(scaled) };
    format!("{number} {}", units[unit])
}

/// 1e6, not 1000000; three digits.
pub(crate) fn count(value: f64) -> String {
    if value < 9_999.5 {
        return format!("{value:.0}");
    }
    let digits = format!("{value:.2e}");
    digits.split_once('e').map_or(digits.clone(), |(number, exponent)| {
        format!("{}e{exponent}", number.trim_end_matches('0').trim_end_matches('.'))
    })
}

/// Where, when and what, in one line.
pub(crate) fn caption(runs: &[Run]) -> String {
    let all = |value: &dyn Fn(&Run) -> String| {
        let values: Vec<String> = runs.iter().map(value).collect();
        distinct(values.iter().map(String::as_str)).join(" and ")
    };
    let name = runs.first().map(|run| run.name.clone()).unwrap_or_default();
    let driver = runs.iter().find_map(|run| run.driver.as_ref());
    let driver = driver.map(|driver| format!("driver {driver}")).unwrap_or_default();
    let date = all(&|run| day(&run.date));
    let commit = all(&|run| short(&run.commit));
    let commit = format!("commit {commit}");
    [name, driver, date, commit].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
}

/// The date without the time of day.
fn day(date: &str) -> String {
    date.split(['T', ' ']).next().unwrap_or(date).to_owned()
}

/// Twelve digits of a commit, and whether files differed.
pub(crate) fn short(commit: &str) -> String {
    let (digits, rest) = commit.split_once('-').map_or((commit, None), |(digits, rest)| (digits, Some(rest)));
    let digits: String = digits.chars().take(12).collect();
    rest.map_or(digits.clone(), |rest| format!("{digits}-{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_without_values_are_left_out() {
        let mut table = Table::new(1, ["a", "b", "c"].map(String::from).to_vec());
        table.add(vec![Some("x|y".to_owned()), None, Some("1".to_owned())]);
        table.add(vec![Some("z".to_owned()), None, None]);
        assert_eq!(table.markdown(), "| a | c |\n|---|---:|\n| x\\|y | 1 |\n| z | - |\n");
    }

    #[test]
    fn numbers_as_text() {
        assert_eq!([31.24, 3.0, 1234.5, 0.0995].map(digits), ["31.2", "3.00", "1234", "0.10"]);
        assert_eq!([4.44, 31.24, 0.5].map(times), ["4.4", "31", "0.50"]);
        assert_eq!([1000.0, 2e4, 25_557_032.0].map(count), ["1000", "2e4", "2.56e7"]);
        assert_eq!([512.0, 262_144.0, 1e9, 999_999.0].map(bytes), ["512 B", "262 kB", "1 GB", "1.00 MB"]);
        assert_eq!(nanoseconds(1500.0), "1.50 µs");
        assert_eq!(short("0123456789abcdef-dirty"), "0123456789ab-dirty");
    }
}
