//! Gradient-Blending of a late-fusion network on real data, with candle on the CPU.
//!
//! One network, many ways to weight its losses, the same samples, first weights and batches for each:
//!
//! | method | weights |
//! |---|---|
//! | `alone:<modality>` | that modality's loss only, tested by its own head |
//! | `naive` | the fused loss only |
//! | `uniform` | 1 / K for each of the K = M + 1 losses |
//! | `offline-loss`, `online-loss` | estimated from losses: once, or at the start of each super-epoch |
//! | `online-gradient-epoch` | estimated from gradients at the end of each super-epoch |
//! | `online-gradient-step` | estimated from gradients at each step |
//! | `online-gradient-cheap` | the same at every r-th step, plain steps on the weighted loss between |
//!
//! To see how a trainer is linked to gradblend, read `blending.rs`, then `train.rs`.

mod audio;
mod blending;
mod data;
mod network;
mod plots;
mod report;
mod train;

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gradblend::Overfitting;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::data::{Nuisance, Options, Source};
use crate::report::Outcome;
use crate::train::{Method, Run, SUPER_EPOCH, Settings, TrainBatch, WARM_UP};

/// Trains a late-fusion network on real data and compares ways to weight its losses.
///
/// The network has an encoder (one hidden layer) and a head for each modality, and a head on all encoders' features;
/// its M + 1 losses are cross-entropies. All methods share samples, first weights and batch order, seed by seed, none
/// trains on the held-out samples, and accuracy is that of the fused head (of alone:<modality>, its own) after the last
/// epoch.
///
/// Without --audio the data are the 1,797 handwritten digits (UCI, 8 x 8 pixels from 0 to 16) that the crate smartcore
/// brings along; nothing is downloaded. Every pixel gets Gaussian noise once (--pixel-noise), then the digit is seen in
/// two views: "top", the 32 pixels of rows 0 to 3, and "bottom", the 8 column sums and 4 row sums of rows 4 to 7. The
/// samples are drawn anew for each seed.
///
/// With --audio and --images they are spoken and handwritten digits, paired by label: "audio", 20 log-mel energies in
/// each of 8 parts of a recording, and "image", the 64 pixels with noise. The test speakers and test images are not
/// trained on; held-out samples have the training speakers.
///
/// "blending s" is what a plain step on the fused loss would not do: the backward passes of the other losses, those for
/// t and g, the estimates from losses, and the library; in brackets the library alone. "training s" is all of training.
/// Both are of one run, mean over seeds, while other runs used the other threads. "held" counts the solves that had
/// nothing to go by and kept the weights. "OGR" is the overfitting-to-generalisation ratio of the weights in force at
/// the end, and of uniform ones, median over seeds: compare the two in a row, not rows with each other. It is a
/// magnitude and does not tell a loss that helps from one that harms; the weights do. A fused loss without weight
/// leaves the fused head, and with it the accuracy, where it is.
#[derive(Parser)]
#[command(name = "late_fusion")]
struct Args {
    /// Seeds to run: 16, or 3 with --quick
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Epochs to train for
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Three seeds only
    #[arg(long)]
    quick: bool,
    /// Folder of {digit}_{speaker}_{index}.wav, 8 kHz mono 16-bit, or the folder that holds it as `recordings`
    #[arg(long, value_name = "DIR", requires = "images")]
    audio: Option<PathBuf>,
    /// Handwritten digits: 64 pixels from 0 to 16 and a label a line, separated by commas
    #[arg(long, value_name = "CSV", requires = "audio")]
    images: Option<PathBuf>,
    /// With --audio: how many speakers, the last by name, are for testing only; with 4 of 6, audio overfits to the
    /// other two
    #[arg(long, default_value_t = 4)]
    test_speakers: usize,
    /// Adds a modality that ought to get no weight; turns on --correlated
    #[arg(long)]
    nuisance: Option<Nuisance>,
    /// Where the train gradient t of the fused loss comes from
    #[arg(long, default_value = "same")]
    train_batch: TrainBatch,
    /// Also runs online-gradient-epoch and -step without taking the overfitting of modalities as uncorrelated
    #[arg(long)]
    correlated: bool,
    /// online-gradient-cheap observes every so many steps
    #[arg(long, value_name = "STEPS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    every: u32,
    /// Decay of the moving averages behind online-gradient-step and -cheap
    #[arg(long, default_value_t = 0.99)]
    decay: f64,
    /// Training samples, held-out ones not among them
    #[arg(long, default_value_t = 500)]
    train: usize,
    /// Held-out samples: 100 is a sixth of the 600 at hand (the paper holds out 8 % to 13 % of far larger sets)
    #[arg(long, default_value_t = 100)]
    held_out: usize,
    /// Test samples
    #[arg(long, default_value_t = 500)]
    test: usize,
    /// Standard deviation of the noise on each pixel, drawn once a sample, so that it can be learned by heart. Without
    /// it most methods come close to 1
    #[arg(long, default_value_t = 6.0)]
    pixel_noise: f32,
    /// Samples a batch
    #[arg(long, default_value_t = 50)]
    batch: usize,
    /// Adam's learning rate
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Hidden units of each encoder and of the fused head
    #[arg(long, default_value_t = 64)]
    hidden: usize,
    /// Runs at a time; all processors if not given. Results do not depend on it
    #[arg(long)]
    threads: Option<NonZero<usize>>,
    /// Folder for accuracy.svg, weights.svg and ogr.svg
    #[arg(long, value_name = "DIR", default_value = "target/late_fusion")]
    out: PathBuf,
    /// Also writes the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match compare(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(args: &Args) -> Result<()> {
    ensure!(args.train > 0 && args.held_out > 0 && args.test > 0, "--train, --held-out and --test must be at least 1");
    ensure!(args.batch > 0 && args.hidden > 0, "--batch and --hidden must be at least 1");
    ensure!(args.pixel_noise.is_finite() && args.pixel_noise >= 0.0, "--pixel-noise must be at least 0");
    let begun = Instant::now();
    let source = match (&args.audio, &args.images) {
        (Some(audio), Some(images)) => {
            Source::pairs(audio::read_recordings(audio)?, audio::read_images(images)?, args.test_speakers)?
        }
        _ => Source::bundled()?,
    };
    let options = Options {
        train: args.train,
        held_out: args.held_out,
        test: args.test,
        pixel_noise: args.pixel_noise,
        nuisance: args.nuisance,
    };
    let settings = Settings {
        epochs: args.epochs,
        batch: args.batch,
        rate: args.learning_rate,
        hidden: args.hidden,
        decay: args.decay,
        every: args.every as usize,
        train_batch: args.train_batch,
    };
    let seeds = args.seeds.unwrap_or(if args.quick { 3 } else { 16 });
    let threads = args.threads.or(thread::available_parallelism().ok()).map_or(1, NonZero::get);
    let modalities = source.modalities(args.nuisance);
    let methods = methods(modalities.len(), args.correlated || args.nuisance.is_some());
    let description = source.describe(&options);
    let share = 100.0 * args.held_out as f64 / (args.train + args.held_out) as f64;
    println!("data: {description}");
    println!(
        "a seed: {} training samples, {} held out ({share:.0} %), {} for testing",
        args.train, args.held_out, args.test
    );
    println!(
        "{} methods, {seeds} seeds, {} epochs of Adam at {}, batches of {}; super-epochs of {WARM_UP} epochs, then \
         {SUPER_EPOCH}",
        methods.len(),
        settings.epochs,
        settings.rate,
        settings.batch
    );

