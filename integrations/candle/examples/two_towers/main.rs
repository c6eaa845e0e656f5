//! Gradient-Blending of an image-text matching network, with candle on the CPU.
//!
//! A network that is trained to match pictures and texts alone forgets what distinguishes pictures that share a text. A
//! loss inside each modality keeps it, and takes from the matching. The example shows how much of both each way to weight
//! the losses reaches:
//!
//! | method | weights |
//! |---|---|
//! | `naive` | the matching loss only |
//! | `uniform` | 1 / 3 for each loss |
//! | `fixed:<weight>` | this weight for the matching loss, the rest for the two others alike |
//! | `gradnorm`, `mmpareto` | two later methods, implemented anew from their papers: see `../common/peers.rs` |
//! | `offline-loss`, `online-loss` | estimated from losses: once, or at the start of each super-epoch |
//! | `online-gradient-epoch` | estimated from gradients at the end of each super-epoch |
//! | `online-gradient-step` | estimated from gradients at each step |
//! | `online-gradient-step:floor` | the same with a least weight of the matching loss |
//!
//! `../common/train.rs` has the training loop.

#[path = "../common/mod.rs"]
mod common;
mod data;
mod measures;
mod network;
mod plots;
mod report;
mod sheet;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::common::arguments::{count, is_part, number};
use crate::common::outputs::{Outputs, RUNS};
use crate::common::runs::{Log, complete, interrupted, run_all, threads};
use crate::common::train::{Settings, TrainBatch, train};
use crate::common::weights::Weights;
use crate::data::{Data, Sizes, Source};
use crate::measures::measure;
use crate::network::{MATCHING, Network};
use crate::report::{KNOWLEDGE, Method, Record, Row, Summary};
use crate::sheet::{Sheet, queries};

/// K: the image loss, the text loss and the matching loss.
const LOSSES: usize = 3;
const MOST: u64 = 1_000_000;

/// Trains two towers to match pictures and names of emoji, and compares methods to weight the losses.
///
/// The data are 1,558 emoji in four styles of drawing, which are part of this example: four pictures share one text. The
/// image tower merges patches of 32 x 32 pixels, the text tower has a bag of words and of trigrams. Losses: style x category
/// for pictures, subcategory for texts (cross-entropies), and matching (symmetric, contrastive over the batch, with a
/// temperature that is learnt). All methods have the same emoji, initial weights and batches, seed by seed; the emoji
/// are drawn anew for each seed, and none is in two of the training, held-out and test sets.
///
/// "recall@1" and "recall@10" are shares of test pictures whose own text is the nearest, or among the ten nearest, of all
/// test texts. "style" and "category" are those whose five nearest training pictures vote for their own, "subcategory" the
/// same for texts. Differences are paired by seed, and stand with their standard error. "s" is the time of one training,
/// while other runs use the other threads.
///
/// A method is on the frontier if no other has no less of recall@1 and of the knowledge, and more of one, by the means over
/// seeds.
#[derive(Parser)]
#[command(name = "two_towers")]
struct Args {
    /// Seeds to run: 3, or 1 with --quick
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// The first seed; the others follow it
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 32))]
    first_seed: u64,
    /// One seed, few epochs
    #[arg(long)]
    quick: bool,
    /// Folder of emoji.csv, noto.png, twemoji.png, openmoji.png and fluent.png
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/emoji"))]
    data: PathBuf,
    /// Emoji to train on
    #[arg(long, default_value = "1000", value_parser = count(MOST))]
    train: usize,
    /// Held-out emoji
    #[arg(long, default_value = "200", value_parser = count(MOST))]
    held_out: usize,
    /// Emoji to test on: all others by default
    #[arg(long, value_parser = count(MOST))]
    test: Option<usize>,
    /// Epochs to train for: 60, or 10 with --quick
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    epochs: Option<u64>,
    /// Pairs of a picture and a text per batch, of different emoji; an epoch leaves out what does not fill a batch
    #[arg(long, default_value = "100", value_parser = count(MOST))]
    batch: usize,
    /// Adam's learning rate
    #[arg(long, default_value = "0.002", value_parser = number(|rate| rate > 0.0 && rate <= 1000.0, "more than 0, at most 1000"))]
    learning_rate: f64,
    /// Fixed weights of the matching loss, besides those of naive and uniform
    #[arg(long, value_delimiter = ',', default_value = "0.1,0.6,0.8,0.9", value_parser = number(|weight| is_part(weight) && weight > 0.0, "more than 0, less than 1"))]
    fixed: Vec<f64>,
    /// Least weight of the matching loss in online-gradient-step:floor
    #[arg(long, default_value = "0.5", value_parser = number(is_part, "at least 0, less than 1"))]
    floor: f64,
    /// Decay of the moving averages of online-gradient-step
    #[arg(long, default_value = "0.99", value_parser = number(is_part, "at least 0, less than 1"))]
    decay: f64,
    /// Where the train gradient t of the matching loss comes from
    #[arg(long, default_value = "same")]
    train_batch: TrainBatch,
    /// Runs at a time; by default one per processor. Results do not depend on it
    #[arg(long, value_parser = count(1024))]
    threads: Option<usize>,
    /// Folder for the plots, the tables (results.md), and the result of each run (runs.jsonl), written as it ends
    #[arg(long, value_name = "DIR", default_value = "target/two_towers")]
    out: PathBuf,
    /// Also writes the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const NAIVE: &str = "naive";
