//! Results of the methods, as a table for the screen and as JSON for programs.

use anyhow::{Context, Result};
use clap::ValueEnum;
use comfy_table::{Cell, CellAlignment, Table, presets};

use crate::train::{Method, Ratios, Run, TrainBatch, Weights};

/// All runs of one method, one per seed.
pub(crate) struct Outcome<'a> {
    pub(crate) method: &'a Method,
    pub(crate) runs: Vec<Run>,
}

impl Outcome<'_> {
    pub(crate) fn accuracy(&self) -> Vec<f64> {
        self.runs.iter().map(|run| run.accuracy).collect()
    }

    /// The weights in force at the end of an epoch, mean over seeds.
    pub(crate) fn weights(&self, epoch: usize) -> Vec<f64> {
        let losses = self.runs.first().map_or(0, |run| run.epochs[epoch].weights.len());
        (0..losses).map(|k| self.mean(|run| run.epochs[epoch].weights[k])).collect()
    }

    /// The ratios at the end of an epoch, median over seeds: they are quotients, so outliers would determine a mean.
    pub(crate) fn ogr(&self, epoch: usize) -> Option<Ratios> {
        let of: Vec<&Ratios> = self.runs.iter().filter_map(|run| run.epochs[epoch].ogr.as_ref()).collect();
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

    pub(crate) fn epochs(&self) -> usize {
        self.runs.first().map_or(0, |run| run.epochs.len())
    }

    fn mean(&self, value: impl Fn(&Run) -> f64) -> f64 {
        mean(&self.runs.iter().map(value).collect::<Vec<_>>())
    }
}

pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation of a sample; NaN for fewer than two values.
pub(crate) fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0)).sqrt()
}

/// Empty for one seed, which has no spread.
fn plus_minus(error: f64) -> String {
    if error.is_nan() { String::new() } else { format!(" ± {error:.3}") }
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

/// The results of all methods.
#[derive(serde::Serialize)]
pub(crate) struct Summary {
    pub(crate) data: String,
    /// Names of the losses, the fused one last.
    pub(crate) modalities: Vec<String>,
    pub(crate) seeds: Vec<u64>,
    pub(crate) train_batch: TrainBatch,
    pub(crate) methods: Vec<Row>,
}

/// The results of one method at the end of training. Seconds are those of one run, mean over seeds.
#[derive(serde::Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) accuracy: Vec<f64>,
    mean: f64,
    spread: f64,
    pub(crate) weights: Vec<f64>,
    pub(crate) ogr: Option<Ratios>,
    pub(crate) held: u64,
    pub(crate) solved: u64,
    train_batch: Option<TrainBatch>,
    pub(crate) blend_seconds: f64,
    pub(crate) train_seconds: f64,
}

impl Row {
    pub(crate) fn new(outcome: &Outcome<'_>, train_batch: TrainBatch) -> Self {
        let (accuracy, last) = (outcome.accuracy(), outcome.epochs().saturating_sub(1));
        Row {
            name: outcome.method.name.clone(),
            mean: mean(&accuracy),
            spread: deviation(&accuracy),
            accuracy,
            weights: outcome.weights(last),
            ogr: outcome.ogr(last),
            held: outcome.runs.iter().map(|run| run.held).sum(),
            solved: outcome.runs.iter().map(|run| run.solved).sum(),
            train_batch: matches!(outcome.method.weights, Weights::FromGradients(_)).then_some(train_batch),
            blend_seconds: outcome.mean(|run| run.estimating.as_secs_f64()),
            train_seconds: outcome.mean(|run| run.training.as_secs_f64()),
        }
    }

    /// Difference of the accuracy to another method, by seed: all methods of a seed share its samples, whose spread so
    /// cancels.
    fn minus(&self, other: &Row) -> String {
        if self.accuracy == other.accuracy {
            return String::new();
        }
        let differences: Vec<f64> = self.accuracy.iter().zip(&other.accuracy).map(|(a, b)| a - b).collect();
        let error = deviation(&differences) / (differences.len() as f64).sqrt();
        format!("{:+.3}{}", mean(&differences), plus_minus(error))
    }
}

impl Summary {
    /// One row per method.
    pub(crate) fn table(&self) -> Result<Table> {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let weights = format!("final weights\n{}", self.modalities.join(" / "));
        table.set_header([
            "method",
            "test accuracy\nmean ± sd",
            "minus naive\nmean ± se",
            "minus uniform\nmean ± se",
            &weights,
            "OGR: blend\n(uniform)",
            "m / its error",
            "held /\nsolved",
            "t from\nbatch",
            "estimating\ns",
            "training\ns",
        ]);
        let find = |name| self.methods.iter().find(|row| row.name == name).context("a baseline is missing");
        let (naive, uniform) = (find("naive")?, find("uniform")?);
        for row in &self.methods {
            let weights: Vec<String> = row.weights.iter().map(|weight| format!("{weight:.2}")).collect();
            let (mut solved, mut estimating) = (String::new(), String::new());
            if row.solved > 0 {
                solved = format!("{} / {}", row.held, row.solved);
                estimating = format!("{:.2}", row.blend_seconds);
            }
            let signal = row.ogr.iter().filter_map(|ogr| ogr.signal.as_ref()).flatten();
            let signal: Vec<String> = signal.map(|signal| format!("{signal:.1}")).collect();
            let batch = row.train_batch.and_then(|batch| batch.to_possible_value());
            let cells = [
                row.name.clone(),
                format!("{:.3}{}", row.mean, plus_minus(row.spread)),
                row.minus(naive),
                row.minus(uniform),
                weights.join(" / "),
                row.ogr.as_ref().map_or(String::new(), |ogr| format!("{:.2} ({:.2})", ogr.blend, ogr.uniform)),
                signal.join(" / "),
                solved,
                batch.map_or(String::new(), |batch| batch.get_name().to_owned()),
                estimating,
                format!("{:.2}", row.train_seconds),
            ];
            table.add_row(cells.into_iter().enumerate().map(|(i, text)| {
                Cell::new(text).set_alignment(if i == 0 { CellAlignment::Left } else { CellAlignment::Right })
            }));
        }
        Ok(table)
    }
}
