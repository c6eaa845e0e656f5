//! One plot for a file of raw results: the time of each implementation over gradblend's, for each operation and case.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::record::Kind;
use crate::results::{Cell, OURS, Results, distinct};

const WIDTH: u32 = 1100;
/// Pixels of one row.
const ROW: i32 = 18;
/// Pixels left of the plot area, for the names of the rows, and above it.
const LEFT: i32 = 260;
const TOP: i32 = 90;
const FONT: (&str, i32) = ("sans-serif", 13);

pub(crate) fn draw(results: &Results) -> Result<String> {
    let names = distinct(cells(results).map(|cell| cell.time.implementation.clone()));
    let rows = results.rows.len() as i32;
    let bottom = TOP + rows * ROW;
    let ratios = || cells(results).filter_map(|cell| cell.ratio);
    let (low, high) = (ratios().fold(0.8, f64::min) / 1.1, ratios().fold(2.0, f64::max) * 1.1);
    let right = WIDTH as i32 - 20;
    let x = |ratio: f64| LEFT + ((ratio / low).ln() / (high / low).ln() * f64::from(right - LEFT)) as i32;
    let y = |row: usize| TOP + row as i32 * ROW + ROW / 2;

    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, (bottom + 50) as u32)).into_drawing_area();
        let failed = |error| anyhow!("the plot: {error}");
        area.fill(&WHITE).map_err(failed)?;
        let text = |text: String, at: (i32, i32), side: HPos| {
            let style = FONT.into_text_style(&area).pos(Pos::new(side, VPos::Center));
            area.draw(&Text::new(text, at, style)).map_err(failed)
        };
        let line = |points: [(i32, i32); 2], style: ShapeStyle| {
            area.draw(&PathElement::new(points.to_vec(), style)).map_err(failed)
        };
        text(format!("Time over gradblend's: {}", results.caption()), (20, 20), HPos::Left)?;

        // Ticks at 1, 2 and 5 of each decade.
        let decades = (low.log10().floor() as i32..=high.log10().ceil() as i32).map(|decade| 10_f64.powi(decade));
        for tick in decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * decade)) {
            if (low..=high).contains(&tick) {
                let style = if tick == 1.0 { BLACK.stroke_width(2) } else { RGBColor(220, 220, 220).stroke_width(1) };
                line([(x(tick), TOP), (x(tick), bottom)], style)?;
                text(format!("{tick}x"), (x(tick), bottom + 14), HPos::Center)?;
            }
        }
        for (row, one) in results.rows.iter().enumerate() {
            text(format!("{} {}", one.case.operation, one.case.case), (LEFT - 8, y(row)), HPos::Right)?;
            if row > 0 && one.case.operation != results.rows[row - 1].case.operation {
                line([(20, TOP + row as i32 * ROW), (right, TOP + row as i32 * ROW)], BLACK.stroke_width(1))?;
            }
        }
        for (nth, name) in names.iter().enumerate() {
            let of_name = || cells(results).filter(|cell| cell.time.implementation == *name);
            let limit = of_name().any(|cell| cell.time.kind == Kind::Limit);
            let style = if limit { BLACK.mix(0.5).stroke_width(2) } else { Palette99::pick(nth).filled() };
            let mark = |at: (i32, i32)| {
                if limit {
                    area.draw(&Cross::new(at, 4, style)).map_err(failed)
                } else {
                    area.draw(&Circle::new(at, 5, style)).map_err(failed)
                }
            };
            let key = (20 + 190 * (nth as i32 % 5), 45 + 20 * (nth as i32 / 5));
            mark(key)?;
            text(name.clone(), (key.0 + 12, key.1), HPos::Left)?;
            for (row, one) in results.rows.iter().enumerate() {
                if let Some(ratio) = one.find(name).and_then(|cell| cell.ratio) {
                    mark((x(ratio), y(row)))?;
                }
            }
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

/// All implementations but gradblend, which is at 1.
fn cells(results: &Results) -> impl Iterator<Item = &Cell> {
    results.rows.iter().flat_map(|row| &row.cells).filter(|cell| cell.time.implementation != OURS)
}
