//! What the plots share: a sheet with a title and a legend, lines and marks.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use crate::figures::Figures;
use crate::table::caption;
use crate::{share, speedup, tensors};

pub(crate) const WIDTH: u32 = 1000;
/// Fonts are the viewer's: SVG text needs none here.
pub(crate) const FONT: &str = "sans-serif";
pub(crate) const GREY: RGBColor = RGBColor(130, 130, 130);
pub(crate) const PALE: RGBColor = RGBColor(225, 225, 225);
/// Colours that are told apart by colour-blind readers too (Okabe and Ito; the seventh is Tol's).
const COLOURS: [RGBColor; 8] = [
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(136, 34, 85),
    RGBColor(240, 228, 66),
];
/// The size of all text but titles.
pub(crate) const LETTERS: i32 = 16;
const MARGIN: i32 = 16;
const LEGEND_TOP: i32 = 66;
const LEGEND_LINE: i32 = 24;

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(crate) type Point = (i32, i32);

pub(crate) struct Plot {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// Or why there is none.
    pub(crate) svg: Result<String, &'static str>,
}

impl Plot {
    pub(crate) fn file(&self, stem: &str) -> String {
        format!("{stem}-{}.svg", self.name)
    }
}

pub(crate) fn plots(figures: &Figures) -> Result<Vec<Plot>> {
    let plot = |name, title, svg: Option<String>, none| Plot { name, title, svg: svg.ok_or(none) };
    Ok(vec![
        plot("share", share::TITLE, share::draw(figures)?, "no flat list has a limit and gradblend beside it"),
        plot("tensors", tensors::TITLE, tensors::draw(figures)?, "no step on two or more equal lists"),
        plot("speedup", speedup::TITLE, speedup::draw(figures)?, "no step of a network has a peer"),
    ])
}

/// How a line, its marks and its entry in the legend look.
#[derive(Clone, Copy)]
pub(crate) struct Look {
    colour: RGBColor,
    mark: usize,
    dashed: bool,
    bar: bool,
    width: u32,
}

impl Look {
    /// The place decides on colour and mark.
    pub(crate) fn at(place: usize) -> Self {
        Look {
            colour: COLOURS[place % COLOURS.len()],
            mark: place,
            dashed: place >= COLOURS.len(),
            bar: false,
            width: 2,
        }
    }

    pub(crate) fn with(place: usize, colour: RGBColor, width: u32) -> Self {
        Look { colour, width, ..Look::at(place) }
    }

    pub(crate) fn dashed(self) -> Self {
        Look { dashed: true, ..self }
    }

    pub(crate) fn bar(self) -> Self {
        Look { bar: true, ..self }
    }

    pub(crate) fn colour(&self) -> RGBColor {
        self.colour
    }

    pub(crate) fn line(&self, area: &Area<'_>, points: &[Point]) -> Result<()> {
        let style = self.colour.stroke_width(self.width);
        match self.dashed {
            true => area.draw(&DashedPathElement::new(points.to_vec(), 6, 4, style))?,
            false => area.draw(&PathElement::new(points.to_vec(), style))?,
        }
        Ok(())
    }

    pub(crate) fn mark(&self, area: &Area<'_>, (x, y): Point) -> Result<()> {
        let size = 3 + self.width as i32 / 2;
        let fill = self.colour.filled();
        let shape =
            |corners: &[Point]| Polygon::new(corners.iter().map(|(dx, dy)| (x + dx, y + dy)).collect::<Vec<_>>(), fill);
        match self.mark % 4 {
            0 => area.draw(&Circle::new((x, y), size, fill))?,
            1 => area.draw(&Rectangle::new([(x - size, y - size), (x + size, y + size)], fill))?,
            2 => area.draw(&shape(&[(-size - 1, size), (size + 1, size), (0, -size - 1)]))?,
            _ => area.draw(&shape(&[(-size - 1, 0), (0, -size - 2), (size + 1, 0), (0, size + 2)]))?,
        }
        Ok(())
    }

    /// A piece of the bar, or of the line with its mark.
    pub(crate) fn sample(&self, area: &Area<'_>, (x, y): Point) -> Result<()> {
        if self.bar {
            return Ok(area.draw(&Rectangle::new([(x + 4, y - 7), (x + 24, y + 7)], self.colour.filled()))?);
        }
        self.line(area, &[(x, y), (x + 26, y)])?;
        self.mark(area, (x + 13, y))
    }
}

/// About, and rather too much: the viewer chooses the font.
pub(crate) fn width(text: &str, size: i32) -> i32 {
    text.chars().count() as i32 * size / 2
}

/// Where the entries of a legend begin, in as many lines as it takes.
fn flow(legend: &[(String, Look)]) -> Vec<Point> {
    let (mut x, mut y) = (MARGIN, LEGEND_TOP);
    let mut places = Vec::new();
    for (name, _) in legend {
        let size = 34 + width(name, LETTERS) + 22;
        if x > MARGIN && x + size > WIDTH as i32 - MARGIN {
            (x, y) = (MARGIN, y + LEGEND_LINE);
        }
        places.push((x, y));
        x += size;
    }
    places
}

/// A page of `height` below a title, a line on what was measured, and a legend. `fill` gets the page and where it may
/// begin to draw.
pub(crate) fn sheet(
    title: &str,
    figures: &Figures,
    legend: &[(String, Look)],
    height: u32,
    fill: impl Fn(&Area<'_>, i32) -> Result<()>,
) -> Result<String> {
    let places = flow(legend);
    let top = places.last().map_or(LEGEND_TOP, |(_, y)| y + LEGEND_LINE);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, top as u32 + height)).into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(title.to_owned(), (MARGIN, 12), (FONT, 22)))?;
        root.draw(&Text::new(caption(&figures.runs), (MARGIN, 40), (FONT, LETTERS).into_font().color(&GREY)))?;
        for ((name, look), (x, y)) in legend.iter().zip(places) {
            look.sample(&root, (x, y + 9))?;
            root.draw(&Text::new(name.clone(), (x + 34, y), (FONT, LETTERS)))?;
        }
        fill(&root, top)?;
        root.present()?;
    }
    Ok(svg)
}
