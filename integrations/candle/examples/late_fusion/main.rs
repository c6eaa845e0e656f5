//! Gradient-Blending of a late-fusion network on real data, with candle on the CPU.
//!
//! One network, several methods to weight its losses; samples, initial weights and batches are the same for each:
//!
//! | method | weights |
//! |---|---|
//! | `alone:<input>` | that input's loss only, tested by its own head |
//! | `naive` | the fused loss only |
//! | `uniform` | 1 / K for each of the K = M + 1 losses |
//! | `offline-loss`, `online-loss` | estimated from losses: once, or at the start of each super-epoch |
//! | `online-gradient-epoch` | estimated from gradients at the end of each super-epoch |
//! | `online-gradient-step` | estimated from gradients at each step |
//! | `online-gradient-cheap` | the same at every r-th step, plain steps on the weighted loss between |
//! | `...:correlated`, `...:min-fused` | with `--correlated` and `--min-fused`: another policy of the solver |
//!
//! `train.rs` has the training loop.

mod audio;
mod data;
mod network;
mod plots;
mod report;
#[cfg(test)]
mod tests;
mod train;
mod wav;

use std::fs::{self, File};
use std::io::Write;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use crate::data::{Data, Source};
use crate::report::{Outcome, Row, Summary};
use crate::train::{Method, Run, SUPER_EPOCH, Settings, WARM_UP};

