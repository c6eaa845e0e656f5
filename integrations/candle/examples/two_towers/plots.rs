//! The frontier: matching against knowledge inside a modality.

use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use crate::common::drawing::{Area, COLOURS, FONT, GREY, HEADER, header};
use crate::report::{KNOWLEDGE, Row, Summary};

const PANEL: (u32, u32) = (480, 440);
const LINE: u32 = 18;

/// Draws a panel for each of `KNOWLEDGE`.
pub(crate) fn frontier(summary: &Summary, path: &Path) -> Result<()> {
    let others: Vec<&Row> = summary.methods.iter().filter(|row| row.fixed.is_none()).collect();
    let colour = |i: usize| COLOURS[1 + i % (COLOURS.len() - 1)];
    let mut legend = vec![("fixed weights", GREY)];
    legend.extend(others.iter().enumerate().map(|(i, row)| (&row.name[..], colour(i))));
    let text = LINE * others.len() as u32 + 10;
    let size = (PANEL.0 * KNOWLEDGE.len() as u32, HEADER + PANEL.1 + text);
    let root = SVGBackend::new(path, size).into_drawing_area();
    let title = "Matching against knowledge inside a modality: test recall@1 and 5-nearest-neighbour accuracy, means over \
                 seeds; labels: the fixed weight of matching";
    let body = header(&root, title, &legend)?;
    for (knowledge, area) in body.split_evenly((1, KNOWLEDGE.len())).iter().enumerate() {
        let (chart, below) = area.split_vertically(PANEL.1);
        panel(&chart, summary, &others, knowledge, colour)?;
        for (verdict, y) in summary.verdicts(knowledge).into_iter().zip((0..).step_by(LINE as usize)) {
            below.draw(&Text::new(verdict, (12, y), (FONT, 11)))?;
        }
    }
    Ok(root.present()?)
}

fn panel(
    area: &Area<'_>,
    summary: &Summary,
    others: &[&Row],
    knowledge: usize,
    colour: impl Fn(usize) -> RGBColor,
) -> Result<()> {
    let points = || summary.methods.iter().map(|row| row.point(knowledge));
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((1.0, 0.0), |(low, high), v| (f64::min(low, v), f64::max(high, v)));
        let margin = 0.08 * (high - low).max(0.02);
        low - margin..high + margin
    };
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{} against matching", KNOWLEDGE[knowledge]), (FONT, 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(range(&mut points().map(|p| p.0)), range(&mut points().map(|p| p.1)))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(6)
        .x_label_formatter(&|value| format!("{value:.2}"))
        .y_label_formatter(&|value| format!("{value:.3}"))
        .x_desc("recall@1")
        .y_desc(KNOWLEDGE[knowledge])
        .label_style((FONT, 13))
        .draw()?;
    let mut curve: Vec<(f64, &Row)> = summary.methods.iter().filter_map(|row| Some((row.fixed?, row))).collect();
    curve.sort_by(|a, b| a.0.total_cmp(&b.0));
    chart.draw_series(LineSeries::new(curve.iter().map(|(_, row)| row.point(knowledge)), GREY.stroke_width(1)))?;
    let label = |(weight, row): &(f64, &Row)| {
        let text = Text::new(format!("{weight:.2}"), (6, -12), (FONT, 12));
        EmptyElement::at(row.point(knowledge)) + Circle::new((0, 0), 4, GREY.filled()) + text
    };
    chart.draw_series(curve.iter().map(label))?;
    for (i, row) in others.iter().enumerate() {
        chart.draw_series([Circle::new(row.point(knowledge), 6, colour(i).filled())])?;
    }
    Ok(())
}
