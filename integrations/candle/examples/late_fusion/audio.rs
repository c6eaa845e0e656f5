//! Real audio and images from files: spoken digits as WAV, handwritten digits as CSV.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use realfft::RealFftPlanner;

use crate::data::{CLASSES, Image, PIXELS};

const SAMPLE_RATE: u32 = 8_000;
/// 32 ms, a power of two.
const FRAME: usize = 256;
/// 10 ms.
const HOP: usize = 80;
const MEL_BANDS: usize = 20;
/// Recordings differ in length, so each is cut into this many parts of equal length, whose frames are averaged.
const PARTS: usize = 8;

/// A spoken digit.
pub(crate) struct Recording {
    pub(crate) digit: usize,
    pub(crate) speaker: String,
    /// `PARTS` x `MEL_BANDS` log energies, less their mean: how loud a recording is says nothing about its digit.
    pub(crate) features: Vec<f32>,
}

/// Reads all `{digit}_{speaker}_{index}.wav` of a folder, or of the folder `recordings` in it, in order of name.
pub(crate) fn read_recordings(folder: &Path) -> Result<Vec<Recording>> {
    let inner = folder.join("recordings");
    let folder = if inner.is_dir() { inner } else { folder.to_owned() };
    let entries =
        fs::read_dir(&folder).with_context(|| format!("cannot read the audio folder {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("wav")));
    paths.sort();
    ensure!(!paths.is_empty(), "no WAV file in {} (or in its folder `recordings`)", folder.display());
    let mut mel = LogMel::new();
    let read = |path: &PathBuf| read_recording(path, &mut mel).with_context(|| format!("in {}", path.display()));
    paths.iter().map(read).collect()
}

fn read_recording(path: &Path, mel: &mut LogMel) -> Result<Recording> {
    let name = path.file_stem().and_then(|stem| stem.to_str()).context("the name is not UTF-8")?;
    // The speaker is what stands between the first and the last underscore.
    let parts = name.split_once('_').and_then(|(digit, rest)| Some((digit, rest.rsplit_once('_')?)));
    let Some((digit, (speaker, index))) = parts else {
        bail!("the name is not {{digit}}_{{speaker}}_{{index}}.wav");
    };
    let digit = digit.parse::<usize>().ok().filter(|digit| *digit < CLASSES);
    let digit = digit.context("the name does not start with a digit from 0 to 9")?;
    ensure!(index.parse::<u32>().is_ok(), "the name does not end with an index, but with {index:?}");
    ensure!(!speaker.is_empty(), "the name has no speaker");
    let mut reader = hound::WavReader::open(path)?;
    let spec = reader.spec();
    ensure!(
        spec.channels == 1
            && spec.sample_rate == SAMPLE_RATE
            && spec.bits_per_sample == 16
            && spec.sample_format == hound::SampleFormat::Int,
        "expected mono, {SAMPLE_RATE} Hz, 16-bit integers; got {} channels, {} Hz, {}-bit {:?}",
        spec.channels,
        spec.sample_rate,
        spec.bits_per_sample,
        spec.sample_format
    );
    let samples = reader.samples::<i16>().map(|s| Ok(f32::from(s?) / 32_768.0)).collect::<Result<Vec<_>>>()?;
    ensure!(!samples.is_empty(), "the recording is empty");
    Ok(Recording { digit, speaker: speaker.to_owned(), features: mel.features(samples)? })
}

/// Log energies in bands of equal width in mel, from 0 Hz to half the sample rate.
struct LogMel {
    fft: std::sync::Arc<dyn realfft::RealToComplex<f32>>,
    window: Vec<f32>,
    /// Triangular weights of the FFT's bins, one row for each band.
    bands: Vec<Vec<f32>>,
}

impl LogMel {
    fn new() -> Self {
        let to_mel = |hertz: f32| 2595.0 * (1.0 + hertz / 700.0).log10();
        let to_hertz = |mel: f32| 700.0 * (10_f32.powf(mel / 2595.0) - 1.0);
        let top = to_mel(SAMPLE_RATE as f32 / 2.0);
        let edge = |i: usize| to_hertz(top * i as f32 / (MEL_BANDS + 1) as f32);
        let band = |b: usize| {
            let (low, middle, high) = (edge(b), edge(b + 1), edge(b + 2));
            let weight = |bin: usize| {
                let hertz = bin as f32 * SAMPLE_RATE as f32 / FRAME as f32;
                ((hertz - low) / (middle - low)).min((high - hertz) / (high - middle)).max(0.0)
            };
            (0..=FRAME / 2).map(weight).collect()
        };
        // Hann.
        let window = |i: usize| (std::f32::consts::PI * i as f32 / FRAME as f32).sin().powi(2);
        LogMel {
            fft: RealFftPlanner::new().plan_fft_forward(FRAME),
            window: (0..FRAME).map(window).collect(),
            bands: (0..MEL_BANDS).map(band).collect(),
        }
    }

    fn features(&mut self, mut samples: Vec<f32>) -> Result<Vec<f32>> {
        // At least one frame for each part.
        samples.resize(samples.len().max(FRAME + (PARTS - 1) * HOP), 0.0);
        let (mut frame, mut spectrum) = (self.fft.make_input_vec(), self.fft.make_output_vec());
        let mut frames = Vec::new();
        for samples in samples.windows(FRAME).step_by(HOP) {
            for ((slot, sample), weight) in frame.iter_mut().zip(samples).zip(&self.window) {
                *slot = sample * weight;
            }
            self.fft.process(&mut frame, &mut spectrum)?;
            let energy = |band: &Vec<f32>| {
                let sum: f32 = band.iter().zip(&spectrum).map(|(weight, bin)| weight * bin.norm_sqr()).sum();
                // Below that is the noise of 16 bits.
                (sum + 1e-6).ln()
            };
            frames.push(self.bands.iter().map(energy).collect::<Vec<f32>>());
        }
        let mut features = Vec::with_capacity(PARTS * MEL_BANDS);
        for part in 0..PARTS {
            let frames = &frames[part * frames.len() / PARTS..(part + 1) * frames.len() / PARTS];
            for band in 0..MEL_BANDS {
                features.push(frames.iter().map(|frame| frame[band]).sum::<f32>() / frames.len() as f32);
            }
        }
        let mean = features.iter().sum::<f32>() / features.len() as f32;
        features.iter_mut().for_each(|feature| *feature -= mean);
        Ok(features)
    }
}

/// Reads images of 8 x 8 pixels from 0 to 16, row-major, and a label, 65 integers a line.
pub(crate) fn read_images(path: &Path) -> Result<Vec<Image>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the images {}", path.display()))?;
    let mut images = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        images.push(read_image(line).with_context(|| format!("{}, line {}", path.display(), number + 1))?);
    }
    ensure!(!images.is_empty(), "{} holds no image", path.display());
    Ok(images)
}

fn read_image(line: &str) -> Result<Image> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    ensure!(fields.len() == PIXELS + 1, "expected {PIXELS} pixels and a label, got {} fields", fields.len());
    let mut values = Vec::with_capacity(fields.len());
    for (i, field) in fields.iter().enumerate() {
        let limit = if i < PIXELS { 16 } else { CLASSES - 1 };
        let value = field.parse::<usize>().ok().filter(|value| *value <= limit);
        values.push(value.with_context(|| format!("field {} is {field:?}, expected 0 to {limit}", i + 1))?);
    }
    Image::new(values[..PIXELS].iter().map(|pixel| *pixel as f32), values[PIXELS])
}
