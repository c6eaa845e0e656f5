//! The block of the README that a file fills.

use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail, ensure};

use crate::figures::Figures;
use crate::page::summary;
use crate::plots::Plot;
use crate::table::caption;

const END: &str = "<!-- report: end -->";

const BEGIN: [&str; 2] = ["<!-- report: begin ", " -->"];

/// The files whose blocks a README has.
pub(crate) fn stems(readme: &str) -> Vec<&str> {
    let [start, end] = BEGIN;
    readme.lines().filter_map(|line| line.trim().strip_prefix(start)?.strip_suffix(end)).collect()
}

/// `readme` with the text between the markers of `stem` replaced, and all else as it was.
pub(crate) fn replace(readme: &str, stem: &str, block: &str) -> Result<String> {
    let begin = BEGIN.join(stem);
    let mut place = 0;
    let mut inside = None;
    for line in readme.split_inclusive('\n') {
        let text = line.trim();
        match inside {
            None if text == begin => inside = Some(place + line.len()),
            Some(start) if text == END => return Ok([&readme[..start], block, &readme[place..]].concat()),
            _ => {}
        }
        place += line.len();
    }
    ensure!(inside.is_some(), "the README has no line {begin}");
    bail!("the README has no line {END} after {begin}")
}

/// A line about the machine, a short table, the plots. `folder` is where the pages are, seen from the README.
pub(crate) fn block(stem: &str, figures: &Figures, plots: &[Plot], folder: &str) -> String {
    let link = |file: &str| format!("{folder}{file}").replace(' ', "%20");
    let mut block = format!("{} ([all rows]({})):\n\n", caption(&figures.runs), link(&format!("{stem}.md")));
    block += &summary(figures).markdown();
    for plot in plots.iter().filter(|plot| plot.svg.is_ok()) {
        block += &format!("\n![{}]({})\n", plot.title, link(&plot.file(stem)));
    }
    block
}

/// The way from one folder to another, with a slash at its end.
pub(crate) fn way(from: &Path, to: &Path) -> Result<String> {
    let (from, to) = (whole(from)?, whole(to)?);
    let (from, to): (Vec<Component>, Vec<Component>) = (from.components().collect(), to.components().collect());
    let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = from[shared..].iter().map(|_| "../".to_owned());
    let down = to[shared..].iter().map(|part| format!("{}/", part.as_os_str().to_string_lossy()));
    Ok(up.chain(down).collect())
}

/// A folder that is yet to be made has no canonical path; its parent may.
pub(crate) fn whole(path: &Path) -> Result<PathBuf> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    if let Ok(whole) = path.canonicalize() {
        return Ok(whole);
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(whole(parent)?.join(name)),
        _ => Ok(std::path::absolute(path)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_changes() -> Result<()> {
        let readme = "a\n<!-- report: begin other -->\nx\n<!-- report: end -->\n\
                      <!-- report: begin cpu -->\nold\n\nold\n<!-- report: end -->\nb";
        let new = replace(readme, "cpu", "new\n")?;
        assert_eq!(new, readme.replace("old\n\nold\n", "new\n"));
        assert_eq!(replace(&new, "cpu", "new\n")?, new);
        assert!(replace(readme, "gpu", "new\n").is_err());
        assert!(replace("<!-- report: begin cpu -->\n", "cpu", "new\n").is_err());
        assert_eq!(stems(readme), ["other", "cpu"]);
        Ok(())
    }

    #[test]
    fn ways_between_folders() -> Result<()> {
        assert_eq!(way(Path::new(""), Path::new("benches/results"))?, "benches/results/");
        assert_eq!(way(Path::new("not/there"), Path::new("not/here/either"))?, "../here/either/");
        assert_eq!(way(Path::new("."), Path::new("./"))?, "");
        Ok(())
    }
}
