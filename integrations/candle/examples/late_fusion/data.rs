//! The samples: the inputs of a digit, and which digits are for training, held out, and for testing.
//!
//! Without `--audio`, the 2,000 handwritten digits of `examples/data/mfeat` in six views (see `views.rs`), with Gaussian
//! noise on each feature.
//!
//! With it, `audio` (160 log-mel energies of a spoken digit) and `image` (64 noisy pixels), paired by label. No speaker
//! and no image is in both training and test samples. Held-out samples have the speakers of the training samples.

use anyhow::{Result, bail, ensure};
use candle_core::{Device, Tensor};
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::audio::Recording;
use crate::common::arguments::{count, number};
use crate::common::random::random;
use crate::common::train::Split;
use crate::images::Image;
use crate::views::Views;

pub(crate) const CLASSES: usize = 10;
/// Features of the noise input.
const NOISE_WIDTH: usize = 32;

const MOST_SAMPLES: u64 = 1_000_000;

fn is_noise(value: f64) -> bool {
    (0.0..=1000.0).contains(&value)
}

/// How samples are drawn.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Training samples, without the held-out ones: 300, or 500 with --audio
    #[arg(long, value_parser = count(MOST_SAMPLES))]
    pub(crate) train: Option<usize>,
    /// Held-out samples: 50, or 100 with --audio (the paper holds out 8 % to 13 % of far larger sets)
    #[arg(long, value_parser = count(MOST_SAMPLES))]
    pub(crate) held_out: Option<usize>,
    /// Test samples
    #[arg(long, default_value = "500", value_parser = count(MOST_SAMPLES))]
    pub(crate) test: usize,
    /// Standard deviation of the noise on each feature of a view over that of the feature. Drawn once per sample, so that it
    /// can be memorised. Without noise most methods come close to an accuracy of 1
    #[arg(long, default_value = "3", value_parser = number(is_noise, "0 to 1000"))]
    pub(crate) noise: f64,
    /// With --audio: standard deviation of the noise on each pixel from 0 to 16
    #[arg(long, default_value = "6", value_parser = number(is_noise, "0 to 1000"))]
    pub(crate) pixel_noise: f64,
}

/// How many samples of each kind.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) train: usize,
    pub(crate) held_out: usize,
    pub(crate) test: usize,
}

/// An input whose loss should get no weight.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
pub(crate) enum Nuisance {
    /// No such input
    None,
    /// 32 Gaussian numbers that are independent of the digit
    Noise,
    /// The digit itself on training samples, a random digit on held-out and test samples (10 numbers)
    Shortcut,
}

impl Nuisance {
    /// The name of the input.
    pub(crate) fn input(self) -> Option<&'static str> {
        match self {
            Nuisance::None => None,
            Nuisance::Noise => Some("noise"),
            Nuisance::Shortcut => Some("shortcut"),
        }
    }

    fn features(self, label: usize, training: bool, rng: &mut ChaCha8Rng) -> Option<Vec<f32>> {
        match self {
            Nuisance::None => None,
            Nuisance::Noise => Some((0..NOISE_WIDTH).map(|_| normal(rng)).collect()),
            Nuisance::Shortcut => {
                let shown = if training { label } else { rng.random_range(0..CLASSES) };
                Some((0..CLASSES).map(|class| f32::from(u8::from(class == shown)) + 0.1 * normal(rng)).collect())
            }
        }
    }
}

/// Those that are inputs.
pub(crate) const NUISANCES: [Nuisance; 2] = [Nuisance::Noise, Nuisance::Shortcut];

/// Where samples are drawn from.
pub(crate) enum Source {
    Views(Views),
    Pairs { recordings: Vec<Recording>, images: Vec<Image>, test_speakers: Vec<String> },
}

/// The features of one sample, per input.
struct Sample {
    features: Vec<Vec<f32>>,
    label: usize,
}

