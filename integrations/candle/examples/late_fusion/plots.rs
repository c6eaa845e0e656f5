//! Three plots as SVG: accuracy of each method, weights over training, OGR over training.

use std::path::{Path, PathBuf};

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::report::{Outcome, deviation, mean};
use crate::train::Weights;

/// Colours that colour-blind readers can distinguish (Okabe and Ito). The first is the fused loss.
const COLOURS: [RGBColor; 5] = [
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(240, 228, 66),
];
const GREY: RGBColor = RGBColor(130, 130, 130);
const WIDTH: u32 = 1000;
const PANEL_HEIGHT: u32 = 280;
const HEADER: i32 = 56;
/// The viewer's font: plotters needs none to write text as SVG.
const FONT: &str = "sans-serif";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The files that `draw` writes.
pub(crate) fn paths(folder: &Path) -> [PathBuf; 3] {
    ["accuracy.svg", "weights.svg", "ogr.svg"].map(|name| folder.join(name))
}

/// Writes the plots and returns their paths.
pub(crate) fn draw(outcomes: &[Outcome<'_>], losses: &[String], folder: &Path) -> Result<[PathBuf; 3]> {
    let paths = paths(folder);
    accuracy(outcomes, &paths[0])?;
    // The fused loss has the first colour whatever the number of inputs.
    let last = losses.len() - 1;
    let colour = |k: usize| if k == last { COLOURS[0] } else { COLOURS[1 + k % (COLOURS.len() - 1)] };
    let mut legend: Vec<(&str, RGBColor)> = losses.iter().enumerate().map(|(k, name)| (&name[..], colour(k))).collect();
    panels(outcomes, &paths[1], "Weights in force, mean over seeds, stacked", &legend, weights)?;
    legend.extend([("blend", BLACK), ("uniform weights", GREY)]);
    let title = "Overfitting-to-generalisation ratio, median over seeds (less is better)";
    panels(outcomes, &paths[2], title, &legend, ogr)?;
    Ok(paths)
}

fn accuracy(outcomes: &[Outcome<'_>], path: &Path) -> Result<()> {
    let rows = outcomes.len() as i32;
    let root = SVGBackend::new(path, (WIDTH, 34 * outcomes.len() as u32 + 130)).into_drawing_area();
    root.fill(&WHITE)?;
    let all: Vec<f64> = outcomes.iter().flat_map(Outcome::accuracy).collect();
    let (low, high) = all.iter().fold((1.0, 0.0), |(low, high), a| (f64::min(low, *a), f64::max(high, *a)));
    let caption = "Test accuracy: seeds (dots), mean (bar), one standard deviation (line)";
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, (FONT, 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(220)
        .build_cartesian_2d((low - 0.02).max(0.0)..(high + 0.02).min(1.0), (0..rows - 1).into_segmented())?;
    // Rows count from the bottom; the first method is at the top.
    let name = |row: &SegmentValue<i32>| match row {
        SegmentValue::CenterOf(row) | SegmentValue::Exact(row) => {
            outcomes.get((rows - 1 - row) as usize).map_or(String::new(), |outcome| outcome.method.name.clone())
        }
        SegmentValue::Last => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(outcomes.len())
        .y_label_formatter(&name)
        .x_label_formatter(&|accuracy| format!("{accuracy:.2}"))
        .x_desc("test accuracy")
        .label_style((FONT, 15))
        .draw()?;
    for (row, outcome) in (0..rows).rev().zip(outcomes) {
        let row = SegmentValue::CenterOf(row);
        let values = outcome.accuracy();
        let (mean, deviation) = (mean(&values), deviation(&values));
        if deviation.is_finite() {
            let ends = [(mean - deviation, row.clone()), (mean + deviation, row.clone())];
            chart.draw_series([PathElement::new(ends, GREY.stroke_width(2))])?;
        }
        chart.draw_series(values.iter().map(|a| Circle::new((*a, row.clone()), 4, COLOURS[0].mix(0.7).filled())))?;
        chart.draw_series([EmptyElement::at((mean, row)) + Rectangle::new([(-2, -9), (2, 9)], BLACK.filled())])?;
    }
    Ok(root.present()?)
}

/// A plot with a title, a legend, and one panel per method that estimates weights, two in a row.
fn panels(
    outcomes: &[Outcome<'_>],
    path: &Path,
    title: &str,
    legend: &[(&str, RGBColor)],
    panel: impl Fn(&Area<'_>, &Outcome<'_>, &[(&str, RGBColor)]) -> Result<()>,
) -> Result<()> {
    let outcomes: Vec<&Outcome<'_>> = outcomes
        .iter()
        .filter(|outcome| !matches!(outcome.method.weights, Weights::Only(_) | Weights::Uniform))
        .collect();
    let rows = outcomes.len().div_ceil(2);
    let root = SVGBackend::new(path, (WIDTH, HEADER as u32 + PANEL_HEIGHT * rows as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    let (header, body) = root.split_vertically(HEADER);
    header.draw(&Text::new(title.to_owned(), (14, 8), (FONT, 20)))?;
    let mut x = 14;
    for (name, colour) in legend {
        header.draw(&Rectangle::new([(x, 36), (x + 14, 50)], colour.filled()))?;
        header.draw(&Text::new((*name).to_owned(), (x + 20, 35), (FONT, 15)))?;
        x += 50 + 9 * name.len() as i32;
    }
    for (area, outcome) in body.split_evenly((rows, 2)).iter().zip(outcomes) {
        panel(area, outcome, legend)?;
    }
    Ok(root.present()?)
}

fn weights(area: &Area<'_>, outcome: &Outcome<'_>, legend: &[(&str, RGBColor)]) -> Result<()> {
    let over: Vec<Vec<f64>> = (0..outcome.epochs()).map(|epoch| outcome.weights(epoch)).collect();
    let mut chart = ChartBuilder::on(area)
        .caption(&outcome.method.name, (FONT, 16))
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d(1.0..over.len().max(2) as f64, 0.0..1.0)?;
    // The sum of all weights first; each smaller sum is drawn over it.
    for (k, (_, colour)) in legend.iter().enumerate().rev() {
        let sum = |(epoch, weights): (usize, &Vec<f64>)| (epoch as f64 + 1.0, weights[..=k].iter().sum());
        let points: Vec<(f64, f64)> = over.iter().enumerate().map(sum).collect();
        chart.draw_series(AreaSeries::new(points, 0.0, colour.filled()).border_style(WHITE))?;
    }
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("epoch")
        .x_label_formatter(&|epoch| format!("{epoch:.0}"))
        .y_label_formatter(&|weight| format!("{weight:.1}"))
        .label_style((FONT, 13))
        .draw()?;
    Ok(())
}

fn ogr(area: &Area<'_>, outcome: &Outcome<'_>, legend: &[(&str, RGBColor)]) -> Result<()> {
    let mut lines = vec![Vec::new(); legend.len()];
    for epoch in 0..outcome.epochs() {
        let Some(ratios) = outcome.ogr(epoch) else { continue };
        let values = ratios.losses.into_iter().chain([ratios.blend, ratios.uniform]);
        // A logarithmic axis has no place for other values.
        for (line, value) in lines.iter_mut().zip(values).filter(|(_, value)| value.is_finite() && *value > 0.0) {
            line.push((epoch as f64 + 1.0, value));
        }
    }
    let values = || lines.iter().flatten().map(|(_, value)| *value);
    let low = values().fold(f64::INFINITY, f64::min).min(1.0);
    let high = values().fold(0.0, f64::max).max(low * 10.0);
    let mut chart = ChartBuilder::on(area)
        .caption(&outcome.method.name, (FONT, 16))
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(56)
        .build_cartesian_2d(1.0..outcome.epochs().max(2) as f64, (low / 1.3..high * 1.3).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .y_labels(4)
        .x_desc("epoch")
        .x_label_formatter(&|epoch| format!("{epoch:.0}"))
        .y_label_formatter(&|ratio| format!("{ratio}"))
        .label_style((FONT, 13))
        .draw()?;
    for (line, (_, colour)) in lines.into_iter().zip(legend) {
        chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
    }
    Ok(())
}
