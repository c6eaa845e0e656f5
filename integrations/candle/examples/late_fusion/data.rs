//! The samples: what each modality of a digit is, and which digits are trained on, held out, and tested on.
//!
//! Without files, the 1,797 handwritten digits that the crate smartcore brings along (UCI "Optical Recognition of
//! Handwritten Digits", 8 x 8 pixels from 0 to 16). Gaussian noise is added to every pixel once, and the noisy image is
//! seen in two views:
//!
//! - `top`: the 32 pixels of rows 0 to 3. Rich, and easy to learn by heart.
//! - `bottom`: of rows 4 to 7, the 8 sums of the columns and the 4 sums of the rows. Poor, but summing averages the
//!   noise out, so there is less to learn by heart.
//!
//! With files, `audio` (160 log-mel energies of a spoken digit) and `image` (64 noisy pixels), paired by label. No
//! speaker and no image is in both training and test. Held-out samples have the speakers of the training samples.

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use rand::Rng;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::audio::Recording;

/// Digits.
pub(crate) const CLASSES: usize = 10;
/// Of an image, 8 rows of 8.
pub(crate) const PIXELS: usize = 64;
/// Features of the noise modality.
const NOISE_WIDTH: usize = 32;

/// A handwritten digit.
pub(crate) struct Image {
    pixels: [f32; PIXELS],
    label: usize,
}

impl Image {
    pub(crate) fn new(values: impl Iterator<Item = f32>, label: usize) -> Result<Self> {
        let pixels = values.collect::<Vec<_>>().try_into().ok().context("an image has 64 pixels")?;
        ensure!(label < CLASSES, "label {label} is no digit");
        Ok(Image { pixels, label })
    }

    fn noisy(&self, noise: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
        self.pixels.iter().map(|pixel| pixel + noise * normal(rng)).collect()
    }
}

/// A modality that ought to get no weight.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Nuisance {
    /// 32 Gaussian numbers that know nothing of the digit
    Noise,
    /// The digit itself on training samples, a random digit on held-out and test samples (10 numbers)
    Shortcut,
}

/// How samples are drawn.
pub(crate) struct Options {
    pub(crate) train: usize,
    pub(crate) held_out: usize,
    pub(crate) test: usize,
    /// Standard deviation, in units of a pixel that goes from 0 to 16.
    pub(crate) pixel_noise: f32,
    pub(crate) nuisance: Option<Nuisance>,
}

/// Where samples are drawn from.
pub(crate) enum Source {
    Views { images: Vec<Image> },
    Pairs { recordings: Vec<Recording>, images: Vec<Image>, test_speakers: Vec<String> },
}

struct Sample {
    features: Vec<Vec<f32>>,
    label: usize,
}

impl Source {
    /// The digits that smartcore brings along.
    pub(crate) fn bundled() -> Result<Self> {
        let digits = smartcore::dataset::digits::load_dataset();
        ensure!(digits.num_features == PIXELS, "smartcore's digits have {} features, not 64", digits.num_features);
        let pairs = digits.data.chunks_exact(PIXELS).zip(&digits.target);
        let image = |(pixels, label): (&[f32], &f32)| Image::new(pixels.iter().copied(), *label as usize);
        Ok(Source::Views { images: pairs.map(image).collect::<Result<_>>()? })
    }

    /// Recordings and images; the last `test_speakers` in order of name are tested on.
    pub(crate) fn pairs(recordings: Vec<Recording>, images: Vec<Image>, test_speakers: usize) -> Result<Self> {
        let mut speakers: Vec<String> = recordings.iter().map(|recording| recording.speaker.clone()).collect();
        speakers.sort();
        speakers.dedup();
        ensure!(
            (1..speakers.len()).contains(&test_speakers),
            "cannot test on {test_speakers} of {} speakers: at least one is tested on and one trained on",
            speakers.len()
        );
        let test_speakers = speakers.split_off(speakers.len() - test_speakers);
        Ok(Source::Pairs { recordings, images, test_speakers })
    }

