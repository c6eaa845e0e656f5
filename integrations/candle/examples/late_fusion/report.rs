//! Results of the methods, as a table for the screen and as JSON for programs.

use anyhow::{Context, Result};
use clap::ValueEnum;
use comfy_table::Table;

use crate::common::statistics::{deviation, mean, paired, spread, table};
use crate::common::train::{Ratios, Run, TrainBatch};
use crate::common::weights::Weights;
use crate::methods::{Case, Method, OF_MIXTURES};

/// The result of one method on the samples of one seed.
#[derive(serde::Serialize)]
pub(crate) struct Record {
    /// The name of the case.
    pub(crate) data: String,
    pub(crate) method: String,
    pub(crate) seed: u64,
    pub(crate) accuracy: f64,
    #[serde(flatten)]
    pub(crate) run: Run,
}

/// All runs of one method on one case, one per seed.
pub(crate) struct Outcome<'a> {
    pub(crate) case: &'a Case,
    pub(crate) method: &'a Method,
    pub(crate) runs: Vec<&'a Record>,
}

impl Outcome<'_> {
    pub(crate) fn accuracy(&self) -> Vec<f64> {
        self.runs.iter().map(|run| run.accuracy).collect()
    }

    /// The weights in force in the n-th state, mean over seeds.
    pub(crate) fn weights(&self, nth: usize) -> Vec<f64> {
        (0..self.case.modalities.len()).map(|k| self.mean(|run| run.states[nth].weights[k])).collect()
    }

    /// The ratios in the n-th state, median over seeds: they are quotients, so outliers would determine a mean.
    pub(crate) fn ogr(&self, nth: usize) -> Option<Ratios> {
        let of: Vec<&Ratios> = self.runs.iter().filter_map(|run| run.run.states[nth].ogr.as_ref()).collect();
        let over_seeds = |value: &dyn Fn(&Ratios) -> f64| median(of.iter().map(|ratios| value(ratios)).collect());
        let losses = of.first()?.losses.len();
        Some(Ratios {
            losses: (0..losses).map(|k| over_seeds(&|ratios| ratios.losses[k])).collect(),
            blend: over_seeds(&|ratios| ratios.blend),
            uniform: over_seeds(&|ratios| ratios.uniform),
            signal: of[0].signal.as_ref().map(|_| {
                let signal = |k: usize| over_seeds(&|ratios| ratios.signal.as_ref().map_or(f64::NAN, |all| all[k]));
                (0..losses).map(signal).collect()
            }),
        })
    }

    /// The epochs done in each state: the same for all seeds.
    pub(crate) fn epochs(&self) -> Vec<f64> {
        self.runs.first().map_or(Vec::new(), |run| run.run.states.iter().map(|state| state.epochs as f64).collect())
    }

    fn mean(&self, value: impl Fn(&Run) -> f64) -> f64 {
        mean(&self.runs.iter().map(|run| value(&run.run)).collect::<Vec<_>>())
    }
}

/// The results of all methods.
#[derive(serde::Serialize)]
pub(crate) struct Summary {
    pub(crate) data: String,
    pub(crate) seeds: Vec<u64>,
    pub(crate) train_batch: TrainBatch,
    pub(crate) methods: Vec<Row>,
}

/// The results of one method on one case at the end of training. Seconds are those of one run, mean over seeds.
#[derive(serde::Serialize)]
pub(crate) struct Row {
    /// The name of the case.
    pub(crate) data: String,
    pub(crate) name: String,
    /// Names of the losses, the fused one last.
    pub(crate) modalities: Vec<String>,
    pub(crate) accuracy: Vec<f64>,
    mean: f64,
    spread: f64,
    pub(crate) weights: Vec<f64>,
    pub(crate) ogr: Option<Ratios>,
    pub(crate) held: u64,
    pub(crate) solved: u64,
    pub(crate) train_batch: Option<TrainBatch>,
    pub(crate) blend_seconds: f64,
    pub(crate) train_seconds: f64,
}

impl Row {
    pub(crate) fn new(outcome: &Outcome<'_>, train_batch: TrainBatch) -> Self {
        let (accuracy, last) = (outcome.accuracy(), outcome.epochs().len().saturating_sub(1));
        Row {
            data: outcome.case.name.clone(),
            name: outcome.method.name.clone(),
            modalities: outcome.case.modalities.clone(),
            mean: mean(&accuracy),
            spread: deviation(&accuracy),
            accuracy,
            weights: outcome.weights(last),
            ogr: outcome.ogr(last),
            held: outcome.runs.iter().map(|run| run.run.held).sum(),
            solved: outcome.runs.iter().map(|run| run.run.solved).sum(),
            train_batch: matches!(outcome.method.weights, Weights::FromGradients(_)).then_some(train_batch),
            blend_seconds: outcome.mean(|run| run.blend_seconds),
            train_seconds: outcome.mean(|run| run.train_seconds),
        }
    }
}

