//! Handwritten digits as 8 x 8 pixels, to be paired with spoken ones.

use anyhow::{Context, Result, anyhow, ensure};
use csv::{ReaderBuilder, Trim};
use rand_chacha::ChaCha8Rng;

use crate::data::{CLASSES, normal};

/// Pixels of an image, 8 rows of 8.
const PIXELS: usize = 64;

/// A handwritten digit.
pub(crate) struct Image {
    pub(crate) pixels: Vec<f32>,
    pub(crate) label: usize,
}

impl Image {
    pub(crate) fn noisy(&self, noise: f32, rng: &mut ChaCha8Rng) -> Vec<f32> {
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
    let mut format = ReaderBuilder::new();
    format.has_headers(false).trim(Trim::All);
    let (mut images, mut first) = (Vec::new(), true);
    for (line, text) in (1..).zip(text.lines()) {
        // By line, as a reader of all does not count lines that are empty.
        let mut reader = format.from_reader(text.as_bytes());
        let Some(record) = reader.records().next() else { continue };
        let record = record.with_context(|| format!("line {line}"))?;
        let mut fields: Vec<&str> = record.iter().collect();
        if fields.iter().all(|field| field.is_empty()) {
            continue;
        }
        if fields.len() == PIXELS + 2 && fields[PIXELS + 1].is_empty() {
            fields.pop();
        }
        let len = fields.len();
        ensure!(len == PIXELS + 1, "line {line}: expected {} fields (64 pixels and a label), got {len}", PIXELS + 1);
        if !first || !is_heading(&fields) {
            images.push(parse_image(&fields).with_context(|| format!("line {line}"))?);
        }
        first = false;
    }
    ensure!(!images.is_empty(), "there is no image");
    Ok(images)
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
