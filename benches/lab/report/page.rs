//! The page of a file: where it was measured, and all its rows.

use crate::figures::{Contender, Figures, OURS, Spread, distinct};
use crate::plots::Plot;
use crate::raw::{Role, Run, Skipped, Time};
use crate::table::{Table, bytes, digits, plus_minus, share, short, times};

pub(crate) fn page(stem: &str, figures: &Figures, plots: &[Plot]) -> String {
    let mut page = format!("# {stem}\n\n{}\n", head(&figures.runs));
    page += &format!(
        "The *limit* moves the bytes and does nothing else, the faster of the ways tried; GB/s are those bytes over the median time; *share* is \
         the limit's\ntime over gradblend's, compared turn by turn, the median; `x NAME` is how many times gradblend's \
         time NAME takes, medians\nof one run. ± is half the interquartile range of the times, in percent of the \
         median.{}\n\n",
        if figures.runs.len() > 1 {
            " Whoever was timed in\na run of its own is compared with gradblend there."
        } else {
            ""
        }
    );
    for plot in plots {
        page += &match &plot.svg {
            Ok(_) => format!("![{}]({})\n\n", plot.title, plot.file(stem).replace(' ', "%20")),
            Err(reason) => format!("No plot of {}: {reason}.\n\n", plot.name),
        };
    }
    page += &section("Speed", "", &speed(figures));
    page += &section(
        "Accuracy",
        "Largest |computed - exact| over the sum of absolute terms; *near*: t is close to g, so that d cancels.\n\n",
        &accuracy(figures),
    );
    page += &section(
        "Memory and calls",
        "Memory beside the lists, at its peak; launches and allocations of one call; the host's time for one, median.\n\n",
        &memory(figures),
    );
    page += &skipped(figures);
    page.trim_end().to_owned() + "\n"
}

fn section(title: &str, text: &str, table: &Table) -> String {
    if table.is_empty() { String::new() } else { format!("## {title}\n\n{text}{}\n", table.markdown()) }
}

fn head(runs: &[Run]) -> String {
    let name = runs.first().map_or("", |run| run.name.as_str());
    let driver = runs.iter().find_map(|run| run.driver.as_ref()).map(|driver| format!(", driver {driver}"));
    let cache = runs.iter().find_map(|run| run.cache_bytes).map(|size| bytes(size as f64));
    let cache = cache.map(|size| format!(", second-level cache {size}"));
    let mut head = format!("- Device: {name}{}{}\n", driver.unwrap_or_default(), cache.unwrap_or_default());
    for run in runs {
        let software = run.software.as_ref().map_or(String::new(), |software| format!("; {software}"));
        head += &format!("- `{}`: {}, commit {}{software}\n", run.command, run.date, short(&run.commit));
    }
    head
}

fn speed(figures: &Figures) -> Table {
    let (ours, peers) = (figures.names(Role::Ours), figures.names(Role::Peer));
    let mut header = ["operation", "case", "bytes", "limit GB/s", "gradblend GB/s", "share"].map(String::from).to_vec();
    header.extend(peers.iter().chain(&ours).map(|name| format!("x {name}")));
    let mut table = Table::new(2, header);
    for row in &figures.rows {
        let bandwidth = |time: &Spread| digits(row.bandwidth(time));
        let limit = row.limit().map(|(limit, time)| format!("{} ({})", bandwidth(&time), limit.raw.contender));
        let measured = row.ours().and_then(|ours| ours.time);
        let mut cells = vec![
            Some(row.case.operation.clone()),
            Some(row.case.case.clone()),
            Some(bytes(row.case.bytes as f64)),
            limit,
            measured.map(|time| format!("{} {}", bandwidth(&time), plus_minus(&time))),
            row.share().map(|spread| share(&spread)),
        ];
        cells.extend(peers.iter().map(|name| row.find(name)?.over.map(times)));
        cells.extend(ours.iter().map(|name| row.find(name)?.over.map(digits)));
        table.add(cells);
    }
    table
}

