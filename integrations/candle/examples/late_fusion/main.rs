//! Gradient-Blending of a late-fusion network on real data, with candle on the CPU.
//!
//! One network, several methods to weight its losses; samples, initial weights and batches are the same for each:
//!
//! | method | weights |
//! |---|---|
//! | `alone:<input>` | that input's loss only, tested by its own head |
//! | `naive` | the fused loss only |
//! | `uniform` | 1 / K for each of the K = M + 1 losses |
//! | `gradnorm`, `mmpareto` | two later methods, implemented anew from their papers: see `../common/peers.rs` |
//! | `offline-loss`, `online-loss` | estimated from losses: once, or at the start of each super-epoch |
//! | `online-gradient-epoch` | estimated from gradients at the end of each super-epoch |
//! | `online-gradient-step` | estimated from gradients at each step |
//! | `online-gradient-cheap` | the same at every r-th step, plain steps on the weighted loss between |
//! | `...:correlated` | the overfitting of modalities is not taken as uncorrelated |
//! | `...:min-fused` | the fused loss has a least weight |
//!
//! `../common/train.rs` has the training loop.

mod audio;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod images;
mod methods;
mod network;
mod plots;
mod report;
#[cfg(test)]
mod tests;
mod views;
mod wav;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use crate::common::arguments::count;
use crate::common::outputs::{Outputs, RUNS};
use crate::common::runs::{Log, complete, interrupted, run_all, threads};
use crate::common::weights::{SUPER_EPOCH, WARM_UP};
use crate::data::{Data, Nuisance, Sizes, Source};
use crate::methods::{Case, Method, Training};
use crate::report::{Outcome, Record, Row, Summary};

/// The data that are part of this example.
const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data");

/// Trains a late-fusion network on real data and compares methods to weight its losses.
///
/// The network has an encoder (one hidden layer) and a head per input, and a head on the features of all encoders; its
/// M + 1 losses are cross-entropies. All methods have the same samples, initial weights and batches, seed by seed. None
/// trains on the held-out samples. Accuracy is that of the fused head (of alone:<input>, its own) after the last epoch.
///
/// Without --audio the data are 2,000 handwritten digits in six views (UCI Multiple Features), which are part of this
/// example: fac, fou, kar, mor, pix, zer. Every feature gets Gaussian noise once (--noise). The samples are drawn anew for
/// each seed. All methods run on the clean data, with a further input of noise, and with one that shows the digit in training
/// samples only.
///
/// With --audio they are spoken and handwritten digits, paired by label: "audio", 20 log-mel energies in each of 8 parts of a
/// recording, and "image", 64 pixels with noise. The test speakers and test images are not trained on; held-out samples have
/// the training speakers.
///
/// Differences between methods are paired by seed, and stand with their standard error.
///
/// In the tables of --details, "estimating s" is spent in steps that observe (the backward passes of all losses and of the
/// held-out one, and the library) and in estimates from losses, "training s" in all of training. Both are of one run, mean
/// over seeds, while other runs use the other threads. "held" counts the solves that had no loss to prefer and held the
/// weights. "OGR" is the overfitting-to-generalisation ratio of the weights in force at the end, and of uniform ones, median
/// over seeds: compare the two in a row, not rows with each other. It is a magnitude and does not distinguish a loss that
/// helps from one that harms; the weights do. "m / its error" is the mean generalisation product of each loss over its
/// standard error, in the order of the weights, median over seeds: between -2 and 2, whether the loss gets a weight is
/// chance. A fused loss without weight leaves the fused head, and thus the accuracy, unchanged.
#[derive(Parser)]
#[command(name = "late_fusion")]
struct Args {
    /// Seeds to run: 16, or 3 with --quick
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// The first seed; the others follow it
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 32))]
    first_seed: u64,
    /// Three seeds only
    #[arg(long)]
    quick: bool,
    /// Inputs to train on, such as pix,zer: all by default
    #[arg(long, value_delimiter = ',', value_name = "INPUTS")]
    modalities: Vec<String>,
    /// Compares every mixture of the inputs with its best single input: naive, uniform, and weights from gradients
    #[arg(long, conflicts_with_all = ["nuisance", "details"])]
    mixtures: bool,
    /// Adds an input whose loss should get no weight: one case for each. All three by default, with --audio none
    #[arg(long, value_delimiter = ',')]
    nuisance: Vec<Nuisance>,
    /// Folder of the six views, as mfeat-fac.csv.gz and so on
    #[arg(long, value_name = "DIR", conflicts_with = "audio")]
    data: Option<PathBuf>,
    /// Folder of {digit}_{speaker}_{index}.wav, 8 kHz mono 16-bit, or the folder that has it as `recordings`
    #[arg(long, value_name = "DIR")]
    audio: Option<PathBuf>,
    /// With --audio: handwritten digits, 64 pixels from 0 to 16 and a label per line, separated by commas. By default those
    /// of this example
    #[arg(long, value_name = "CSV", requires = "audio")]
    images: Option<PathBuf>,
    /// With --audio: how many speakers, the last by name, are for testing only; with 4 of 6, audio overfits to the other
    /// two
    #[arg(long, default_value_t = 4, requires = "audio")]
    test_speakers: usize,
    #[command(flatten)]
    options: data::Options,
    #[command(flatten)]
    training: Training,
    /// Also prints what each method did: its weights, OGR, and time
    #[arg(long)]
    details: bool,
    /// Runs at a time; by default one per processor. Results do not depend on it
    #[arg(long, value_parser = count(1024))]
    threads: Option<usize>,
    /// Folder for the plots, the tables (results.md), and the result of each run (runs.jsonl), written as it ends
    #[arg(long, value_name = "DIR", default_value = "target/late_fusion")]
    out: PathBuf,
    /// Also writes the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    common::runs::main(|| compare(&Args::parse()))
}