impl Summary {
    /// The names of all cases and of all methods, in order.
    fn names(&self, of: impl Fn(&Row) -> &str) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for row in &self.methods {
            if !names.contains(&of(row)) {
                names.push(of(row));
            }
        }
        names
    }

    pub(crate) fn row(&self, data: &str, method: &str) -> Option<&Row> {
        self.methods.iter().find(|row| row.data == data && row.name == method)
    }

    /// One row per method, with the accuracy on each case.
    pub(crate) fn comparison(&self) -> Result<Table> {
        let cases = self.names(|row| &row.data);
        let mut header = vec!["method".to_owned()];
        header.extend(cases.iter().flat_map(|case| [format!("{case}: accuracy"), "minus uniform".to_owned()]));
        let mut table = table(header);
        for method in self.names(|row| &row.name) {
            let mut cells = vec![method.to_owned()];
            for case in &cases {
                let uniform = self.row(case, "uniform").context("a baseline is missing")?;
                let cell = self.row(case, method);
                cells.push(cell.map_or(String::new(), |row| spread(&row.accuracy)));
                cells.push(cell.map_or(String::new(), |row| paired(&row.accuracy, &uniform.accuracy)));
            }
            table.add_row(cells);
        }
        Ok(table)
    }

    /// What each method did: a table per case, under its name.
    pub(crate) fn details(&self) -> Result<String> {
        let header = [
            "method",
            "minus naive",
            "final weights",
            "OGR: blend (uniform)",
            "m / its error",
            "held / solved",
            "t from",
            "estimating s",
            "training s",
        ];
        let mut text = String::new();
        for case in self.names(|row| &row.data) {
            let naive = self.row(case, "naive").context("a baseline is missing")?;
            let mut table = table(header);
            table.add_rows(self.methods.iter().filter(|row| row.data == case).map(|row| row.details(naive)));
            text += &format!("\n{case}: {}\n\n{table}\n", naive.modalities.join(" "));
        }
        Ok(text)
    }

    /// The mixtures of more than one input.
    pub(crate) fn mixtures(&self) -> Vec<Mixture<'_>> {
        let mut mixtures = Vec::new();
        for case in self.names(|row| &row.data) {
            let rows: Vec<&Row> = OF_MIXTURES.iter().filter_map(|method| self.row(case, method)).collect();
            let Ok(methods) = <[&Row; OF_MIXTURES.len()]>::try_from(rows) else { continue };
            let inputs = methods[0].modalities.split_last().map_or(&[][..], |(_, inputs)| inputs);
            let alone = inputs.iter().filter_map(|input| self.row(input, &format!("alone:{input}")));
            let Some(best) = best(alone) else { continue };
            mixtures.push(Mixture { name: case, best, methods });
        }
        mixtures
    }

    /// One row per mixture.
    pub(crate) fn mixtures_table(&self) -> Table {
        let mut header = vec!["mixture".to_owned(), "best single".to_owned()];
        header.extend(OF_MIXTURES.iter().flat_map(|method| [(*method).to_owned(), "minus best".to_owned()]));
        let row = |Mixture { name, best, methods }: Mixture<'_>| {
            let mut cells = vec![name.to_owned(), format!("{} {}", best.data, spread(&best.accuracy))];
            let differences = methods.map(|row| [spread(&row.accuracy), paired(&row.accuracy, &best.accuracy)]);
            cells.extend(differences.into_iter().flatten());
            cells
        };
        let mut table = table(header);
        table.add_rows(self.mixtures().into_iter().map(row));
        table
    }
}

/// A mixture of inputs, and the methods on it.
pub(crate) struct Mixture<'a> {
    pub(crate) name: &'a str,
    /// The input that is best alone.
    pub(crate) best: &'a Row,
    /// Those of `OF_MIXTURES`.
    pub(crate) methods: [&'a Row; OF_MIXTURES.len()],
}

impl Row {
    fn details(&self, naive: &Row) -> Vec<String> {
        let weights: Vec<String> = self.weights.iter().map(|weight| format!("{weight:.2}")).collect();
        let (mut solved, mut estimating) = (String::new(), String::new());
        if self.solved > 0 {
            solved = format!("{} / {}", self.held, self.solved);
            estimating = format!("{:.2}", self.blend_seconds);
        }
        let signal = self.ogr.iter().filter_map(|ogr| ogr.signal.as_ref()).flatten();
        let signal: Vec<String> = signal.map(|signal| format!("{signal:.1}")).collect();
        let batch = self.train_batch.and_then(|batch| batch.to_possible_value());
        vec![
            self.name.clone(),
            paired(&self.accuracy, &naive.accuracy),
            weights.join(" "),
            self.ogr.as_ref().map_or(String::new(), |ogr| format!("{:.2} ({:.2})", ogr.blend, ogr.uniform)),
            signal.join(" "),
            solved,
            batch.map_or(String::new(), |batch| batch.get_name().to_owned()),
            estimating,
            format!("{:.2}", self.train_seconds),
        ]
    }
}

/// The row of the greatest mean accuracy.
pub(crate) fn best<'a>(rows: impl Iterator<Item = &'a Row>) -> Option<&'a Row> {
    rows.max_by(|a, b| a.mean.total_cmp(&b.mean))
}

/// Median of the values that are not NaN.
fn median(mut values: Vec<f64>) -> f64 {
    values.retain(|value| !value.is_nan());
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => (values[len / 2 - 1] + values[len / 2]) / 2.0,
    }
}