    let runs = run_all(&methods, &modalities, &source, &options, &settings, seeds, threads)?;
    let outcome = |(method, runs)| Outcome { method, name: Method::name(method, &modalities), runs };
    let outcomes: Vec<Outcome> = methods.iter().copied().zip(runs).map(outcome).collect();
    let mut losses = modalities;
    losses.push("fused".to_owned());
    println!("{}", report::table(&outcomes, &losses, settings.train_batch)?);
    println!("`late_fusion --help` says what the columns mean");
    for path in plots::draw(&outcomes, &losses, &args.out)
        .with_context(|| format!("cannot draw plots in {}", args.out.display()))?
    {
        println!("plot: {}", path.display());
    }
    if let Some(path) = &args.json {
        let json = report::json(&outcomes, &description, &losses, seeds, settings.train_batch);
        std::fs::write(path, format!("{json:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
        println!("json: {}", path.display());
    }
    println!("{:.0} s in all on {threads} threads", begun.elapsed().as_secs_f64());
    Ok(())
}

fn methods(modalities: usize, correlated: bool) -> Vec<Method> {
    let mut methods: Vec<Method> = (0..modalities).map(Method::Alone).collect();
    methods.extend([Method::Naive, Method::Uniform, Method::OfflineLoss, Method::OnlineLoss]);
    methods.push(Method::OnlineGradientEpoch(Overfitting::Uncorrelated));
    methods.push(Method::OnlineGradientStep(Overfitting::Uncorrelated));
    methods.push(Method::OnlineGradientCheap);
    if correlated {
        methods.push(Method::OnlineGradientEpoch(Overfitting::Correlated));
        methods.push(Method::OnlineGradientStep(Overfitting::Correlated));
    }
    methods
}

/// Runs each method on each seed, `threads` runs at a time. Returns the runs of each method in order of seed: whichever
/// thread a run was on, and whenever it ended, makes no difference.
fn run_all(
    methods: &[Method],
    modalities: &[String],
    source: &Source,
    options: &Options,
    settings: &Settings,
    seeds: u64,
    threads: usize,
) -> Result<Vec<Vec<Run>>> {
    let jobs: Vec<(u64, usize)> = (0..seeds).flat_map(|seed| (0..methods.len()).map(move |m| (seed, m))).collect();
    let threads = threads.min(jobs.len());
    let bars = MultiProgress::new();
    let total = ProgressBar::new(jobs.len() as u64 * settings.epochs);
    let total = bars.add(total.with_style(ProgressStyle::with_template(
        "all runs {wide_bar} {percent:>3} %  {elapsed} elapsed, {eta} left",
    )?));
    let style = ProgressStyle::with_template("{msg:40!} {wide_bar} epoch {pos:>3} of {len}, {eta} left")?;
    let (next, (sender, receiver)) = (AtomicUsize::new(0), mpsc::channel());
    thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, jobs, total) = (sender.clone(), &next, &jobs, &total);
            let bar = bars.add(ProgressBar::new(settings.epochs).with_style(style.clone()));
            scope.spawn(move || {
                while let Some(&(seed, m)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    bar.reset();
                    bar.set_message(format!("seed {seed}, {}", methods[m].name(modalities)));
                    let run = source.draw(options, seed).and_then(|data| {
                        train::train(methods[m], &data, settings, seed, || {
                            bar.inc(1);
                            total.inc(1);
                        })
                    });
                    let failed = run.is_err();
                    // The receiver waits for all senders, so it is there.
                    let sent = sender.send((seed, m, run));
                    if failed || sent.is_err() {
                        // No other run needs to start.
                        next.store(jobs.len(), Ordering::Relaxed);
                    }
                }
                bar.finish_and_clear();
            });
        }
        drop(sender);
    });
    total.finish_and_clear();
    let mut done = receiver
        .into_iter()
        .map(|(seed, m, run)| {
            let context = || format!("seed {seed}, {}", methods[m].name(modalities));
            Ok((m, seed, run.with_context(context)?))
        })
        .collect::<Result<Vec<_>>>()?;
    done.sort_by_key(|(m, seed, _)| (*m, *seed));
    let mut runs: Vec<Vec<Run>> = methods.iter().map(|_| Vec::new()).collect();
    for (m, _, run) in done {
        runs[m].push(run);
    }
    ensure!(runs.iter().all(|runs| runs.len() as u64 == seeds), "a run is missing");
    Ok(runs)
}
