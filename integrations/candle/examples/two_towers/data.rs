//! Emoji in four styles with their names: pairs of a picture and a text, where four pictures share one text.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use rand::seq::SliceRandom;

use crate::common::random::random;
use crate::common::train::Split;

pub(crate) const STYLES: [&str; 4] = ["noto", "twemoji", "openmoji", "fluent"];
/// Pixels of a side of a picture, and pictures in a row of a sheet.
pub(crate) const SIDE: usize = 32;
const COLUMNS: usize = 40;
/// Pixels of a side of a patch, and patches in a row of a picture.
const PATCH: usize = 4;
pub(crate) const PATCHES: usize = SIDE / PATCH;
pub(crate) const PATCH_VALUES: usize = PATCH * PATCH * 3;
/// Buckets that trigrams of characters are hashed into.
const TRIGRAMS: usize = 256;
/// A word is a feature if this many training emoji have it.
const COMMON: usize = 2;

/// The files that are read.
pub(crate) fn paths(folder: &Path) -> Vec<PathBuf> {
    let sheets = STYLES.iter().map(|style| folder.join(style).with_extension("png"));
    sheets.chain([folder.join("emoji.csv")]).collect()
}

/// An emoji.
pub(crate) struct Emoji {
    /// The words of its name and keywords.
    words: Vec<String>,
    pub(crate) category: usize,
    pub(crate) subcategory: usize,
}

/// All emoji.
pub(crate) struct Source {
    pub(crate) emoji: Vec<Emoji>,
    /// The RGB values of the pictures of each style, row by row.
    pictures: Vec<Vec<Vec<u8>>>,
    pub(crate) categories: usize,
    pub(crate) subcategories: usize,
}

#[derive(serde::Deserialize)]
struct Line {
    index: usize,
    name: String,
    keywords: String,
    category: String,
    subcategory: String,
}

impl Source {
    /// Reads `emoji.csv` and a sheet of pictures per style.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let table = folder.join("emoji.csv");
        let lines = read_table(&table).with_context(|| format!("cannot read {}", table.display()))?;
        let categories = numbers(lines.iter().map(|line| &line.category[..]));
        let subcategories = numbers(lines.iter().map(|line| &line.subcategory[..]));
        let emoji = lines.iter().map(|line| Emoji {
            words: words(line),
            category: categories[&line.category[..]],
            subcategory: subcategories[&line.subcategory[..]],
        });
        let pictures = STYLES.iter().map(|style| {
            let path = folder.join(style).with_extension("png");
            read_sheet(&path, lines.len()).with_context(|| format!("cannot read {}", path.display()))
        });
        Ok(Source {
            emoji: emoji.collect(),
            pictures: pictures.collect::<Result<_>>()?,
            categories: categories.len(),
            subcategories: subcategories.len(),
        })
    }

    /// The RGB values of a picture.
    pub(crate) fn picture(&self, emoji: usize, style: usize) -> &[u8] {
        &self.pictures[style][emoji]
    }
}

/// The words of name and keywords, each once.
fn words(line: &Line) -> Vec<String> {
    let text = format!("{} {}", line.name, line.keywords).to_lowercase();
    let mut words: Vec<String> = Vec::new();
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        if !words.iter().any(|known| known == word) {
            words.push(word.to_owned());
        }
    }
    words
}

/// A number for each different text, in the order of texts.
fn numbers<'a>(texts: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, usize> {
    let mut numbers: BTreeMap<&str, usize> = texts.map(|text| (text, 0)).collect();
    numbers.values_mut().zip(0..).for_each(|(number, i)| *number = i);
    numbers
}

fn read_table(path: &Path) -> Result<Vec<Line>> {
    let mut lines: Vec<Line> = Vec::new();
    for line in csv::Reader::from_reader(File::open(path)?).deserialize() {
        let line: Line = line?;
        let at = lines.len();
        ensure!(line.index == at, "emoji {at} has index {}", line.index);
        ensure!(!words(&line).is_empty(), "emoji {at} has no name");
        lines.push(line);
    }
    ensure!(!lines.is_empty(), "there is no emoji");
    Ok(lines)
}

/// The RGB values of `len` pictures of a sheet.
fn read_sheet(path: &Path, len: usize) -> Result<Vec<Vec<u8>>> {
    let mut decoder = png::Decoder::new(BufReader::new(File::open(path)?));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info()?;
    let size = reader.output_buffer_size().context("the picture is too large")?;
    let mut pixels = vec![0; size];
    let frame = reader.next_frame(&mut pixels)?;
    let (width, height) = (frame.width as usize, frame.height as usize);
    let rows = len.div_ceil(COLUMNS);
    ensure!(
        width == COLUMNS * SIDE && height >= rows * SIDE,
        "the sheet has {width} x {height} pixels, but {len} pictures need {} x {}",
        COLUMNS * SIDE,
        rows * SIDE
    );
    ensure!(frame.color_type == png::ColorType::Rgb, "the sheet is {:?}, expected colours", frame.color_type);
    let picture = |i: usize| {
        let start = (i / COLUMNS * SIDE * width + i % COLUMNS * SIDE) * 3;
        (0..SIDE).flat_map(|y| pixels[start + y * width * 3..][..SIDE * 3].iter().copied()).collect()
    };
    Ok((0..len).map(picture).collect())
}

