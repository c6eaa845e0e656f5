//! The time of a step by the number of tensors that the same elements are spread over.

use anyhow::Result;
use plotters::prelude::*;

use crate::axes::{Axis, Scale, grid};
use crate::figures::{Figures, OURS, Row};
use crate::plots::{GREY, Look, Point, WIDTH, sheet};
use crate::raw::{List, Role};
use crate::table::{count, nanoseconds};

pub(crate) const TITLE: &str = "Time of a step, by the number of tensors";
const HEIGHT: u32 = 480;

struct Line {
    name: String,
    look: Look,
    /// Tensors, nanoseconds.
    points: Vec<(f64, f64)>,
}

pub(crate) fn draw(figures: &Figures) -> Result<Option<String>> {
    let rows = rows(figures);
    let mut lines: Vec<Line> = Vec::new();
    let mut add = |name: &str, look: Look| {
        let point = |row: &&Row| Some((row.case.tensors as f64, row.find(name)?.time?.middle));
        lines.push(Line { name: name.to_owned(), look, points: rows.iter().filter_map(point).collect() });
    };
    add(OURS, Look::with(0, BLACK, 4));
    for (place, name) in figures.names(Role::Ours).into_iter().enumerate() {
        add(name, Look::with(place + 1, BLACK, 2).dashed());
    }
    for (place, name) in figures.names(Role::Peer).into_iter().enumerate() {
        add(name, Look::at(place));
    }
    for (place, name) in figures.names(Role::Limit).into_iter().enumerate() {
        add(name, Look::with(place, GREY, 2).dashed());
    }
    lines.retain(|line| !line.points.is_empty());
    let Some(first) = rows.first().filter(|_| rows.len() > 1 && !lines.is_empty()) else { return Ok(None) };
    let legend: Vec<(String, Look)> = lines.iter().map(|line| (line.name.clone(), line.look)).collect();
    let points = || lines.iter().flat_map(|line| &line.points);
    let range = |value: fn(&(f64, f64)) -> f64| {
        let (low, high) =
            points().map(value).fold((f64::INFINITY, 1.0), |(low, high), v| (f64::min(low, v), f64::max(high, v)));
        (low / 1.4, high * 1.4)
    };
    let case = &first.case;
    let elements = count(case.elements as f64);
    let title = format!("{TITLE}: {elements} elements in all, K = {}, {}, median", case.modalities, case.dtype);
    let svg = sheet(&title, figures, &legend, HEIGHT, |root, top| {
        let (top, bottom) = (top + 36, top + HEIGHT as i32 - 56);
        let x = Scale::log(range(|(tensors, _)| *tensors), (84, WIDTH as i32 - 20));
        let x = Axis { scale: x, name: "tensors", label: &|tensors| count(tensors), ticks: 12 };
        let y = Scale::log(range(|(_, time)| *time), (bottom, top));
        let y = Axis { scale: y, name: "time", label: &|time| nanoseconds(time.round()), ticks: 14 };
        grid(root, &x, Some(&y), (top, bottom))?;
        // Ours last, over the others.
        for Line { look, points, .. } in lines.iter().rev() {
            let points: Vec<Point> =
                points.iter().map(|(tensors, time)| (x.scale.at(*tensors), y.scale.at(*time))).collect();
            look.line(root, &points)?;
            points.into_iter().try_for_each(|point| look.mark(root, point))?;
        }
        Ok(())
    })?;
    Ok(Some(svg))
}

/// The steps on equal lists of about as many elements in all: of all such sets, the one with the most of them.
fn rows(figures: &Figures) -> Vec<&Row> {
    let equal = |row: &&Row| {
        row.is("step") && row.case.plain() && row.case.tensors > 0 && matches!(row.case.list, List::Equal { .. })
    };
    let all: Vec<&Row> = figures.rows.iter().filter(equal).collect();
    let like = |first: &Row| -> Vec<&Row> {
        let same = |row: &&Row| {
            let (a, b) = (&row.case, &first.case);
            let off = a.elements.abs_diff(b.elements) as f64;
            (a.modalities, &a.dtype, a.threads) == (b.modalities, &b.dtype, b.threads)
                && off <= 0.05 * b.elements as f64
        };
        all.iter().copied().filter(same).collect()
    };
    let mut best: Vec<&Row> = Vec::new();
    for set in all.iter().map(|row| like(row)) {
        if set.len() > best.len() {
            best = set;
        }
    }
    best.sort_by_key(|row| row.case.tensors);
    best
}
