//! How many times gradblend's time each peer takes for the step of a network.

use anyhow::Result;
use plotters::prelude::*;

use crate::axes::{Axis, Scale, grid, text};
use crate::figures::{Figures, distinct};
use crate::plots::{GREY, LETTERS, Look, WIDTH, sheet, width};
use crate::raw::Role;
use crate::table::times;

pub(crate) const TITLE: &str = "Speed-up of a step over other ways, by network";
const BAR: i32 = 18;
const GAP: i32 = 16;
const AXIS: i32 = 64;

struct Group<'a> {
    case: &'a str,
    bars: Vec<(&'a str, f64)>,
}

pub(crate) fn draw(figures: &Figures) -> Result<Option<String>> {
    let peers = figures.names(Role::Peer);
    let mut groups: Vec<Group<'_>> = Vec::new();
    for row in figures.models("step") {
        let bar = |name: &&'_ str| Some((peers[peers.iter().position(|peer| peer == name)?], row.find(name)?.over?));
        let bars: Vec<_> = peers.iter().filter_map(bar).collect();
        if !bars.is_empty() {
            groups.push(Group { case: &row.case.case, bars });
        }
    }
    if groups.is_empty() {
        return Ok(None);
    }
    let look = |name: &str| Look::at(peers.iter().position(|peer| *peer == name).unwrap_or(0)).bar();
    let shown = distinct(groups.iter().flat_map(|group| &group.bars).map(|(name, _)| *name));
    let legend: Vec<(String, Look)> =
        peers.iter().filter(|peer| shown.contains(peer)).map(|peer| ((*peer).to_owned(), look(peer))).collect();
    let values = || groups.iter().flat_map(|group| &group.bars).map(|(_, value)| *value);
    // Room for the numbers at the bars' ends.
    let low = values().fold(1.0, f64::min);
    let low = if low < 1.0 { low / 1.5 } else { 0.9 };
    let high = values().fold(2.0, f64::max);
    let high = high * (high / low).powf(0.08);
    let lines: i32 = groups.iter().map(|group| group.bars.len() as i32 * BAR + GAP).sum::<i32>() + GAP;
    let left = groups.iter().map(|group| width(group.case, LETTERS)).max().unwrap_or(0) + 24;
    let svg = sheet(TITLE, figures, &legend, (lines + AXIS) as u32, |root, top| {
        let bottom = top + lines;
        let scale = Scale::log((low, high), (left, WIDTH as i32 - 20));
        let label = |value: f64| format!("{value}x");
        let x = Axis { scale, name: "gradblend is so many times as fast", label: &label, ticks: 12 };
        grid(root, &x, None, (top, bottom))?;
        let mut y = top + GAP;
        for group in &groups {
            text(root, group.case, (left - 8, y + group.bars.len() as i32 * BAR / 2), true)?;
            for (name, value) in &group.bars {
                let (from, to) = (x.scale.at(value.min(1.0)), x.scale.at(value.max(1.0)));
                root.draw(&Rectangle::new([(from, y + 1), (to, y + BAR - 2)], look(name).colour().filled()))?;
                text(root, &format!("{}x", times(*value)), (to + 5, y + BAR / 2), false)?;
                y += BAR;
            }
            y += GAP;
        }
        Look::with(0, GREY, 2).line(root, &[(x.scale.at(1.0), top), (x.scale.at(1.0), bottom)])
    })?;
    Ok(Some(svg))
}
