//! The samples: the inputs of a digit, and which digits are for training, held out, and for testing.
//!
//! Without files, the 1,797 handwritten digits of `examples/data` (8 x 8 pixels from 0 to 16). Gaussian noise is added to
//! every pixel once, and the noisy image has two views:
//!
//! - `top`: the 32 pixels of rows 0 to 3. Rich, and easy to memorise.
//! - `bottom`: the 8 column sums and 4 row sums of rows 4 to 7. Poor, but a sum averages the noise, so there is less to
//!   memorise.
//!
//! With files, `audio` (160 log-mel energies of a spoken digit) and `image` (64 noisy pixels), paired by label. No speaker
//! and no image is in both training and test samples. Held-out samples have the speakers of the training samples.

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use clap::builder::RangedU64ValueParser;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::audio::Recording;

pub(crate) const CLASSES: usize = 10;
/// Pixels of an image, 8 rows of 8.
const PIXELS: usize = 64;
/// Features of the noise input.
const NOISE_WIDTH: usize = 32;

const MOST_SAMPLES: u64 = 1_000_000;

/// Parses a count from 1 to `most`.
pub(crate) fn count(most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=most)
}

/// Parses a number that `is_right`.
pub(crate) fn number(
    is_right: fn(f64) -> bool,
    expected: &'static str,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync {
    move |text| text.parse().ok().filter(|value| is_right(*value)).ok_or_else(|| format!("expected {expected}"))
}

/// How samples are drawn.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Training samples, without the held-out ones
    #[arg(long, default_value = "500", value_parser = count(MOST_SAMPLES))]
    pub(crate) train: usize,
    /// Held-out samples: 100 are a sixth of 600 (the paper holds out 8 % to 13 % of far larger sets)
    #[arg(long, default_value = "100", value_parser = count(MOST_SAMPLES))]
    pub(crate) held_out: usize,
    /// Test samples
    #[arg(long, default_value = "500", value_parser = count(MOST_SAMPLES))]
    pub(crate) test: usize,
    /// Standard deviation of the noise on each pixel, drawn once per sample, so that it can be memorised. Without noise
    /// most methods come close to an accuracy of 1
    #[arg(long, default_value = "6", value_parser = number(|noise| (0.0..=1000.0).contains(&noise), "0 to 1000"))]
    pub(crate) pixel_noise: f64,
    /// Adds an input whose loss should get no weight; turns on --correlated
    #[arg(long)]
    pub(crate) nuisance: Option<Nuisance>,
}

/// An input whose loss should get no weight.
#[derive(Clone, Copy, clap::ValueEnum)]
pub(crate) enum Nuisance {
    /// 32 Gaussian numbers that are independent of the digit
    Noise,
    /// The digit itself on training samples, a random digit on held-out and test samples (10 numbers)
    Shortcut,
}

impl Nuisance {
    fn features(self, label: usize, training: bool, rng: &mut ChaCha8Rng) -> Vec<f32> {
        match self {
            Nuisance::Noise => (0..NOISE_WIDTH).map(|_| normal(rng)).collect(),
            Nuisance::Shortcut => {
                let shown = if training { label } else { rng.random_range(0..CLASSES) };
                (0..CLASSES).map(|class| f32::from(u8::from(class == shown)) + 0.1 * normal(rng)).collect()
            }
        }
    }
}

/// A handwritten digit.
pub(crate) struct Image {
    pub(crate) pixels: Vec<f32>,
    pub(crate) label: usize,
}

impl Image {
    fn noisy(&self, noise: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
        self.pixels.iter().map(|pixel| pixel + noise * normal(rng)).collect()
    }
}

