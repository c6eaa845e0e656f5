//! A contact sheet: the nearest neighbours of some pictures before and after.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use plotters::style::RGBColor;

use crate::common::drawing::{COLOURS, FONT, GREY};
use crate::data::{Data, SIDE, STYLES, Source};
use crate::measures::NEIGHBOURS;

/// Pictures that are shown.
pub(crate) const QUERIES: usize = 8;
/// Pixels of a picture on the sheet, and from one to the next.
const SIZE: usize = 48;
const STEP: usize = 62;
const TOP: usize = 96;

/// The positions of the test pictures that are shown: of different emoji, in all styles.
pub(crate) fn queries(test: usize) -> Vec<usize> {
    let shown = QUERIES.min(test);
    (0..shown).map(|i| i * test / shown * STYLES.len() + i % STYLES.len()).collect()
}

/// The neighbours of each query after training by two methods.
pub(crate) struct Sheet<'a> {
    pub(crate) source: &'a Source,
    pub(crate) data: &'a Data,
    /// Names and neighbours.
    pub(crate) methods: [(&'a str, &'a [[usize; NEIGHBOURS]]); 2],
}

impl Sheet<'_> {
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.svg()?).with_context(|| format!("cannot write {}", path.display()))
    }

    fn svg(&self) -> Result<String> {
        let queries = queries(self.data.test.len());
        let left = [STEP + 40, STEP + 80 + NEIGHBOURS * STEP];
        let (width, height) = (left[1] + NEIGHBOURS * STEP + 20, TOP + queries.len() * STEP + 10);
        let mut svg = format!(
            "<svg width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" font-family=\"{FONT}\" \
             xmlns=\"http://www.w3.org/2000/svg\">\n<rect width=\"100%\" height=\"100%\" fill=\"#FFFFFF\"/>\n"
        );
        text(&mut svg, 14, 26, 20, "Nearest training pictures of test pictures, before and after")?;
        let legend =
            [(COLOURS[1], "the picture's style and category"), (COLOURS[2], "style"), (COLOURS[0], "category")];
        let mut x = 14;
        for (colour, name) in legend.into_iter().chain([(GREY, "neither")]) {
            writeln!(svg, "<rect x=\"{x}\" y=\"38\" width=\"14\" height=\"14\" fill=\"{}\"/>", hex(colour))?;
            text(&mut svg, x + 20, 50, 14, name)?;
            x += 50 + 8 * name.len();
        }
        for ((name, _), left) in self.methods.iter().zip(left) {
            text(&mut svg, left, TOP - 14, 15, name)?;
        }
        let (train, test) = (&self.data.train, &self.data.test);
        let kind = |picture: usize| (picture / STYLES.len(), picture % STYLES.len());
        for (row, query) in queries.into_iter().enumerate() {
            let (emoji, style) = kind(query);
            let y = TOP + row * STEP;
            self.picture(&mut svg, 14, y, test.emoji[emoji], style)?;
            for ((_, near), left) in self.methods.iter().zip(left) {
                for (place, neighbour) in near[row].into_iter().enumerate() {
                    let (near, near_style) = kind(neighbour);
                    let colour = match (near_style == style, train.categories[near] == test.categories[emoji]) {
                        (true, true) => COLOURS[1],
                        (true, false) => COLOURS[2],
                        (false, true) => COLOURS[0],
                        (false, false) => GREY,
                    };
                    let x = left + place * STEP;
                    let (x4, y4, side) = (x - 4, y - 4, SIZE + 8);
                    let fill = hex(colour);
                    writeln!(svg, "<rect x=\"{x4}\" y=\"{y4}\" width=\"{side}\" height=\"{side}\" fill=\"{fill}\"/>")?;
                    self.picture(&mut svg, x, y, train.emoji[near], near_style)?;
                }
            }
        }
        svg += "</svg>\n";
        Ok(svg)
    }

    fn picture(&self, svg: &mut String, x: usize, y: usize, emoji: usize, style: usize) -> Result<()> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, SIDE as u32, SIDE as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header()?.write_image_data(self.source.picture(emoji, style))?;
        let data = BASE64_STANDARD.encode(bytes);
        let place = format!("x=\"{x}\" y=\"{y}\" width=\"{SIZE}\" height=\"{SIZE}\"");
        Ok(writeln!(svg, "<image {place} href=\"data:image/png;base64,{data}\"/>")?)
    }
}

fn text(svg: &mut String, x: usize, y: usize, size: usize, text: &str) -> Result<()> {
    Ok(writeln!(svg, "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\">{text}</text>")?)
}

fn hex(RGBColor(red, green, blue): RGBColor) -> String {
    format!("#{red:02X}{green:02X}{blue:02X}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sizes;

    #[test]
    fn a_frame_says_what_a_neighbour_has_in_common_with_the_query() {
        let source = Source::read(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/emoji").as_ref()).unwrap();
        let data = source.draw(&Sizes { train: 100, held_out: 10, test: Some(1) }, 0).unwrap();
        let of_category = |same: bool| {
            let like = |category: &u32| (*category == data.test.categories[0]) == same;
            data.train.categories.iter().position(like).unwrap() * STYLES.len()
        };
        // The only query is a picture of the first style.
        let kinds = [of_category(true), of_category(false), of_category(true) + 1, of_category(false) + 1];
        let near = [[kinds[0], kinds[1], kinds[2], kinds[3], kinds[0]]];
        let sheet = Sheet { source: &source, data: &data, methods: [("before", &near), ("after", &near)] };
        let svg = sheet.svg().unwrap();
        let frames: Vec<&str> = svg.lines().filter(|line| line.contains("width=\"56\"")).collect();
        let colours = [COLOURS[1], COLOURS[2], COLOURS[0], GREY, COLOURS[1]];
        assert_eq!(frames.len(), 2 * colours.len());
        for (frame, colour) in frames.into_iter().zip(colours.into_iter().chain(colours)) {
            assert!(frame.contains(&hex(colour)), "{frame}");
        }
    }
}