/// Trains a late-fusion network on real data and compares methods to weight its losses.
///
/// The network has an encoder (one hidden layer) and a head per input, and a head on the features of all encoders; its
/// M + 1 losses are cross-entropies. All methods have the same samples, initial weights and batches, seed by seed. None
/// trains on the held-out samples. Accuracy is that of the fused head (of alone:<input>, its own) after the last epoch.
///
/// Without --audio the data are 1,797 handwritten digits (UCI, 8 x 8 pixels from 0 to 16) that are part of this example.
/// Every pixel gets Gaussian noise once (--pixel-noise). A digit has two views: "top", the 32 pixels of rows 0 to 3, and
/// "bottom", the 8 column sums and 4 row sums of rows 4 to 7. The samples are drawn anew for each seed.
///
/// With --audio and --images they are spoken and handwritten digits, paired by label: "audio", 20 log-mel energies in each
/// of 8 parts of a recording, and "image", the 64 pixels with noise. The test speakers and test images are not trained on;
/// held-out samples have the training speakers.
///
/// "estimating s" is spent in steps that observe (the backward passes of all losses and of the held-out one, and the library)
/// and in estimates from losses, "training s" in all of training. Both
/// are of one run, mean over seeds, while other runs use the other threads. "held" counts the solves that had no loss to
/// prefer and held the weights. "OGR" is the overfitting-to-generalisation ratio of the weights in force at the end, and of
/// uniform ones, median over seeds: compare the two in a row, not rows with each other. It is a magnitude and does not
/// distinguish a loss that helps from one that harms; the weights do. "m / its error" is the mean generalisation product of
/// each loss over its standard error, in the order of the weights, median over seeds: between -2 and 2, whether the loss gets
/// a weight is chance. A fused loss without weight leaves the fused head, and thus the accuracy, unchanged.
#[derive(Parser)]
#[command(name = "late_fusion")]
struct Args {
    /// Seeds to run: 16, or 3 with --quick
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// Three seeds only
    #[arg(long)]
    quick: bool,
    /// Folder of {digit}_{speaker}_{index}.wav, 8 kHz mono 16-bit, or the folder that has it as `recordings`
    #[arg(long, value_name = "DIR", requires = "images")]
    audio: Option<PathBuf>,
    /// Handwritten digits: 64 pixels from 0 to 16 and a label per line, separated by commas
    #[arg(long, value_name = "CSV", requires = "audio")]
    images: Option<PathBuf>,
    /// With --audio: how many speakers, the last by name, are for testing only; with 4 of 6, audio overfits to the other
    /// two
    #[arg(long, default_value_t = 4, requires = "audio")]
    test_speakers: usize,
    /// Also runs online-gradient-epoch and -step without taking the overfitting of modalities as uncorrelated
    #[arg(long)]
    correlated: bool,
    #[command(flatten)]
    options: data::Options,
    #[command(flatten)]
    settings: train::Settings,
    /// Runs at a time; by default one per processor. Results do not depend on it
    #[arg(long, value_parser = data::count(1024))]
    threads: Option<usize>,
    /// Folder for accuracy.svg, weights.svg and ogr.svg
    #[arg(long, value_name = "DIR", default_value = "target/late_fusion")]
    out: PathBuf,
    /// Also writes the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    sigpipe::reset(); // the end of `late_fusion | head` is no panic
    match compare(&Args::parse()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(args: &Args) -> Result<Summary> {
    let Args { options, settings, .. } = args;
    let start = Instant::now();
    let source = match (&args.audio, &args.images) {
        (Some(audio), Some(images)) => {
            let recordings = audio::read_recordings(audio)?;
            let context = || format!("cannot read the images {}", images.display());
            let images = data::parse_images(&fs::read(images).with_context(context)?).with_context(context)?;
            Source::pairs(recordings, images, args.test_speakers)?
        }
        _ => Source::bundled()?,
    };
    let seeds = args.seeds.unwrap_or(if args.quick { 3 } else { 16 });
    let threads = args.threads.or(thread::available_parallelism().ok().map(NonZero::get)).unwrap_or(1);
    let mut modalities = source.inputs(options);
    let methods = Method::all(&modalities, args.correlated || options.nuisance.is_some(), settings)?;
    let samples = (0..seeds).map(|seed| source.draw(options, seed).with_context(|| format!("seed {seed}")));
    let samples = samples.collect::<Result<Vec<Data>>>()?;
    let json = open_outputs(args)?;
    let data = source.describe(options);
    println!("data: {data}");
    let (train, held_out) = (options.train, options.held_out);
    let share = 100.0 * held_out as f64 / (train + held_out) as f64;
    println!("per seed: {train} training samples, {held_out} held out ({share:.0} %), {} for testing", options.test);
    println!(
        "{} methods, {seeds} seeds, {} epochs of Adam at {}, batches of {}; super-epochs of {WARM_UP} epochs, then \
         {SUPER_EPOCH}",
        methods.len(),
        settings.epochs,
        settings.learning_rate,
        settings.batch
    );

    let outcomes = run_all(settings, &samples, &methods, threads)?;
    modalities.push("fused".to_owned());
    let plots = plots::draw(&outcomes, &modalities, &args.out);
    let summary = Summary {
        data,
        modalities,
        seeds: (0..seeds).collect(),
        train_batch: settings.train_batch,
        methods: outcomes.iter().map(|outcome| Row::new(outcome, settings.train_batch)).collect(),
    };
    // Before the table, whose reader may have gone; and the table even where a file cannot be written.
    let json = json.map(|(path, file)| write_json(path, file, &summary)).transpose();
    println!("{}", summary.table()?);
    println!("`late_fusion --help` explains the columns");
    for path in plots.with_context(|| format!("cannot draw plots in {}", args.out.display()))? {
        println!("plot: {}", path.display());
    }
    if let Some(path) = json? {
        println!("json: {}", path.display());
    }
    println!("{:.0} s in all on {threads} threads", start.elapsed().as_secs_f64());
    Ok(summary)
}

/// Opens what will be written, without changing it, so that a mistake is told before the work. Returns the file of --json.
fn open_outputs(args: &Args) -> Result<Option<(&Path, File)>> {
    let open = |path: &Path| -> Result<File> {
        let file = File::options().write(true).create(true).truncate(false).open(path);
        file.with_context(|| format!("cannot write {}", path.display()))
    };
    fs::create_dir_all(&args.out).with_context(|| format!("cannot write the folder {}", args.out.display()))?;
    let plots = plots::paths(&args.out);
    plots.iter().try_for_each(|path| open(path).map(drop))?;
    let Some(path) = &args.json else { return Ok(None) };
    let file = open(path)?;
    let same =
        |other: &&PathBuf| other.canonicalize().ok().is_some_and(|other| path.canonicalize().ok() == Some(other));
    if let Some(other) = plots.iter().chain(&args.images).find(same) {
        bail!("--json {} would replace {}", path.display(), other.display());
    }
    Ok(Some((path, file)))
}

fn write_json<'a>(path: &'a Path, mut file: File, summary: &Summary) -> Result<&'a Path> {
    let json = serde_json::to_string_pretty(summary)? + "\n";
    // What is no file, such as a pipe, has no length.
    let cleared = if file.metadata().is_ok_and(|metadata| metadata.is_file()) { file.set_len(0) } else { Ok(()) };
    cleared
        .and_then(|()| file.write_all(json.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Runs each method on the samples of each seed, `threads` runs at a time. Which thread does a run, and when, has no effect
/// on results.
fn run_all<'a>(
    settings: &Settings,
    samples: &[Data],
    methods: &'a [Method],
    threads: usize,
) -> Result<Vec<Outcome<'a>>> {
    let of_seed = |(seed, data)| methods.iter().map(move |method| (seed, data, method));
    let jobs: Vec<(usize, &Data, &Method)> = samples.iter().enumerate().flat_map(of_seed).collect();
    let bar = ProgressBar::new(jobs.len() as u64 * settings.epochs);
    bar.set_style(ProgressStyle::with_template("{msg:40!} {wide_bar} {percent:>3} %  {elapsed} elapsed, {eta} left")?);
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Run)>> {
        let mut done = Vec::new();
        loop {
            let job = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(seed, data, method)) = jobs.get(job) else { return Ok(done) };
            bar.set_message(format!("seed {seed}, {}", method.name));
            let run = train::train(method, data, settings, seed as u64, || bar.inc(1));
            if run.is_err() {
                // No other run has to start.
                next.store(jobs.len(), Ordering::Relaxed);
            }
            done.push((job, run.with_context(|| format!("seed {seed}, {}", method.name))?));
        }
    };
    let done: Result<Vec<_>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(jobs.len())).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    bar.finish_and_clear();
    let mut done: Vec<(usize, Run)> = done?.into_iter().flatten().collect();
    done.sort_by_key(|(job, _)| *job);
    let mut outcomes: Vec<_> = methods.iter().map(|method| Outcome { method, runs: Vec::new() }).collect();
    for (job, run) in done {
        outcomes[job % methods.len()].runs.push(run);
    }
    Ok(outcomes)
}
