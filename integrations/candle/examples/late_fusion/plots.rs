//! Plots as SVG: accuracy, and the figures of the paper's story for these data, by their numbers.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use crate::common::drawing::{Area, COLOURS, FONT, GREY, HEADER, header};
use crate::common::statistics::{deviation, mean};
use crate::common::weights::Weights;
use crate::methods::{Case, OF_MIXTURES};
use crate::report::{Mixture, Outcome, Summary, best};

const PANEL: (u32, u32) = (400, 230);

/// The files that are drawn.
pub(crate) fn names(mixtures: bool) -> &'static [&'static str] {
    if mixtures { &["mixtures.svg"] } else { &["accuracy.svg", "best_single.svg", "ogr.svg", "weights.svg"] }
}

/// Draws all plots but that of mixtures.
pub(crate) fn draw(cases: &[Case], outcomes: &[Outcome<'_>], summary: &Summary, folder: &Path) -> Result<()> {
    let [all, single, ratios, over_time] = names(false) else { return Ok(()) };
    accuracy(cases, outcomes, &folder.join(all))?;
    best_single(cases, summary, &folder.join(single))?;
    let figure = "Figure 1.3: overfitting-to-generalisation ratio (OGR) of each loss, median over seeds";
    panels(cases, outcomes, &folder.join(ratios), figure, &[("blend", BLACK), ("uniform weights", GREY)], ogr)?;
    let figure = "Figure 1.6: weights at the ends of super-epochs, mean over seeds, stacked";
    panels(cases, outcomes, &folder.join(over_time), figure, &[], weights)
}

/// The colour of a loss: the fused one has the first.
fn colour(name: &str, losses: &[&str]) -> RGBColor {
    let k = losses.iter().position(|other| *other == name).unwrap_or_default();
    if name == "fused" { COLOURS[0] } else { COLOURS[1 + k % (COLOURS.len() - 1)] }
}

/// The names of all losses, the fused one last.
fn losses(cases: &[Case]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for name in cases.iter().flat_map(|case| &case.modalities).filter(|name| *name != "fused") {
        if !names.contains(&&name[..]) {
            names.push(name);
        }
    }
    names.push("fused");
    names
}

/// Values of several rows: dots, their mean as a bar, one standard deviation as a line.
fn dots(area: &Area<'_>, title: &str, rows: &[(String, Vec<f64>)], range: (f64, f64), labels: u32) -> Result<()> {
    let count = rows.len() as i32;
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 16))
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(labels)
        .build_cartesian_2d((range.0 - 0.02).max(0.0)..(range.1 + 0.02).min(1.0), (0..count - 1).into_segmented())?;
    let names: Vec<&str> = rows.iter().map(|(name, _)| &name[..]).collect();
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_labels(5)
        .y_labels(rows.len())
        .y_label_formatter(&|row| name_of(row, &names))
        .x_label_formatter(&|accuracy| format!("{accuracy:.2}"))
        .x_desc("test accuracy")
        .label_style((FONT, 13))
        .draw()?;
    for (row, (_, values)) in (0..count).rev().zip(rows) {
        let row = SegmentValue::CenterOf(row);
        let (mean, deviation) = (mean(values), deviation(values));
        if deviation.is_finite() {
            let ends = [(mean - deviation, row.clone()), (mean + deviation, row.clone())];
            chart.draw_series([PathElement::new(ends, GREY.stroke_width(2))])?;
        }
        chart.draw_series(values.iter().map(|a| Circle::new((*a, row.clone()), 3, COLOURS[0].mix(0.6).filled())))?;
        chart.draw_series([EmptyElement::at((mean, row)) + Rectangle::new([(-2, -8), (2, 8)], BLACK.filled())])?;
    }
    Ok(())
}

/// The name of a row. Rows count from the bottom; the first name is at the top.
fn name_of(row: &SegmentValue<i32>, names: &[&str]) -> String {
    match row {
        SegmentValue::CenterOf(row) | SegmentValue::Exact(row) => {
            names.get((names.len() as i32 - 1 - row) as usize).map_or(String::new(), |name| (*name).to_owned())
        }
        SegmentValue::Last => String::new(),
    }
}

/// The least and the greatest value.
fn range<'a>(values: impl Iterator<Item = &'a f64>) -> (f64, f64) {
    values.fold((1.0, 0.0), |(low, high), a| (f64::min(low, *a), f64::max(high, *a)))
}

