//! Spoken digits from WAV files, as log-mel energies.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use realfft::RealFftPlanner;

use crate::data::CLASSES;
use crate::wav;

const SAMPLE_RATE: u32 = 8_000;
/// 32 ms, a power of two.
const FRAME: usize = 256;
/// 10 ms.
const HOP: usize = 80;
const MEL_BANDS: usize = 20;
/// Recordings differ in length, so each is divided into this many parts of equal length, whose frames are averaged.
const PARTS: usize = 8;

/// A spoken digit.
pub(crate) struct Recording {
    pub(crate) digit: usize,
    pub(crate) speaker: String,
    /// `PARTS` x `MEL_BANDS` log energies minus their mean: the loudness of a recording is independent of its digit.
    pub(crate) features: Vec<f32>,
}

/// Reads all `{digit}_{speaker}_{index}.wav` of a folder, or of its subfolder `recordings`, in order of name.
pub(crate) fn read_recordings(folder: &Path) -> Result<Vec<Recording>> {
    let inner = folder.join("recordings");
    let folder = if inner.is_dir() { inner } else { folder.to_owned() };
    let context = || format!("cannot read the audio folder {}", folder.display());
    let entries = fs::read_dir(&folder).with_context(context)?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    // Systems leave hidden files with the same names in folders that they copy.
    let hidden = |path: &Path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    let wav = |end: &OsStr| end.eq_ignore_ascii_case("wav") || end.eq_ignore_ascii_case("wave");
    paths.retain(|path| path.extension().is_some_and(wav) && !hidden(path));
    paths.sort();
    ensure!(!paths.is_empty(), "no WAV file in {} (or in its folder `recordings`)", folder.display());
    let mut mel = LogMel::new();
    let read = |path: &PathBuf| read_recording(path, &mut mel).with_context(|| format!("in {}", path.display()));
    paths.iter().map(read).collect()
}

fn read_recording(path: &Path, mel: &mut LogMel) -> Result<Recording> {
    let name = path.file_stem().and_then(|stem| stem.to_str()).context("the name is not UTF-8")?;
    // The speaker's name may have underscores.
    let parts = name.split_once('_').and_then(|(digit, rest)| Some((digit, rest.rsplit_once('_')?)));
    let Some((digit, (speaker, index))) = parts else {
        bail!("the name is not {{digit}}_{{speaker}}_{{index}}.wav");
    };
    let digit = digit.parse::<usize>().ok().filter(|digit| *digit < CLASSES);
    let digit = digit.context("the name does not start with a digit from 0 to 9")?;
    ensure!(index.parse::<u32>().is_ok(), "the name ends with {index:?}, expected an index");
    ensure!(!speaker.is_empty(), "the name has no speaker");
    let samples = wav::samples(&fs::read(path)?, SAMPLE_RATE)?;
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
        // Hann window.
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
                // The quantisation noise of 16 bits is below 1e-6.
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
