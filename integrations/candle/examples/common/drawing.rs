//! What all plots have in common.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

/// Colours that colour-blind readers can distinguish (Okabe and Ito, and P. Tol).
pub(crate) const COLOURS: [RGBColor; 9] = [
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(240, 228, 66),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(136, 34, 85),
    RGBColor(153, 153, 51),
];
pub(crate) const GREY: RGBColor = RGBColor(130, 130, 130);
/// The viewer's font: plotters needs none to write text as SVG.
pub(crate) const FONT: &str = "sans-serif";
/// The height of the header of `header`.
pub(crate) const HEADER: u32 = 56;

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws a title and a legend on top of a plot and returns the rest of its area.
pub(crate) fn header<'a>(root: &Area<'a>, title: &str, legend: &[(&str, RGBColor)]) -> Result<Area<'a>> {
    root.fill(&WHITE)?;
    let (header, body) = root.split_vertically(HEADER);
    header.draw(&Text::new(title.to_owned(), (14, 8), (FONT, 20)))?;
    let mut x = 14;
    for (name, colour) in legend {
        header.draw(&Rectangle::new([(x, 36), (x + 14, 50)], colour.filled()))?;
        header.draw(&Text::new((*name).to_owned(), (x + 20, 35), (FONT, 15)))?;
        x += 50 + 8 * name.chars().count() as i32;
    }
    Ok(body)
}