fn accuracy(cases: &[Case], outcomes: &[Outcome<'_>], path: &Path) -> Result<()> {
    let rows = cases.iter().map(|case| case.methods.len()).max().unwrap_or_default() as u32;
    let size = (520 * cases.len() as u32, HEADER + 26 * rows + 90);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let title = "Test accuracy: seeds (dots), mean (bar), one standard deviation (line)";
    let body = header(&root, title, &[])?;
    for (area, case) in body.split_evenly((1, cases.len())).iter().zip(cases) {
        let of_case = outcomes.iter().filter(|outcome| std::ptr::eq(outcome.case, case));
        let rows: Vec<_> = of_case.map(|outcome| (outcome.method.name.clone(), outcome.accuracy())).collect();
        dots(area, &case.name, &rows, range(rows.iter().flat_map(|(_, values)| values)), 220)?;
    }
    Ok(root.present()?)
}

/// The best single modality against the network on all of them.
fn best_single(cases: &[Case], summary: &Summary, path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, (520 * cases.len() as u32, HEADER + 240)).into_drawing_area();
    let body = header(&root, "Figure 1.2: the fused loss alone (naive) against the best single modality", &[])?;
    for (area, case) in body.split_evenly((1, cases.len())).iter().zip(cases) {
        let alone = summary.methods.iter().filter(|row| row.data == case.name && row.name.starts_with("alone:"));
        let others = OF_MIXTURES.iter().filter_map(|method| summary.row(&case.name, method));
        let rows: Vec<_> =
            best(alone).into_iter().chain(others).map(|row| (row.name.clone(), row.accuracy.clone())).collect();
        dots(area, &case.name, &rows, range(rows.iter().flat_map(|(_, values)| values)), 160)?;
    }
    Ok(root.present()?)
}

/// Draws every mixture.
pub(crate) fn mixtures(summary: &Summary, folder: &Path) -> Result<()> {
    let mixtures = summary.mixtures();
    let size = (1000, HEADER + 20 * mixtures.len() as u32 + 80);
    let path = folder.join(names(true)[0]);
    let root = SVGBackend::new(&path, size).into_drawing_area();
    let series = ["best single modality"].into_iter().chain(OF_MIXTURES);
    let colours = [GREY, COLOURS[1], COLOURS[0], COLOURS[2], COLOURS[3]];
    let legend: Vec<(&str, RGBColor)> = series.zip(colours).collect();
    let body = header(&root, "Figure 1.7: every mixture of modalities, mean test accuracy over seeds", &legend)?;
    let of_mixture = |mixture: &Mixture<'_>| {
        let rows = [mixture.best].into_iter().chain(mixture.methods);
        rows.map(|row| mean(&row.accuracy)).collect()
    };
    let values: Vec<Vec<f64>> = mixtures.iter().map(of_mixture).collect();
    let (low, high) = range(values.iter().flatten());
    let count = mixtures.len() as i32;
    let mut chart = ChartBuilder::on(&body)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(210)
        .build_cartesian_2d((low - 0.01).max(0.0)..(high + 0.01).min(1.0), (0..count - 1).into_segmented())?;
    let names: Vec<&str> = mixtures.iter().map(|mixture| mixture.name).collect();
    chart
        .configure_mesh()
        .y_labels(mixtures.len())
        .y_label_formatter(&|row| name_of(row, &names))
        .x_label_formatter(&|accuracy| format!("{accuracy:.2}"))
        .x_desc("test accuracy")
        .label_style((FONT, 13))
        .draw()?;
    for (row, values) in (0..count).rev().zip(&values) {
        for (value, colour) in values.iter().zip(colours) {
            chart.draw_series([Circle::new((*value, SegmentValue::CenterOf(row)), 5, colour.filled())])?;
        }
    }
    Ok(root.present()?)
}