fn compare(args: &Args) -> Result<Summary> {
    let training = &args.training;
    let start = Instant::now();
    let (source, inputs) = read(args)?;
    let seeds = args.seeds.unwrap_or(if args.quick { 3 } else { 16 });
    let seeds: Vec<u64> = (args.first_seed..args.first_seed + seeds).collect();
    let threads = threads(args.threads);
    let cases = cases(args, &source, &inputs, &seeds)?;
    let outputs = Outputs::open(&args.out, plots::names(args.mixtures), args.json.as_deref(), &files(args))?;
    let data = source.describe(&args.options);
    println!("data: {data}");
    let Sizes { train, held_out, test } = source.sizes(&args.options);
    let share = 100.0 * held_out as f64 / (train + held_out) as f64;
    println!("per seed: {train} training samples, {held_out} held out ({share:.0} %), {test} for testing");
    println!(
        "{} seeds, {} epochs of Adam at {}, batches of {}; super-epochs of {WARM_UP} epochs, then {SUPER_EPOCH}",
        seeds.len(),
        training.epochs,
        training.learning_rate,
        training.batch
    );

    let log = Log::create(&outputs.path(RUNS), threads)?;
    let jobs: Vec<Job<'_>> = seeds.iter().enumerate().flat_map(|(nth, seed)| jobs(&cases, nth, *seed)).collect();
    let work = |job: &Job<'_>, on_epoch: &dyn Fn() -> Result<()>| {
        let Job { case, method, nth, seed } = *job;
        let (mut run, accuracy) = case.run(method, nth, seed, training, on_epoch)?;
        if args.mixtures {
            // No plot shows what came before.
            run.states.drain(..run.states.len() - 1);
        }
        Ok(Record { data: case.name.clone(), method: method.name.clone(), seed, accuracy, run })
    };
    let name = |job: &Job<'_>| format!("seed {}, {}, {}", job.seed, job.case.name, job.method.name);
    let records = run_all(&jobs, training.epochs, threads, &log, name, work)?;
    let of_seed = jobs.len() / seeds.len();
    let complete = complete(&records, of_seed, &outputs.path(RUNS))?;
    let outcomes = jobs[..of_seed].iter().enumerate().map(|(i, &Job { case, method, .. })| {
        let runs = complete.iter().map(|(_, of)| of[i]).collect();
        Outcome { case, method, runs }
    });
    let outcomes: Vec<Outcome<'_>> = outcomes.collect();
    let summary = Summary {
        data,
        seeds: complete.iter().map(|(nth, _)| seeds[*nth]).collect(),
        train_batch: training.train_batch,
        methods: outcomes.iter().map(|outcome| Row::new(outcome, training.train_batch)).collect(),
    };
    show(args, &cases, &outcomes, &summary, outputs)?;
    if interrupted() {
        println!("interrupted: {} of {} seeds", summary.seeds.len(), seeds.len());
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{seconds:.0} s in all on {threads} threads; `late_fusion --help` explains the columns");
    Ok(summary)
}