    pub(crate) fn modalities(&self, nuisance: Option<Nuisance>) -> Vec<String> {
        let mut names = match self {
            Source::Views { .. } => vec!["top", "bottom"],
            Source::Pairs { .. } => vec!["audio", "image"],
        };
        names.extend(nuisance.map(|nuisance| match nuisance {
            Nuisance::Noise => "noise",
            Nuisance::Shortcut => "shortcut",
        }));
        names.into_iter().map(str::to_owned).collect()
    }

    /// What the modalities are, in words.
    pub(crate) fn describe(&self, options: &Options) -> String {
        let noise = options.pixel_noise;
        let mut text = match self {
            Source::Views { images } => format!(
                "{} handwritten digits (UCI, from smartcore), 8 x 8 pixels 0..16 plus noise of deviation {noise}; \
                 top: 32 pixels of rows 0-3; bottom: 8 column and 4 row sums of rows 4-7",
                images.len()
            ),
            Source::Pairs { recordings, images, test_speakers } => format!(
                "{} spoken and {} handwritten digits, paired by label; audio: 160 log-mel energies, test speakers {} \
                 unseen; image: 64 pixels 0..16 plus noise of deviation {noise}, test images unseen",
                recordings.len(),
                images.len(),
                test_speakers.join(", ")
            ),
        };
        text.push_str(match options.nuisance {
            None => "",
            Some(Nuisance::Noise) => "; noise: 32 Gaussian numbers",
            Some(Nuisance::Shortcut) => "; shortcut: the digit on training samples, a random one on all others",
        });
        text
    }