const FLOOR: &str = "online-gradient-step:floor";
const FRONTIER: &str = "frontier.svg";
const SHEET: &str = "neighbours.svg";

fn main() -> ExitCode {
    common::runs::main(|| compare(&Args::parse()))
}

fn compare(args: &Args) -> Result<Summary> {
    let start = Instant::now();
    let source = Source::read(&args.data)?;
    let seeds = args.seeds.unwrap_or(if args.quick { 1 } else { 3 });
    let seeds: Vec<u64> = (args.first_seed..args.first_seed + seeds).collect();
    let epochs = args.epochs.unwrap_or(if args.quick { 10 } else { 60 });
    let threads = threads(args.threads);
    let methods = methods(args)?;
    for (option, emoji) in [("--train", args.train), ("--held-out", args.held_out)] {
        let batch = args.batch;
        ensure!(
            emoji >= batch,
            "{option}: {emoji} emoji do not fill a batch of {batch}, on whose size the matching loss depends"
        );
    }
    let sizes = Sizes { train: args.train, held_out: args.held_out, test: args.test };
    let draw = |seed: &u64| source.draw(&sizes, *seed);
    let samples: Vec<Data> = seeds.iter().map(draw).collect::<Result<_>>()?;
    let outputs = Outputs::open(&args.out, &[FRONTIER, SHEET], args.json.as_deref(), &data::paths(&args.data))?;
    println!(
        "data: {} emoji in {} styles; per seed {} for training, {} held out, {} for testing",
        source.emoji.len(),
        data::STYLES.len(),
        args.train,
        args.held_out,
        samples[0].test.len()
    );
    println!(
        "{} methods, {} seeds, {epochs} epochs of Adam at {}, batches of {}",
        methods.len(),
        seeds.len(),
        args.learning_rate,
        args.batch
    );

    let log = Log::create(&outputs.path(RUNS), threads)?;
    let settings =
        Settings { epochs, batch: args.batch, learning_rate: args.learning_rate, train_batch: args.train_batch };
    let of_seed = |(data, seed)| methods.iter().map(move |method| (data, seed, method));
    let jobs: Vec<(&Data, &u64, &Method)> = samples.iter().zip(&seeds).flat_map(of_seed).collect();
    let work = |&(data, seed, method): &(&Data, &u64, &Method), on_epoch: &dyn Fn() -> Result<()>| {
        let network = Network::new(&source, data, settings.batch, *seed)?;
        let run = train(&network, &method.weights, &settings, *seed, on_epoch)?;
        let (measures, near) = measure(&network, data)?;
        let near = queries(data.test.len()).into_iter().map(|query| near[query]).collect();
        Ok(Record { method: method.name.clone(), seed: *seed, measures, run, near })
    };
    let name = |(_, seed, method): &(&Data, &u64, &Method)| format!("seed {seed}, {}", method.name);
    let records = run_all(&jobs, epochs, threads, &log, name, work)?;
    let complete = complete(&records, methods.len(), &outputs.path(RUNS))?;
    let row = |(i, method)| Row::new(method, &complete.iter().map(|(_, of)| of[i]).collect::<Vec<_>>());
    let summary = Summary {
        seeds: complete.iter().map(|(nth, _)| seeds[*nth]).collect(),
        methods: methods.iter().enumerate().map(row).collect(),
    };
    let (nth, first) = &complete[0];
    let near = |name| {
        let record = first.iter().find(|record| record.method == name);
        record.map_or(&[][..], |record| &record.near)
    };
    let data = &samples[*nth];
    let sheet = Sheet { source: &source, data, methods: [(NAIVE, near(NAIVE)), (FLOOR, near(FLOOR))] };
    show(&summary, &sheet, outputs)?;
    if interrupted() {
        println!("interrupted: {} of {} seeds", summary.seeds.len(), seeds.len());
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{seconds:.0} s in all on {threads} threads; `two_towers --help` explains the columns");
    Ok(summary)
}

/// All methods, those with fixed weights by the weight of matching.
fn methods(args: &Args) -> Result<Vec<Method>> {
    let mut fixed = args.fixed.clone();
    fixed.sort_by(f64::total_cmp);
    ensure!(fixed.windows(2).all(|pair| pair[0] < pair[1]), "--fixed: a weight is given twice");
    let mut methods =
        vec![Method { name: NAIVE.to_owned(), weights: Weights::only(MATCHING, LOSSES), fixed: Some(1.0) }];
    let third = 1.0 / LOSSES as f64;
    methods.push(Method { name: "uniform".to_owned(), weights: Weights::uniform(LOSSES), fixed: Some(third) });
    for weight in fixed {
        let rest = (1.0 - weight) / 2.0;
        let weights = Weights::Fixed(vec![rest, rest, weight]);
        methods.push(Method { name: format!("fixed:{weight}"), weights, fixed: Some(weight) });
    }
    let mut add = |name: &str, weights| methods.push(Method { name: name.to_owned(), weights, fixed: None });
    add("gradnorm", Weights::GradNorm);
    add("mmpareto", Weights::MmPareto);
    add("offline-loss", Weights::offline_loss());
    add("online-loss", Weights::online_loss()?);
    add("online-gradient-epoch", Weights::per_super_epoch(LOSSES)?.into());
    let per_step = || Weights::per_step(LOSSES, args.decay);
    add("online-gradient-step", per_step().into());
    add(FLOOR, per_step().min_weight(&[0.0, 0.0, args.floor]).into());
    Ok(methods)
}

/// Writes and prints all results.
fn show(summary: &Summary, sheet: &Sheet<'_>, outputs: Outputs) -> Result<()> {
    let mut verdicts = String::new();
    for (knowledge, name) in KNOWLEDGE.iter().enumerate() {
        verdicts += &format!("\nRecall@1 and {name}:\n\n");
        verdicts.extend(summary.verdicts(knowledge).iter().map(|verdict| format!("- {verdict}\n")));
    }
    let page = format!("{}\n\n{}\n{verdicts}", summary.table(), summary.differences()?);
    let drawn = plots::frontier(summary, &outputs.path(FRONTIER));
    let shown = sheet.write(&outputs.path(SHEET));
    outputs.finish(drawn.and(shown), &page, &page, summary)
}
