//! Results of the methods, as tables and as JSON, and which of them are on the frontier.

use anyhow::{Context, Result};
use comfy_table::Table;

use crate::common::statistics::{mean, paired, spread, table};
use crate::common::train::Run;
use crate::common::weights::Weights;
use crate::measures::{Measures, NEIGHBOURS};

/// A method to weight the losses.
pub(crate) struct Method {
    pub(crate) name: String,
    pub(crate) weights: Weights,
    /// The weight of matching, of methods whose weights do not change.
    pub(crate) fixed: Option<f64>,
}

/// The result of one method on the samples of one seed.
#[derive(serde::Serialize)]
pub(crate) struct Record {
    pub(crate) method: String,
    pub(crate) seed: u64,
    #[serde(flatten)]
    pub(crate) measures: Measures,
    #[serde(flatten)]
    pub(crate) run: Run,
    /// The nearest training pictures of some test pictures.
    #[serde(skip)]
    pub(crate) near: Vec<[usize; NEIGHBOURS]>,
}

/// The results of all methods.
#[derive(serde::Serialize)]
pub(crate) struct Summary {
    pub(crate) seeds: Vec<u64>,
    pub(crate) methods: Vec<Row>,
}

/// The results of one method, one value per seed.
#[derive(serde::Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) recall_at_1: Vec<f64>,
    pub(crate) recall_at_10: Vec<f64>,
    pub(crate) style: Vec<f64>,
    pub(crate) category: Vec<f64>,
    pub(crate) subcategory: Vec<f64>,
    /// Of the image, text and matching loss, in force at the end.
    pub(crate) weights: Vec<Vec<f64>>,
    #[serde(skip)]
    pub(crate) fixed: Option<f64>,
    train_seconds: Vec<f64>,
}

/// What the frontier is drawn of, besides recall@1.
pub(crate) const KNOWLEDGE: [&str; 3] = ["style", "category", "subcategory"];

impl Row {
    pub(crate) fn new(method: &Method, records: &[&Record]) -> Self {
        let all = |of: fn(&Measures) -> f64| records.iter().map(|record| of(&record.measures)).collect();
        let last = |record: &&Record| record.run.states.last().map_or(Vec::new(), |state| state.weights.clone());
        Row {
            name: method.name.clone(),
            recall_at_1: all(|measures| measures.recall_at_1),
            recall_at_10: all(|measures| measures.recall_at_10),
            style: all(|measures| measures.style),
            category: all(|measures| measures.category),
            subcategory: all(|measures| measures.subcategory),
            weights: records.iter().map(last).collect(),
            fixed: method.fixed,
            train_seconds: records.iter().map(|record| record.run.train_seconds).collect(),
        }
    }

    fn columns(&self) -> [&Vec<f64>; 5] {
        [&self.recall_at_1, &self.recall_at_10, &self.style, &self.category, &self.subcategory]
    }

    /// Recall@1 and one of `KNOWLEDGE`, means over seeds.
    pub(crate) fn point(&self, knowledge: usize) -> (f64, f64) {
        (mean(&self.recall_at_1), mean(self.columns()[2 + knowledge]))
    }
}

impl Summary {
    pub(crate) fn row(&self, name: &str) -> Option<&Row> {
        self.methods.iter().find(|row| row.name == name)
    }

    /// What each method reaches.
    pub(crate) fn table(&self) -> Table {
        let header = [
            "method",
            "recall@1",
            "recall@10",
            "style",
            "category",
            "subcategory",
            "weights: image text matching",
            "s",
        ];
        let mut table = table(header);
        for row in &self.methods {
            let mut cells = vec![row.name.clone()];
            cells.extend(row.columns().map(|values| spread(values)));
            let weight = |k: usize| mean(&row.weights.iter().map(|weights| weights[k]).collect::<Vec<_>>());
            cells.push((0..3).map(|k| format!("{:.2}", weight(k))).collect::<Vec<_>>().join(" "));
            cells.push(format!("{:.1}", mean(&row.train_seconds)));
            table.add_row(cells);
        }
        table
    }

    /// Differences to matching alone, paired by seed.
    pub(crate) fn differences(&self) -> Result<Table> {
        let naive = self.row("naive").context("the baseline is missing")?;
        let mut table = table(["minus naive", "recall@1", "recall@10", "style", "category", "subcategory"]);
        for row in &self.methods {
            let mut cells = vec![row.name.clone()];
            cells.extend(row.columns().into_iter().zip(naive.columns()).map(|(values, base)| paired(values, base)));
            table.add_row(cells);
        }
        Ok(table)
    }

    /// For each of `KNOWLEDGE`, what is to be said of each method whose weights are not fixed.
    pub(crate) fn verdicts(&self, knowledge: usize) -> Vec<String> {
        let points: Vec<(f64, f64)> = self.methods.iter().map(|row| row.point(knowledge)).collect();
        let verdict = |(row, point): (&Row, &(f64, f64))| {
            let better = points.iter().position(|other| dominates(*other, *point));
            match better.map(|i| &self.methods[i].name) {
                None => format!("{} is on the frontier", row.name),
                Some(better) => format!("{} is not on the frontier: {better} has no less of both", row.name),
            }
        };
        let rows = self.methods.iter().zip(&points);
        rows.filter(|(row, _)| row.fixed.is_none()).map(verdict).collect()
    }
}

/// Whether one point has no less of both than another, and more of one.
fn dominates(a: (f64, f64), b: (f64, f64)) -> bool {
    a.0 >= b.0 && a.1 >= b.1 && a != b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_dominated_by_one_with_no_less_of_both() {
        assert!(dominates((0.2, 0.5), (0.1, 0.5)) && dominates((0.2, 0.6), (0.2, 0.5)));
        assert!(!dominates((0.2, 0.5), (0.2, 0.5)) && !dominates((0.2, 0.4), (0.1, 0.5)));
    }

    #[test]
    fn a_verdict_names_a_better_method_of_any_kind() {
        let row = |name: &str, fixed, recall, style| Row {
            name: name.to_owned(),
            recall_at_1: recall,
            recall_at_10: Vec::new(),
            style,
            category: vec![0.0, 0.0],
            subcategory: Vec::new(),
            weights: Vec::new(),
            fixed,
            train_seconds: Vec::new(),
        };
        let methods = vec![
            row("naive", Some(1.0), vec![0.3, 0.5], vec![0.1, 0.1]),
            // Means count: no less of both than `b`, though its second seed has less.
            row("a", Some(0.5), vec![0.4, 0.2], vec![0.2, 0.6]),
            row("b", None, vec![0.3, 0.3], vec![0.3, 0.3]),
            row("c", None, vec![0.1, 0.1], vec![0.9, 0.9]),
        ];
        let summary = Summary { seeds: vec![0, 1], methods };
        let style = ["b is not on the frontier: a has no less of both", "c is on the frontier"];
        assert_eq!(summary.verdicts(0), style);
        let category = ["b", "c"].map(|name| format!("{name} is not on the frontier: naive has no less of both"));
        assert_eq!(summary.verdicts(1), category);
    }
}