    /// Draws the samples of a seed: training samples, held-out samples and test samples, disjoint.
    pub(crate) fn draw(&self, options: &Options, seed: u64) -> Result<Data> {
        let rng = &mut random(seed, "samples");
        let noise = options.pixel_noise;
        let (mut train, mut test) = match self {
            Source::Views { images } => {
                let mut images: Vec<&Image> = images.iter().collect();
                images.shuffle(rng);
                let taken = options.train + options.held_out;
                let (train, test) = images.split_at(taken.min(images.len()));
                let views = |image: &&Image| {
                    let pixels = image.noisy(noise, rng);
                    let (top, bottom) = pixels.split_at(PIXELS / 2);
                    let columns = (0..8).map(|column| bottom.iter().skip(column).step_by(8).sum());
                    let rows = bottom.chunks(8).map(|row| row.iter().sum());
                    Sample { features: vec![top.to_vec(), columns.chain(rows).collect()], label: image.label }
                };
                let samples: Vec<Sample> = train.iter().chain(test).map(views).collect();
                let mut train = samples;
                let test = train.split_off(taken.min(train.len()));
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
        let train_wanted = options.train + options.held_out;
        ensure!(
            train.len() >= train_wanted && test.len() >= options.test,
            "there are {} samples to train on and hold out and {} to test on, not {train_wanted} and {}",
            train.len(),
            test.len(),
            options.test
        );
        train.truncate(train_wanted);
        test.truncate(options.test);
        let mut held_out = train.split_off(options.train);
        if let Some(nuisance) = options.nuisance {
            let sets = [(&mut train, true), (&mut held_out, false), (&mut test, false)];
            for (samples, trained_on) in sets {
                for sample in samples {
                    let feature = nuisance.feature(sample.label, trained_on, rng);
                    sample.features.push(feature);
                }
            }
        }
        let modalities = self.modalities(options.nuisance).len();
        for k in 0..modalities {
            standardise(k, [&mut train, &mut held_out, &mut test]);
        }
        Ok(Data {
            widths: (0..modalities).map(|k| train[0].features[k].len()).collect(),
            train: Split::new(&train)?,
            held_out: Split::new(&held_out)?,
            test: Split::new(&test)?,
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

impl Nuisance {
    fn feature(self, label: usize, trained_on: bool, rng: &mut ChaCha8Rng) -> Vec<f32> {
        match self {
            Nuisance::Noise => (0..NOISE_WIDTH).map(|_| normal(rng)).collect(),
            Nuisance::Shortcut => {
                let told = if trained_on { label } else { rng.random_range(0..CLASSES) };
                (0..CLASSES).map(|class| f32::from(u8::from(class == told)) + 0.1 * normal(rng)).collect()
            }
        }
    }
}

/// Shifts and scales each feature of modality `k` to mean 0 and variance 1 on the first set, the training samples.
fn standardise(k: usize, mut sets: [&mut Vec<Sample>; 3]) {
    let width = sets[0].first().map_or(0, |sample| sample.features[k].len());
    for i in 0..width {
        let values = || sets[0].iter().map(|sample| f64::from(sample.features[k][i]));
        let len = sets[0].len() as f64;
        let mean = values().sum::<f64>() / len;
        let deviation = (values().map(|value| (value - mean).powi(2)).sum::<f64>() / len).sqrt();
        for sample in sets.iter_mut().flat_map(|set| set.iter_mut()) {
            let value = &mut sample.features[k][i];
            // A pixel that is the same in all training samples tells nothing.
            *value = if deviation > 1e-6 { ((f64::from(*value) - mean) / deviation) as f32 } else { 0.0 };
        }
    }
}

/// Some samples, one tensor of inputs for each modality.
pub(crate) struct Batch {
    pub(crate) inputs: Vec<Tensor>,
    pub(crate) labels: Tensor,
}

/// All samples of one kind.
pub(crate) struct Split {
    pub(crate) all: Batch,
    pub(crate) len: usize,
}

impl Split {
    fn new(samples: &[Sample]) -> Result<Self> {
        let (len, modalities) = (samples.len(), samples.first().map_or(0, |sample| sample.features.len()));
        let input = |k: usize| {
            let values: Vec<f32> = samples.iter().flat_map(|sample| sample.features[k].iter().copied()).collect();
            let width = values.len() / len;
            Ok(Tensor::from_vec(values, (len, width), &Device::Cpu)?)
        };
        let inputs = (0..modalities).map(input).collect::<Result<_>>()?;
        let labels: Vec<u32> = samples.iter().map(|sample| sample.label as u32).collect();
        Ok(Split { all: Batch { inputs, labels: Tensor::from_vec(labels, len, &Device::Cpu)? }, len })
    }
}

/// The samples of one seed.
pub(crate) struct Data {
    /// Features of each modality.
    pub(crate) widths: Vec<usize>,
    pub(crate) train: Split,
    pub(crate) held_out: Split,
    pub(crate) test: Split,
}

/// Goes through samples in random order, again and again. A clone goes on as the original would have.
#[derive(Clone)]
pub(crate) struct Batches {
    rng: ChaCha8Rng,
    order: Vec<u32>,
    at: usize,
    size: usize,
}

impl Batches {
    pub(crate) fn new(len: usize, size: usize, rng: ChaCha8Rng) -> Self {
        Batches { rng, order: (0..len as u32).collect(), at: len, size: size.min(len) }
    }

    /// How many batches go once through the samples.
    pub(crate) fn an_epoch(&self) -> usize {
        self.order.len().div_ceil(self.size)
    }

    pub(crate) fn next(&mut self, split: &Split) -> Result<Batch> {
        if self.at >= self.order.len() {
            self.order.shuffle(&mut self.rng);
            self.at = 0;
        }
        let end = (self.at + self.size).min(self.order.len());
        let indices = Tensor::new(&self.order[self.at..end], &Device::Cpu)?;
        self.at = end;
        let inputs =
            split.all.inputs.iter().map(|input| Ok(input.index_select(&indices, 0)?)).collect::<Result<_>>()?;
        Ok(Batch { inputs, labels: split.all.labels.index_select(&indices, 0)? })
    }
}

/// Random numbers of their own for each seed and purpose, so that all methods see the same samples, the same first
/// weights and the same batches: they can be compared seed by seed.
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
