//! The share of the limit that is reached, by size.

use anyhow::Result;
use plotters::prelude::*;

use crate::axes::{Axis, Scale, grid};
use crate::figures::{Figures, Row, Spread};
use crate::plots::{FONT, GREY, Look, Point, WIDTH, sheet};
use crate::table::bytes;

pub(crate) const TITLE: &str = "Share of the limit on one tensor, by size";
const HEIGHT: u32 = 380;

/// One line of a panel.
struct Line<'a> {
    dtype: &'a str,
    threads: u32,
    points: Vec<(f64, Spread)>,
}

pub(crate) fn draw(figures: &Figures) -> Result<Option<String>> {
    let modalities = figures.modalities();
    let rows: Vec<(&Row, Spread)> = figures.rows.iter().filter_map(|row| Some((row, row.share()?))).collect();
    let wanted = |row: &Row| row.flat().is_some() && row.case.modalities == modalities && row.case.bytes > 0;
    let rows: Vec<_> = rows.into_iter().filter(|(row, _)| wanted(row)).collect();
    let panels: Vec<(&str, Vec<Line<'_>>)> =
        figures.operations().into_iter().map(|name| (name, lines(&rows, name))).collect();
    let panels: Vec<_> = panels.into_iter().filter(|(_, lines)| !lines.is_empty()).collect();
    if panels.is_empty() {
        return Ok(None);
    }
    let dtypes = figures.dtypes();
    let most = figures.threads();
    let look = |line: &Line<'_>| {
        let look = Look::at(dtypes.iter().position(|dtype| *dtype == line.dtype).unwrap_or(0));
        if line.threads < most { look.dashed() } else { look }
    };
    let mut legend: Vec<(String, Look)> = Vec::new();
    for line in panels.iter().flat_map(|(_, lines)| lines) {
        let name = match line.threads {
            threads if threads == most => line.dtype.to_owned(),
            1 => format!("{}, 1 thread", line.dtype),
            threads => format!("{}, {threads} threads", line.dtype),
        };
        if !legend.iter().any(|(other, _)| *other == name) {
            legend.push((name, look(line)));
        }
    }
    let sizes = || rows.iter().map(|(row, _)| row.case.bytes as f64);
    let x = (sizes().fold(f64::INFINITY, f64::min) / 1.6, sizes().fold(1.0, f64::max) * 1.6);
    let high = rows.iter().map(|(_, share)| share.high * 1.04).fold(1.2, f64::max);
    let title = format!("{TITLE}: K = {modalities}, median of turns, bars from quartile to quartile");
    let svg = sheet(&title, figures, &legend, HEIGHT, |root, top| {
        let (top, bottom) = (top + 40, top + HEIGHT as i32 - 56);
        let panel = WIDTH as i32 / panels.len() as i32;
        for (place, (operation, lines)) in panels.iter().enumerate() {
            let (left, right) = (place as i32 * panel + 52, (place as i32 + 1) * panel - 16);
            let label = |size: f64| bytes(size.round());
            let (x, most) = (Scale::log(x, (left, right)), panel as usize / 80);
            let x = Axis { scale: x, name: "bytes moved", label: &label, ticks: most };
            let y = Scale::linear((0.0, high), (bottom, top));
            let y = Axis { scale: y, name: "share", label: &|share| format!("{share:.1}"), ticks: 10 };
            grid(root, &x, Some(&y), (top, bottom))?;
            root.draw(&Text::new((*operation).to_owned(), ((left + right) / 2 - 20, top - 30), (FONT, 20)))?;
            let at = |size: f64, share: f64| -> Point { (x.scale.at(size), y.scale.at(share)) };
            Look::with(0, GREY, 2).line(root, &[(left, at(1.0, 1.0).1), (right, at(1.0, 1.0).1)])?;
            for line in lines {
                let look = look(line);
                for (size, share) in &line.points {
                    let bar = [at(*size, share.low), at(*size, share.high)];
                    root.draw(&PathElement::new(bar.to_vec(), look.colour().stroke_width(1)))?;
                    for (x, y) in bar {
                        root.draw(&PathElement::new(vec![(x - 4, y), (x + 4, y)], look.colour().stroke_width(1)))?;
                    }
                }
                let points: Vec<Point> = line.points.iter().map(|(size, share)| at(*size, share.middle)).collect();
                look.line(root, &points)?;
                points.into_iter().try_for_each(|point| look.mark(root, point))?;
            }
        }
        Ok(())
    })?;
    Ok(Some(svg))
}

fn lines<'a>(rows: &[(&'a Row, Spread)], operation: &str) -> Vec<Line<'a>> {
    let mut lines: Vec<Line<'a>> = Vec::new();
    for (row, share) in rows.iter().filter(|(row, _)| row.is(operation)) {
        let point = (row.case.bytes as f64, *share);
        let (dtype, threads) = (row.case.dtype.as_str(), row.case.threads);
        match lines.iter_mut().find(|line| (line.dtype, line.threads) == (dtype, threads)) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { dtype, threads, points: vec![point] }),
        }
    }
    for line in &mut lines {
        line.points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    }
    lines
}