/// Parses one image per line: 64 pixels from 0 to 16, row by row, and the label. As table programs write it: numbers may be
/// quoted or have decimals, a separator may end the line, and the first line may be a heading.
pub(crate) fn parse_images(bytes: &[u8]) -> Result<Vec<Image>> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let line = bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
        anyhow!("line {line}: expected UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut images = Vec::new();
    let mut first = true;
    for (number, line) in (1..).zip(text.lines()) {
        let context = || format!("line {number}");
        let mut fields = fields(line).with_context(context)?;
        if fields.iter().all(|field| field.is_empty()) {
            continue;
        }
        if fields.len() == PIXELS + 2 && fields[PIXELS + 1].is_empty() {
            fields.pop();
        }
        let len = fields.len();
        ensure!(len == PIXELS + 1, "line {number}: expected {} fields (64 pixels and a label), got {len}", PIXELS + 1);
        if !first || !is_heading(&fields) {
            images.push(parse_image(&fields).with_context(context)?);
        }
        first = false;
    }
    ensure!(!images.is_empty(), "there is no image");
    Ok(images)
}

/// The fields of a line. One in quotes may have commas.
fn fields(line: &str) -> Result<Vec<&str>> {
    let (mut fields, mut rest) = (Vec::new(), line);
    loop {
        let next;
        if let Some(quoted) = rest.trim_start().strip_prefix('"') {
            let (field, after) = quoted.split_once('"').context("a quote has no end")?;
            fields.push(field.trim());
            let after = after.trim();
            next = after.strip_prefix(',');
            ensure!(next.is_some() || after.is_empty(), "expected a comma after a quote, got {after:?}");
        } else {
            let (field, after) = rest.split_once(',').map_or((rest, None), |(field, after)| (field, Some(after)));
            fields.push(field.trim());
            next = after;
        }
        let Some(after) = next else { return Ok(fields) };
        rest = after;
    }
}

/// Whether no pixel is a number, or pixels have the numbers of their columns, as tables without names do.
fn is_heading(fields: &[&str]) -> bool {
    let pixels = || fields[..PIXELS].iter().enumerate();
    let counts = |from: usize| pixels().all(|(i, field)| field.parse() == Ok(i + from));
    pixels().all(|(_, field)| !field.is_empty() && field.parse::<f64>().is_err()) || counts(0) || counts(1)
}

fn parse_image(fields: &[&str]) -> Result<Image> {
    let number = |i: usize, is_right: fn(&f64) -> bool, expected: &str| {
        let value = fields[i].parse().ok().filter(is_right);
        value.with_context(|| format!("field {} is {:?}, expected {expected}", i + 1, fields[i]))
    };
    let pixel = |i| Ok(number(i, |value| (0.0..=16.0).contains(value), "0 to 16")? as f32);
    let is_digit = |value: &f64| value.fract() == 0.0 && (0.0..CLASSES as f64).contains(value);
    let pixels = (0..PIXELS).map(pixel).collect::<Result<_>>()?;
    Ok(Image { pixels, label: number(PIXELS, is_digit, "a digit from 0 to 9")? as usize })
}

/// Where samples are drawn from.
pub(crate) enum Source {
    Views { images: Vec<Image> },
    Pairs { recordings: Vec<Recording>, images: Vec<Image>, test_speakers: Vec<String> },
}

/// The features of one sample, per input.
struct Sample {
    features: Vec<Vec<f32>>,
    label: usize,
}

impl Source {
    /// The digits of `examples/data`.
    pub(crate) fn bundled() -> Result<Self> {
        Ok(Source::Views { images: parse_images(include_bytes!("../data/digits.csv"))? })
    }

    /// Recordings and images. The last `test_speakers` in order of name are for testing.
    pub(crate) fn pairs(recordings: Vec<Recording>, images: Vec<Image>, test_speakers: usize) -> Result<Self> {
        let mut speakers: Vec<String> = recordings.iter().map(|recording| recording.speaker.clone()).collect();
        speakers.sort();
        speakers.dedup();
        ensure!(
            (1..speakers.len()).contains(&test_speakers),
            "--test-speakers {test_speakers}: there are {} speakers, of which training and testing need at least one each",
            speakers.len()
        );
        let test_speakers = speakers.split_off(speakers.len() - test_speakers);
        Ok(Source::Pairs { recordings, images, test_speakers })
    }

    /// Names of the inputs.
    pub(crate) fn inputs(&self, options: &Options) -> Vec<String> {
        let mut names = match self {
            Source::Views { .. } => vec!["top", "bottom"],
            Source::Pairs { .. } => vec!["audio", "image"],
        };
        names.extend(options.nuisance.map(|nuisance| match nuisance {
            Nuisance::Noise => "noise",
            Nuisance::Shortcut => "shortcut",
        }));
        names.into_iter().map(str::to_owned).collect()
    }