impl Source {
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
    pub(crate) fn inputs(&self) -> Vec<&'static str> {
        match self {
            Source::Views(views) => views.views.iter().map(|view| view.name).collect(),
            Source::Pairs { .. } => vec!["audio", "image"],
        }
    }

    /// Description of the inputs.
    pub(crate) fn describe(&self, options: &Options) -> String {
        match self {
            Source::Views(Views { views, labels }) => {
                let views =
                    views.iter().map(|view| format!("{} ({} {})", view.name, view.deviations.len(), view.about));
                let (digits, noise, views) = (labels.len(), options.noise, views.collect::<Vec<_>>().join(", "));
                format!("{digits} handwritten digits (UCI Multiple Features): {views}; noise of {noise} deviations")
            }
            Source::Pairs { recordings, images, test_speakers } => format!(
                "{} spoken and {} handwritten digits, paired by label; audio: 160 log-mel energies, test speakers {} \
                 unseen; image: 8 x 8 pixels 0..16 plus noise of deviation {}, test images unseen",
                recordings.len(),
                images.len(),
                test_speakers.join(", "),
                options.pixel_noise
            ),
        }
    }

    pub(crate) fn sizes(&self, options: &Options) -> Sizes {
        let (train, held_out) = match self {
            Source::Views(_) => (300, 50),
            Source::Pairs { .. } => (500, 100),
        };
        Sizes {
            train: options.train.unwrap_or(train),
            held_out: options.held_out.unwrap_or(held_out),
            test: options.test,
        }
    }

    /// Draws the samples of a seed. All have the nuisances of `NUISANCES` as further inputs, in that order.
    pub(crate) fn draw(&self, options: &Options, seed: u64) -> Result<Data> {
        let Sizes { train: train_len, held_out, test: test_len } = self.sizes(options);
        let rng = &mut random(seed, "samples");
        let wanted = train_len + held_out;
        let (mut train, mut test) = match self {
            Source::Views(views) => {
                let mut digits: Vec<usize> = (0..views.labels.len()).collect();
                digits.shuffle(rng);
                let test = digits.split_off(wanted.min(digits.len()));
                let mut sample = |digit: &usize| views.sample(*digit, options.noise as f32, rng);
                let train: Vec<Sample> = digits.iter().map(&mut sample).collect();
                (train, test.iter().map(sample).collect())
            }
            Source::Pairs { recordings, images, test_speakers } => {
                let mut images: Vec<&Image> = images.iter().collect();
                images.shuffle(rng);
                let (train_images, test_images) = images.split_at(images.len() / 2);
                let (mut test, mut train): (Vec<&Recording>, Vec<&Recording>) =
                    recordings.iter().partition(|recording| test_speakers.contains(&recording.speaker));
                train.shuffle(rng);
                test.shuffle(rng);
                let noise = options.pixel_noise as f32;
                (pair(&train, train_images, noise, rng), pair(&test, test_images, noise, rng))
            }
        };
        let (have_train, have_test) = (train.len(), test.len());
        ensure!(
            have_train >= wanted && have_test >= test_len,
            "--train and --held-out want {wanted} samples, of which there are {have_train}, and --test wants {test_len}, of \
             which there are then {have_test}"
        );
        train.truncate(wanted);
        test.truncate(test_len);
        let held_out = train.split_off(train_len);
        let mut sets = [train, held_out, test];
        for nuisance in NUISANCES {
            let rng = &mut random(seed, "nuisance");
            for (set, samples) in sets.iter_mut().enumerate() {
                for sample in samples {
                    sample.features.extend(nuisance.features(sample.label, set == 0, rng));
                }
            }
        }
        let widths: Vec<usize> = sets[0][0].features.iter().map(Vec::len).collect();
        for (k, width) in widths.iter().enumerate() {
            (0..*width).for_each(|i| standardise(&mut sets, k, i));
        }
        let [train, held_out, test] = sets;
        Ok(Data { train: Samples::new(&train)?, held_out: Samples::new(&held_out)?, test: Samples::new(&test)? })
    }
}

impl Views {
    /// All views of a digit, with noise.
    fn sample(&self, digit: usize, noise: f32, rng: &mut ChaCha8Rng) -> Sample {
        let mut noisy = |(value, deviation): (&f32, &f32)| value + noise * deviation * normal(rng);
        let features =
            self.views.iter().map(|view| view.rows[digit].iter().zip(&view.deviations).map(&mut noisy).collect());
        Sample { features: features.collect(), label: self.labels[digit] }
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
        // A feature that is the same in all training samples has no information.
        *value = if deviation > 1e-6 { ((f64::from(*value) - mean) / deviation) as f32 } else { 0.0 };
    }
}

/// A set or a batch of samples.
#[derive(Clone)]
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

    /// The samples with these indices.
    pub(crate) fn at(&self, indices: &[u32]) -> Result<Self> {
        let indices = Tensor::new(indices, &Device::Cpu)?;
        let inputs = self.inputs.iter().map(|input| Ok(input.index_select(&indices, 0)?)).collect::<Result<_>>()?;
        Ok(Samples { inputs, labels: self.labels.index_select(&indices, 0)? })
    }

    /// The same samples with these inputs only.
    fn with(&self, inputs: &[usize]) -> Self {
        let inputs = inputs.iter().map(|k| self.inputs[*k].clone()).collect();
        Samples { inputs, labels: self.labels.clone() }
    }
}

/// The samples of one seed.
pub(crate) type Data = Split<Samples>;

impl Data {
    /// The same samples with these inputs only.
    pub(crate) fn with(&self, inputs: &[usize]) -> Self {
        let [train, held_out, test] = [&self.train, &self.held_out, &self.test].map(|samples| samples.with(inputs));
        Data { train, held_out, test }
    }

    /// The number of features of each input.
    pub(crate) fn widths(&self) -> Result<Vec<usize>> {
        self.train.inputs.iter().map(|input| Ok(input.dim(1)?)).collect()
    }
}

/// The positions of `wanted` modalities among `known` ones, in the order of the latter; all without a wish.
pub(crate) fn choose(wanted: &[String], known: &[&str]) -> Result<Vec<usize>> {
    for (i, name) in wanted.iter().enumerate() {
        if !known.contains(&&name[..]) {
            bail!("--modalities {name}: expected some of {}", known.join(","));
        }
        ensure!(!wanted[..i].contains(name), "--modalities {name}: given twice");
    }
    let all = 0..known.len();
    Ok(all.filter(|k| wanted.is_empty() || wanted.iter().any(|name| name == known[*k])).collect())
}

/// A Gaussian number of mean 0 and variance 1 (Box and Muller).
pub(crate) fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let (radius, angle) = (1.0 - rng.random::<f32>(), std::f32::consts::TAU * rng.random::<f32>());
    (-2.0 * radius.ln()).sqrt() * angle.cos()
}