/// What is trained on, and by which methods.
fn cases(args: &Args, source: &Source, inputs: &[usize], seeds: &[u64]) -> Result<Vec<Case>> {
    let draw = |seed: &u64| source.draw(&args.options, *seed).with_context(|| format!("seed {seed}"));
    if args.mixtures {
        ensure!(inputs.len() > 1, "--mixtures needs at least two inputs");
        let samples: Vec<Data> = seeds.iter().map(draw).collect::<Result<_>>()?;
        return Case::of_mixtures(source, &samples, inputs, &args.training);
    }
    let all = [Nuisance::None, Nuisance::Noise, Nuisance::Shortcut];
    let nuisances = match (&args.nuisance[..], &args.audio) {
        ([], None) => &all[..],
        ([], Some(_)) => &all[..1],
        (given, _) => given,
    };
    for (i, nuisance) in nuisances.iter().enumerate() {
        ensure!(!nuisances[..i].contains(nuisance), "--nuisance: one is given twice");
    }
    let samples: Vec<Data> = seeds.iter().map(draw).collect::<Result<_>>()?;
    Case::of_nuisances(source, &samples, inputs, nuisances, &args.training)
}

/// Writes and prints all results.
fn show(args: &Args, cases: &[Case], outcomes: &[Outcome<'_>], summary: &Summary, outputs: Outputs) -> Result<()> {
    let (drawn, table, details) = if args.mixtures {
        (plots::mixtures(summary, &outputs.folder), summary.mixtures_table(), String::new())
    } else {
        (plots::draw(cases, outcomes, summary, &outputs.folder), summary.comparison()?, summary.details()?)
    };
    let page = format!("{}\n\n{table}\n{details}", summary.data);
    let printed = format!("{table}\n{}", if args.details { &details } else { "" });
    outputs.finish(drawn, &page, &printed, summary)
}

/// A run of a method on a case.
struct Job<'a> {
    case: &'a Case,
    method: &'a Method,
    /// The position of the seed among all.
    nth: usize,
    seed: u64,
}

fn jobs(cases: &[Case], nth: usize, seed: u64) -> impl Iterator<Item = Job<'_>> {
    cases.iter().flat_map(move |case| case.methods.iter().map(move |method| Job { case, method, nth, seed }))
}

/// Reads the data, and returns which inputs are wanted.
fn read(args: &Args) -> Result<(Source, Vec<usize>)> {
    let Some(audio) = &args.audio else {
        let inputs = data::choose(&args.modalities, &views::VIEWS.map(|(name, _)| name))?;
        let wanted: Vec<_> = inputs.iter().map(|k| views::VIEWS[*k]).collect();
        return Ok((Source::Views(views::read_views(&views_path(args), &wanted)?), (0..wanted.len()).collect()));
    };
    let inputs = data::choose(&args.modalities, &["audio", "image"])?;
    let recordings = audio::read_recordings(audio)?;
    let images = images_path(args);
    let context = || format!("cannot read the images {}", images.display());
    let images = images::parse_images(&fs::read(&images).with_context(context)?).with_context(context)?;
    Ok((Source::pairs(recordings, images, args.test_speakers)?, inputs))
}

fn views_path(args: &Args) -> PathBuf {
    args.data.clone().unwrap_or_else(|| Path::new(DATA).join("mfeat"))
}

fn images_path(args: &Args) -> PathBuf {
    args.images.clone().unwrap_or_else(|| Path::new(DATA).join("digits.csv"))
}

/// The files that are read, but for recordings: no output has such a name.
fn files(args: &Args) -> Vec<PathBuf> {
    let folder = views_path(args);
    let mut files: Vec<PathBuf> = views::VIEWS.iter().map(|(name, _)| views::path(&folder, name)).collect();
    files.push(images_path(args));
    files
}