/// How many emoji are for training, held out, and for testing.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) train: usize,
    pub(crate) held_out: usize,
    /// All others, if there is no number.
    pub(crate) test: Option<usize>,
}

/// Some emoji, with all their pictures.
pub(crate) struct Samples {
    /// Their positions in the source.
    pub(crate) emoji: Vec<usize>,
    /// Pictures as patches, of each emoji in all styles: [emoji * styles, patches * patches, values].
    pub(crate) pictures: Tensor,
    /// [emoji, features].
    pub(crate) texts: Tensor,
    pub(crate) categories: Vec<u32>,
    pub(crate) subcategories: Vec<u32>,
}

/// The samples of one seed.
pub(crate) type Data = Split<Samples>;

impl Source {
    /// Draws the samples of a seed. They are disjoint.
    pub(crate) fn draw(&self, sizes: &Sizes, seed: u64) -> Result<Data> {
        let Sizes { train, held_out, test } = *sizes;
        let len = self.emoji.len();
        let rest = len.checked_sub(train + held_out).filter(|rest| *rest > 0 && test.unwrap_or(1) <= *rest);
        let rest = rest.with_context(|| {
            let test = test.unwrap_or(1);
            format!("--train, --held-out and --test want {} emoji, of which there are {len}", train + held_out + test)
        })?;
        let mut emoji: Vec<usize> = (0..len).collect();
        emoji.shuffle(&mut random(seed, "samples"));
        emoji.truncate(train + held_out + test.unwrap_or(rest));
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        let words = emoji[..train].iter().flat_map(|i| &self.emoji[*i].words);
        words.for_each(|word| *counts.entry(word).or_default() += 1);
        let known = counts.into_iter().filter(|(_, count)| *count >= COMMON).map(|(word, _)| word);
        let known: HashMap<&str, usize> = known.zip(0..).collect();
        let test = emoji.split_off(train + held_out);
        let held_out = emoji.split_off(train);
        let samples = |emoji| self.samples(emoji, &known);
        Ok(Data { train: samples(emoji)?, held_out: samples(held_out)?, test: samples(test)? })
    }

    fn samples(&self, emoji: Vec<usize>, known: &HashMap<&str, usize>) -> Result<Samples> {
        let len = emoji.len();
        let pictures = emoji.iter().flat_map(|i| (0..STYLES.len()).map(|style| patches(self.picture(*i, style))));
        let pictures: Vec<f32> = pictures.flatten().collect();
        let texts: Vec<f32> = emoji.iter().flat_map(|i| features(&self.emoji[*i].words, known)).collect();
        let number = |of: fn(&Emoji) -> usize| emoji.iter().map(|i| of(&self.emoji[*i]) as u32).collect();
        Ok(Samples {
            pictures: Tensor::from_vec(pictures, (len * STYLES.len(), PATCHES * PATCHES, PATCH_VALUES), &Device::Cpu)?,
            texts: Tensor::from_vec(texts, (len, known.len() + TRIGRAMS), &Device::Cpu)?,
            categories: number(|emoji| emoji.category),
            subcategories: number(|emoji| emoji.subcategory),
            emoji,
        })
    }
}

impl Samples {
    pub(crate) fn len(&self) -> usize {
        self.emoji.len()
    }
}

/// The values of a picture from 0 to 1, patch by patch. Four patches that are neighbours follow each other, so that a
/// reshape merges them.
fn patches(picture: &[u8]) -> Vec<f32> {
    let mut values = Vec::with_capacity(picture.len());
    for patch in 0..PATCHES * PATCHES {
        let (block, within) = (patch / 4, patch % 4);
        let row = block / (PATCHES / 2) * 2 + within / 2;
        let column = block % (PATCHES / 2) * 2 + within % 2;
        for y in row * PATCH..(row + 1) * PATCH {
            let start = (y * SIDE + column * PATCH) * 3;
            values.extend(picture[start..start + PATCH * 3].iter().map(|value| f32::from(*value) / 255.0));
        }
    }
    values
}

/// Which known words and which trigrams a text has.
fn features(words: &[String], known: &HashMap<&str, usize>) -> Vec<f32> {
    let mut features = vec![0.0; known.len() + TRIGRAMS];
    for word in words {
        if let Some(i) = known.get(&word[..]) {
            features[*i] = 1.0;
        }
        let letters: Vec<char> = format!("^{word}$").chars().collect();
        for trigram in letters.windows(3) {
            // FNV-1a.
            let hash = trigram.iter().fold(0x811c_9dc5_u32, |hash, c| (hash ^ *c as u32).wrapping_mul(0x0100_0193));
            // The high bits: the low ones depend on the low bits of the letters only.
            features[known.len() + (hash >> 16) as usize % TRIGRAMS] = 1.0;
        }
    }
    features
}