/// The near cases and, for each dtype, the longest flat one.
fn accuracy(figures: &Figures) -> Table {
    let names = [vec![OURS], figures.names(Role::Ours), figures.names(Role::Peer)].concat();
    let header = ["operation", "case", "error of"].into_iter().chain(names.iter().copied()).map(String::from);
    let mut table = Table::new(3, header.collect());
    let errors = |time: &Time| [time.error_c, time.error_d, time.error_blend];
    for operation in figures.operations() {
        let near = figures.rows.iter().filter(|row| row.is(operation) && row.case.near);
        for row in figures.longest(operation).into_iter().chain(near) {
            for (place, what) in ["c", "d", "blend"].into_iter().enumerate() {
                let of = |name: &&str| errors(&row.find(name)?.raw)[place].map(|error| format!("{error:.1e}"));
                let cells: Vec<Option<String>> = names.iter().map(of).collect();
                if cells.iter().any(Option::is_some) {
                    let names = [operation, &row.case.case, what].map(|name| Some(name.to_owned()));
                    table.add(names.into_iter().chain(cells).collect());
                }
            }
        }
    }
    table
}

/// The longest flat list, and of each network the list that comes first.
fn memory(figures: &Figures) -> Table {
    let header = ["operation", "case", "contender", "memory", "launches", "allocations", "host µs"];
    let mut table = Table::new(3, header.map(String::from).to_vec());
    for operation in figures.operations() {
        let flat = figures.longest(operation).into_iter().max_by_key(|row| row.case.bytes);
        for row in flat.into_iter().chain(figures.networks(operation)) {
            for Contender { raw, .. } in row.contenders.iter().filter(|contender| contender.raw.role != Role::Limit) {
                let host = Spread::of(raw.host_ns.iter().flatten().copied().flatten());
                let cells = [
                    raw.extra_bytes.map(|size| bytes(size as f64)),
                    raw.launches.map(|count| count.to_string()),
                    raw.allocations.map(|count| count.to_string()),
                    host.map(|host| digits(host.middle / 1000.0)),
                ];
                if cells.iter().any(Option::is_some) {
                    let names = [operation, &row.case.case, &raw.contender].map(|name| Some(name.to_owned()));
                    table.add(names.into_iter().chain(cells).collect());
                }
            }
        }
    }
    table
}

/// One line for each contender and reason; in it, cases of the same operations together.
fn skipped(figures: &Figures) -> String {
    let all = || figures.skipped.iter().map(|(who, skipped)| (who.as_str(), skipped));
    let mut lines = String::new();
    let mut seen = Vec::new();
    for (contender, Skipped { reason, .. }) in all() {
        if seen.contains(&(contender, reason)) {
            continue;
        }
        seen.push((contender, reason));
        let like = || all().filter(|(other, it)| (*other, &it.reason) == (contender, reason)).map(|(_, it)| it);
        let operations = |case: &str| {
            let same = like().filter(|it| it.case == case);
            distinct(same.map(|it| it.operation.as_str())).join(", ")
        };
        let cases = distinct(like().map(|it| it.case.as_str()));
        let sets: Vec<String> = cases.iter().map(|case| operations(case)).collect();
        let texts = distinct(sets.iter().map(String::as_str)).into_iter().map(|set| {
            let of: Vec<&str> =
                cases.iter().zip(&sets).filter(|(_, other)| *other == set).map(|(case, _)| *case).collect();
            format!("{} ({set})", of.join(", "))
        });
        lines += &format!("- {contender}, {reason}: {}\n", texts.collect::<Vec<_>>().join("; "));
    }
    if lines.is_empty() { lines } else { format!("## Not measured\n\n{lines}") }
}

/// The columns of the README: fewer rows, no contenders of ours.
pub(crate) fn summary(figures: &Figures) -> Table {
    let peers = figures.names(Role::Peer);
    let header = ["operation", "case", "limit", OURS, "share of the limit"].map(String::from).to_vec();
    let mut table = Table::new(2, header.into_iter().chain(peers.iter().map(|name| format!("over {name}"))).collect());
    for operation in figures.operations() {
        let mut rows = figures.longest(operation);
        rows.retain(|row| ["f32", "bf16"].contains(&row.case.dtype.as_str()));
        rows.extend(figures.networks(operation));
        for row in rows {
            let bandwidth = |time: &Spread| format!("{} GB/s", digits(row.bandwidth(time)));
            let measured = row.ours().and_then(|ours| ours.time);
            let mut cells = vec![
                Some(format!("`{operation}`")),
                Some(row.case.case.clone()),
                row.limit().map(|(_, time)| bandwidth(&time)),
                measured.map(|time| format!("{} {}", bandwidth(&time), plus_minus(&time))),
                row.share().map(|spread| share(&spread)),
            ];
            cells.extend(peers.iter().map(|name| row.find(name)?.over.map(|over| times(over) + "x")));
            table.add(cells);
        }
    }
    table
}