    /// Description of the inputs.
    pub(crate) fn describe(&self, options: &Options) -> String {
        let pixels = format!("8 x 8 pixels 0..16 plus noise of deviation {}", options.pixel_noise);
        let text = match self {
            Source::Views { images } => format!(
                "{} handwritten digits (UCI), {pixels}; top: pixels of rows 0-3; bottom: column and row sums of rows 4-7",
                images.len()
            ),
            Source::Pairs { recordings, images, test_speakers } => format!(
                "{} spoken and {} handwritten digits, paired by label; audio: 160 log-mel energies, test speakers {} \
                 unseen; image: {pixels}, test images unseen",
                recordings.len(),
                images.len(),
                test_speakers.join(", ")
            ),
        };
        text + match options.nuisance {
            None => "",
            Some(Nuisance::Noise) => "; noise: 32 Gaussian numbers",
            Some(Nuisance::Shortcut) => "; shortcut: the digit on training samples, a random one on all others",
        }
    }

    /// Draws the training, held-out and test samples of a seed. They are disjoint.
    pub(crate) fn draw(&self, options: &Options, seed: u64) -> Result<Data> {
        let rng = &mut random(seed, "samples");
        let (noise, train_wanted) = (options.pixel_noise as f32, options.train + options.held_out);
        let (mut train, mut test) = match self {
            Source::Views { images } => {
                let mut images: Vec<&Image> = images.iter().collect();
                images.shuffle(rng);
                let views = |image: &Image| {
                    let pixels = image.noisy(noise, rng);
                    let (top, bottom) = pixels.split_at(PIXELS / 2);
                    let columns = (0..8).map(|column| bottom.iter().skip(column).step_by(8).sum());
                    let rows = bottom.chunks(8).map(|row| row.iter().sum());
                    Sample { features: vec![top.to_vec(), columns.chain(rows).collect()], label: image.label }
                };
                let mut train: Vec<Sample> = images.into_iter().map(views).collect();
                let test = train.split_off(train_wanted.min(train.len()));
                (train, test)
            }
            Source::Pairs { recordings, images, test_speakers } => {
                let mut images: Vec<&Image> = images.iter().collect();
                images.shuffle(rng);
                let (train_images, test_images) = images.split_at(images.len() / 2);
                let (mut test, mut train): (Vec<&Recording>, Vec<&Recording>) =
                    recordings.iter().partition(|recording| test_speakers.contains(&recording.speaker));
                train.shuffle(rng);
                test.shuffle(rng);
                (pair(&train, train_images, noise, rng), pair(&test, test_images, noise, rng))
            }
        };
        let (train_len, test_len) = (train.len(), test.len());
        ensure!(
            train_len >= train_wanted && test_len >= options.test,
            "--train and --held-out want {train_wanted} samples, of which there are {train_len}, and --test wants {}, of \
             which there are then {test_len}",
            options.test
        );
        train.truncate(train_wanted);
        test.truncate(options.test);
        let held_out = train.split_off(options.train);
        let mut sets = [train, held_out, test];
        if let Some(nuisance) = options.nuisance {
            for (set, samples) in sets.iter_mut().enumerate() {
                for sample in samples {
                    sample.features.push(nuisance.features(sample.label, set == 0, rng));
                }
            }
        }
        let widths: Vec<usize> = sets[0][0].features.iter().map(Vec::len).collect();
        for (k, width) in widths.iter().enumerate() {
            (0..*width).for_each(|i| standardise(&mut sets, k, i));
        }
        let [train, held_out, test] = sets;
        Ok(Data {
            train: Samples::new(&train)?,
            held_out: Samples::new(&held_out)?,
            test: Samples::new(&test)?,
            widths,
        })
    }
}

