//! What came of the methods: a table for the screen and JSON for programs.

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::train::{Method, Ratios, Run, TrainBatch};

/// All runs of one method, one for each seed.
pub(crate) struct Outcome {
    pub(crate) method: Method,
    pub(crate) name: String,
    pub(crate) runs: Vec<Run>,
}

impl Outcome {
    pub(crate) fn accuracy(&self) -> Vec<f64> {
        self.runs.iter().map(|run| run.accuracy).collect()
    }

    /// The weights in force at the end of an epoch, mean over seeds.
    pub(crate) fn weights(&self, epoch: usize) -> Vec<f64> {
        let losses = self.runs.first().map_or(0, |run| run.epochs[epoch].weights.len());
        (0..losses).map(|k| mean(&self.each(|run| run.epochs[epoch].weights[k]))).collect()
    }

    /// The ratios at the end of an epoch, median over seeds: they are quotients, so a mean would be that of outliers.
    pub(crate) fn ogr(&self, epoch: usize) -> Option<Ratios> {
        let of: Vec<&Ratios> = self.runs.iter().filter_map(|run| run.epochs[epoch].ogr.as_ref()).collect();
        let middle = |value: &dyn Fn(&Ratios) -> f64| median(of.iter().map(|ratios| value(ratios)).collect());
        let losses = of.first()?.losses.len();
        Some(Ratios {
            losses: (0..losses).map(|k| middle(&|ratios| ratios.losses[k])).collect(),
            blend: middle(&|ratios| ratios.blend),
            uniform: middle(&|ratios| ratios.uniform),
        })
    }

    pub(crate) fn epochs(&self) -> usize {
        self.runs.first().map_or(0, |run| run.epochs.len())
    }

    fn each(&self, value: impl Fn(&Run) -> f64) -> Vec<f64> {
        self.runs.iter().map(value).collect()
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

/// One seed has no spread.
fn plus_minus(error: f64) -> String {
    if error.is_nan() { String::new() } else { format!(" ± {error:.3}") }
}

/// Of the values that are numbers.
fn median(mut values: Vec<f64>) -> f64 {
    values.retain(|value| !value.is_nan());
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => (values[len / 2 - 1] + values[len / 2]) / 2.0,
    }
}

fn train_batch_name(train_batch: TrainBatch) -> &'static str {
    match train_batch {
        TrainBatch::Same => "same",
        TrainBatch::Independent => "independent",
    }
}

/// One row for each method.
pub(crate) fn table(outcomes: &[Outcome], losses: &[String], train_batch: TrainBatch) -> Result<Table> {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let weights = format!("final weights\n{}", losses.join(" / "));
    table.set_header([
        "method",
        "test accuracy\nmean ± sd",
        "less naive\nmean ± se",
        "less uniform\nmean ± se",
        &weights,
        "OGR: blend\n(uniform)",
        "held /\nsolved",
        "t from\nbatch",
        "blending s\n(gradblend ms)",
        "training\ns",
    ]);
    let find = |method: Method| outcomes.iter().find(|outcome| outcome.method == method);
    let naive = find(Method::Naive).context("naive is missing")?.accuracy();
    let uniform = find(Method::Uniform).context("uniform is missing")?.accuracy();
    for outcome in outcomes {
        let accuracy = outcome.accuracy();
        // Seed by seed: the spread over seeds is that of the samples, which all methods of a seed share.
        let less = |other: &[f64]| {
            let differences: Vec<f64> = accuracy.iter().zip(other).map(|(a, b)| a - b).collect();
            let error = deviation(&differences) / (differences.len() as f64).sqrt();
            if outcome.accuracy() == other {
                "".to_owned()
            } else {
                format!("{:+.3}{}", mean(&differences), plus_minus(error))
            }
        };
        let last = outcome.epochs().saturating_sub(1);
        let weights: Vec<String> = outcome.weights(last).iter().map(|weight| format!("{weight:.2}")).collect();
        let ogr = outcome.ogr(last).map(|ogr| format!("{:.2} ({:.2})", ogr.blend, ogr.uniform));
        let (held, solved) = (outcome.each(|run| run.held as f64), outcome.each(|run| run.solved as f64));
        let (held, solved) = (held.iter().sum::<f64>(), solved.iter().sum::<f64>());
        let library = mean(&outcome.each(|run| run.library.as_secs_f64()));
        let blending = mean(&outcome.each(|run| run.blending.as_secs_f64()));
        let gradients = outcome.method.uses_gradients();
        let row = [
            outcome.name.clone(),
            format!("{:.3}{}", mean(&accuracy), plus_minus(deviation(&accuracy))),
            less(&naive),
            less(&uniform),
            weights.join(" / "),
            ogr.unwrap_or_default(),
            if outcome.method.estimates() { format!("{held} / {solved}") } else { String::new() },
            if gradients { train_batch_name(train_batch).to_owned() } else { String::new() },
            match outcome.method.estimates() {
                false => String::new(),
                true if gradients => format!("{blending:.2} ({:.0})", library * 1e3),
                true => format!("{blending:.2}"),
            },
            format!("{:.2}", mean(&outcome.each(|run| run.training.as_secs_f64()))),
        ];
        table.add_row(row.into_iter().enumerate().map(|(i, text)| {
            Cell::new(text).set_alignment(if i == 0 { CellAlignment::Left } else { CellAlignment::Right })
        }));
    }
    Ok(table)
}

/// What the table is made of. Seconds are those of one run, mean over seeds.
pub(crate) fn json(
    outcomes: &[Outcome],
    description: &str,
    losses: &[String],
    seeds: u64,
    train_batch: TrainBatch,
) -> Value {
    let method = |outcome: &Outcome| {
        let last = outcome.epochs().saturating_sub(1);
        let accuracy = outcome.accuracy();
        let total = |value: fn(&Run) -> u64| outcome.runs.iter().map(value).sum::<u64>();
        json!({
            "name": outcome.name,
            "accuracy": accuracy,
            "mean": mean(&accuracy),
            "spread": deviation(&accuracy),
            "weights": outcome.weights(last),
            "ogr": outcome.ogr(last).map(|ogr| json!({
                "losses": ogr.losses, "blend": ogr.blend, "uniform": ogr.uniform,
            })),
            "held": total(|run| run.held),
            "solved": total(|run| run.solved),
            "train_batch": outcome.method.uses_gradients().then(|| train_batch_name(train_batch)),
            "blend_seconds": mean(&outcome.each(|run| run.blending.as_secs_f64())),
            "library_seconds": mean(&outcome.each(|run| run.library.as_secs_f64())),
            "train_seconds": mean(&outcome.each(|run| run.training.as_secs_f64())),
        })
    };
    json!({
        "data": description,
        "modalities": losses,
        "seeds": (0..seeds).collect::<Vec<_>>(),
        "train_batch": train_batch_name(train_batch),
        "methods": outcomes.iter().map(method).collect::<Vec<_>>(),
    })
}