/// A title, a legend, and one panel per method whose weights change and per case.
fn panels(
    cases: &[Case],
    outcomes: &[Outcome<'_>],
    path: &Path,
    title: &str,
    further: &[(&str, RGBColor)],
    panel: fn(&Area<'_>, &Outcome<'_>, &[&str]) -> Result<()>,
) -> Result<()> {
    let losses = losses(cases);
    let mut legend: Vec<(&str, RGBColor)> = losses.iter().map(|name| (*name, colour(name, &losses))).collect();
    legend.extend(further);
    let changes = |outcome: &&Outcome<'_>| match outcome.method.weights {
        Weights::Fixed(_) | Weights::MmPareto => false,
        // It has no ratios.
        Weights::GradNorm => further.is_empty(),
        _ => true,
    };
    // Of each case the same number.
    let outcomes: Vec<&Outcome<'_>> = outcomes.iter().filter(changes).collect();
    let rows = outcomes.len() / cases.len();
    let size = (PANEL.0 * cases.len().max(2) as u32, HEADER + PANEL.1 * rows as u32);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let body = header(&root, title, &legend)?;
    for (area, i) in body.split_evenly((rows, cases.len())).iter().zip(0..) {
        panel(area, outcomes[i % cases.len() * rows + i / cases.len()], &losses)?;
    }
    Ok(root.present()?)
}

/// The name of a method and its case.
fn caption(outcome: &Outcome<'_>) -> String {
    format!("{}, {}", outcome.method.name, outcome.case.name)
}

fn weights(area: &Area<'_>, outcome: &Outcome<'_>, losses: &[&str]) -> Result<()> {
    let ends = outcome.epochs();
    let last = ends.last().copied().unwrap_or(1.0);
    let over: Vec<Vec<f64>> = (0..ends.len()).map(|nth| outcome.weights(nth)).collect();
    let mut chart = ChartBuilder::on(area)
        .caption(caption(outcome), (FONT, 14))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(40)
        .build_cartesian_2d(0.0..last, 0.0..1.0)?;
    // The sum of all weights first; each smaller sum is drawn over it.
    for (k, name) in outcome.case.modalities.iter().enumerate().rev() {
        let sums = over.iter().enumerate().flat_map(|(nth, weights)| {
            let sum = weights[..=k].iter().sum::<f64>();
            [(if nth == 0 { 0.0 } else { ends[nth - 1] }, sum), (ends[nth], sum)]
        });
        chart.draw_series(AreaSeries::new(sums, 0.0, colour(name, losses).filled()))?;
    }
    chart.draw_series(ends.iter().map(|end| PathElement::new([(*end, 0.0), (*end, 1.0)], WHITE.mix(0.6))))?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("epoch")
        .x_label_formatter(&|epoch| format!("{epoch:.0}"))
        .y_label_formatter(&|weight| format!("{weight:.1}"))
        .label_style((FONT, 12))
        .draw()?;
    Ok(())
}

fn ogr(area: &Area<'_>, outcome: &Outcome<'_>, losses: &[&str]) -> Result<()> {
    let of_case = outcome.case.modalities.iter().map(|name| colour(name, losses)).chain([BLACK, GREY]);
    let mut lines: Vec<(RGBColor, Vec<(f64, f64)>)> = of_case.map(|colour| (colour, Vec::new())).collect();
    let ends = outcome.epochs();
    for (nth, end) in ends.iter().enumerate() {
        let Some(ratios) = outcome.ogr(nth) else { continue };
        let values = ratios.losses.into_iter().chain([ratios.blend, ratios.uniform]);
        // A logarithmic axis has no place for other values.
        for ((_, line), value) in lines.iter_mut().zip(values).filter(|(_, value)| value.is_finite() && *value > 0.0) {
            line.push((*end, value));
        }
    }
    let values = || lines.iter().flat_map(|(_, line)| line).map(|(_, value)| *value);
    let low = values().fold(f64::INFINITY, f64::min).min(1.0);
    let high = values().fold(0.0, f64::max).max(low * 10.0);
    let mut chart = ChartBuilder::on(area)
        .caption(caption(outcome), (FONT, 14))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..ends.last().copied().unwrap_or(1.0), (low / 1.3..high * 1.3).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .y_labels(4)
        .x_desc("epoch")
        .x_label_formatter(&|epoch| format!("{epoch:.0}"))
        .y_label_formatter(&|ratio| format!("{ratio}"))
        .label_style((FONT, 12))
        .draw()?;
    for (colour, line) in lines {
        chart.draw_series(line.iter().map(|point| Circle::new(*point, 2, colour.filled())))?;
        chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
    }
    Ok(())
}