/// Gives each recording, in order, the next image of its label, as long as there are any.
fn pair(recordings: &[&Recording], images: &[&Image], noise: f32, rng: &mut ChaCha8Rng) -> Vec<Sample> {
    let mut of_label: Vec<Vec<&Image>> = vec![Vec::new(); CLASSES];
    images.iter().for_each(|image| of_label[image.label].push(image));
    let sample = |recording: &&Recording| {
        let image = of_label[recording.digit].pop()?;
        let features = vec![recording.features.clone(), image.noisy(noise, rng)];
        Some(Sample { features, label: recording.digit })
    };
    recordings.iter().filter_map(sample).collect()
}

/// Shifts and scales feature `i` of input `k` to mean 0 and variance 1 on the first set, the training samples.
fn standardise(sets: &mut [Vec<Sample>; 3], k: usize, i: usize) {
    let values = || sets[0].iter().map(|sample| f64::from(sample.features[k][i]));
    let len = sets[0].len() as f64;
    let mean = values().sum::<f64>() / len;
    let deviation = (values().map(|value| (value - mean).powi(2)).sum::<f64>() / len).sqrt();
    for sample in sets.iter_mut().flatten() {
        let value = &mut sample.features[k][i];
        // A pixel that is the same in all training samples has no information.
        *value = if deviation > 1e-6 { ((f64::from(*value) - mean) / deviation) as f32 } else { 0.0 };
    }
}

/// A set or a batch of samples.
pub(crate) struct Samples {
    /// One tensor per input.
    pub(crate) inputs: Vec<Tensor>,
    pub(crate) labels: Tensor,
}

impl Samples {
    fn new(samples: &[Sample]) -> Result<Self> {
        let input = |k: usize| {
            let values: Vec<f32> = samples.iter().flat_map(|sample| sample.features[k].iter().copied()).collect();
            let shape = (samples.len(), values.len() / samples.len());
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        };
        let inputs = (0..samples[0].features.len()).map(input).collect::<Result<_>>()?;
        let labels: Vec<u32> = samples.iter().map(|sample| sample.label as u32).collect();
        Ok(Samples { inputs, labels: Tensor::new(labels, &Device::Cpu)? })
    }

    pub(crate) fn len(&self) -> usize {
        self.labels.elem_count()
    }
}

/// The samples of one seed.
pub(crate) struct Data {
    /// Number of features per input.
    pub(crate) widths: Vec<usize>,
    pub(crate) train: Samples,
    pub(crate) held_out: Samples,
    pub(crate) test: Samples,
}

/// Batches of a set in random order, epoch after epoch. A clone continues as the original does.
#[derive(Clone)]
pub(crate) struct Batches {
    rng: ChaCha8Rng,
    order: Vec<u32>,
    at: usize,
    size: usize,
}

impl Batches {
    pub(crate) fn new(samples: &Samples, size: usize, rng: ChaCha8Rng) -> Self {
        let len = samples.len();
        Batches { rng, order: (0..len as u32).collect(), at: len, size: size.min(len) }
    }

    pub(crate) fn per_epoch(&self) -> usize {
        self.order.len().div_ceil(self.size)
    }

    /// The next batch of `samples`, the set that these batches were made for.
    pub(crate) fn next(&mut self, samples: &Samples) -> Result<Samples> {
        if self.at >= self.order.len() {
            self.order.shuffle(&mut self.rng);
            self.at = 0;
        }
        let end = (self.at + self.size).min(self.order.len());
        let indices = Tensor::new(&self.order[self.at..end], &Device::Cpu)?;
        self.at = end;
        let inputs = samples.inputs.iter().map(|input| Ok(input.index_select(&indices, 0)?)).collect::<Result<_>>()?;
        Ok(Samples { inputs, labels: samples.labels.index_select(&indices, 0)? })
    }
}

/// Random numbers of a seed for one purpose. All methods get the same samples, initial weights and batches, so that they
/// can be compared seed by seed.
pub(crate) fn random(seed: u64, purpose: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(purpose.bytes().fold(0, |stream, byte| stream << 8 | u64::from(byte)));
    rng
}

/// A Gaussian number of mean 0 and variance 1 (Box and Muller).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (radius, angle) = (1.0 - rng.random::<f32>(), std::f32::consts::TAU * rng.random::<f32>());
    (-2.0 * radius.ln()).sqrt() * angle.cos()
}
