//! Axes in pixels. Plotters' own put as many numbers on a logarithmic axis as fit, so that they touch, or too few.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::plots::{Area, FONT, LETTERS, PALE, Point};

/// From values to pixels along one axis.
pub(crate) struct Scale {
    values: (f64, f64),
    pixels: (i32, i32),
    log: bool,
}

impl Scale {
    pub(crate) fn linear(values: (f64, f64), pixels: (i32, i32)) -> Self {
        Scale { values, pixels, log: false }
    }

    /// Of positive values.
    pub(crate) fn log(values: (f64, f64), pixels: (i32, i32)) -> Self {
        Scale { values, pixels, log: true }
    }

    pub(crate) fn at(&self, value: f64) -> i32 {
        let unit = |value: f64| if self.log { value.ln() } else { value };
        let (low, high) = (unit(self.values.0), unit(self.values.1));
        let (from, to) = self.pixels;
        from + ((unit(value) - low) / (high - low) * f64::from(to - from)).round() as i32
    }

    /// Round values, `most` at most.
    fn ticks(&self, most: usize) -> Vec<f64> {
        let (low, high) = self.values;
        if !self.log {
            let mut steps = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0].into_iter();
            let step = steps.find(|step| (high - low) / step < most as f64).unwrap_or(high - low);
            let (first, last) = ((low / step).ceil() as i64, (high / step + 1e-9).floor() as i64);
            return (first..=last).map(|i| i as f64 * step).collect();
        }
        let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
        let every = |digits: &[f64], decades: i32| -> Vec<f64> {
            let all = (first..=last).filter(|decade| decade.rem_euclid(decades) == 0);
            let all = all.flat_map(|decade| digits.iter().map(move |digit| digit * 10_f64.powi(decade)));
            all.filter(|value| (low..=high).contains(value)).collect()
        };
        let fine = every(&[1.0, 2.0, 5.0], 1);
        if fine.len() <= most {
            return fine;
        }
        (1..).map(|decades| every(&[1.0], decades)).find(|ticks| ticks.len() <= most).unwrap_or_default()
    }
}

/// What stands along an axis.
pub(crate) struct Axis<'a> {
    pub(crate) scale: Scale,
    pub(crate) name: &'a str,
    pub(crate) label: &'a dyn Fn(f64) -> String,
    pub(crate) ticks: usize,
}

/// Draws the grid, the numbers below it and, where there is an axis of such, beside it.
pub(crate) fn grid(area: &Area<'_>, x: &Axis<'_>, y: Option<&Axis<'_>>, (top, bottom): (i32, i32)) -> Result<()> {
    let letters = (FONT, LETTERS).into_text_style(area);
    let (left, right) = x.scale.pixels;
    for value in x.scale.ticks(x.ticks) {
        let at = x.scale.at(value);
        area.draw(&PathElement::new(vec![(at, top), (at, bottom)], PALE))?;
        area.draw(&PathElement::new(vec![(at, bottom), (at, bottom + 5)], BLACK))?;
        let style = letters.pos(Pos::new(HPos::Center, VPos::Top));
        area.draw(&Text::new((x.label)(value), (at, bottom + 8), style))?;
    }
    let style = letters.pos(Pos::new(HPos::Center, VPos::Top));
    area.draw(&Text::new(x.name.to_owned(), ((left + right) / 2, bottom + 28), style))?;
    if let Some(y) = y {
        for value in y.scale.ticks(y.ticks) {
            let at = y.scale.at(value);
            area.draw(&PathElement::new(vec![(left, at), (right, at)], PALE))?;
            area.draw(&PathElement::new(vec![(left - 5, at), (left, at)], BLACK))?;
            let style = letters.pos(Pos::new(HPos::Right, VPos::Center));
            area.draw(&Text::new((y.label)(value), (left - 9, at), style))?;
        }
        area.draw(&Text::new(y.name.to_owned(), (left - 30, top - 24), (FONT, LETTERS)))?;
        area.draw(&PathElement::new(vec![(left, top), (left, bottom)], BLACK))?;
    }
    area.draw(&PathElement::new(vec![(left, bottom), (right, bottom)], BLACK))?;
    Ok(())
}

/// Text whose right or left end is in the middle of a line.
pub(crate) fn text(area: &Area<'_>, text: &str, at: Point, right: bool) -> Result<()> {
    let end = if right { HPos::Right } else { HPos::Left };
    let style = (FONT, LETTERS).into_text_style(area).pos(Pos::new(end, VPos::Center));
    area.draw(&Text::new(text.to_owned(), at, style))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_round_ticks() {
        let ticks = |low: f64, high: f64, most: usize| Scale::log((low, high), (0, 100)).ticks(most);
        assert_eq!(ticks(0.9, 22.0, 8), [1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!(ticks(0.9, 1100.0, 8), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(ticks(0.5, 2e8, 5), [1.0, 1e2, 1e4, 1e6, 1e8]);
        assert_eq!(Scale::linear((0.0, 1.0), (0, 100)).ticks(4), [0.0, 0.5, 1.0]);
    }

    #[test]
    fn values_to_pixels() {
        assert_eq!(Scale::log((1.0, 100.0), (0, 100)).at(10.0), 50);
        assert_eq!(Scale::linear((0.0, 2.0), (100, 0)).at(0.5), 75);
    }
}
