//! The six views of the Multiple Features digits.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use csv::{ReaderBuilder, StringRecord};
use flate2::read::GzDecoder;

use crate::common::statistics::deviation;
use crate::data::CLASSES;

/// The views: how the data set calls them, and what they are.
pub(crate) const VIEWS: [(&str, &str); 6] = [
    ("fac", "profile correlations"),
    ("fou", "Fourier coefficients"),
    ("kar", "Karhunen-Loeve coefficients"),
    ("mor", "morphological features"),
    ("pix", "pixel averages"),
    ("zer", "Zernike moments"),
];

/// The same digits in several views.
pub(crate) struct Views {
    pub(crate) views: Vec<View>,
    pub(crate) labels: Vec<usize>,
}

/// One view of all digits.
pub(crate) struct View {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    /// The features of each digit.
    pub(crate) rows: Vec<Vec<f32>>,
    /// The standard deviation of each feature.
    pub(crate) deviations: Vec<f32>,
}

/// The file of a view.
pub(crate) fn path(folder: &Path, view: &str) -> PathBuf {
    folder.join(format!("mfeat-{view}.csv.gz"))
}

/// Reads the views with these names, in this order.
pub(crate) fn read_views(folder: &Path, wanted: &[(&'static str, &'static str)]) -> Result<Views> {
    let (mut views, mut first) = (Vec::new(), None);
    for &(name, about) in wanted {
        let path = path(folder, name);
        let context = || format!("cannot read the view {}", path.display());
        let (rows, labels) = read(&path).with_context(context)?;
        let labels_of_all = first.get_or_insert_with(|| labels.clone());
        let digits = labels_of_all.len();
        let same = labels_of_all.iter().zip(&labels).take_while(|(a, b)| a == b).count();
        // The first line has the names of the columns.
        ensure!(
            same == digits && labels.len() == digits,
            "{}: line {} is not the digit that it is in the view {}",
            path.display(),
            same + 2,
            wanted[0].0
        );
        let column = |i: usize| rows.iter().map(|row| f64::from(row[i])).collect::<Vec<_>>();
        let deviations = (0..rows[0].len()).map(|i| deviation(&column(i)) as f32).collect();
        views.push(View { name, about, rows, deviations });
    }
    Ok(Views { views, labels: first.context("there is no view")? })
}

/// Features and label of each digit of a file.
fn read(path: &Path) -> Result<(Vec<Vec<f32>>, Vec<usize>)> {
    let mut reader = ReaderBuilder::new().from_reader(GzDecoder::new(File::open(path)?));
    let (mut rows, mut labels) = (Vec::new(), Vec::new());
    for record in reader.records() {
        let record = record?;
        let line = record.position().map_or(0, csv::Position::line);
        let (row, label) = parse(&record).with_context(|| format!("line {line}"))?;
        rows.push(row);
        labels.push(label);
    }
    ensure!(!rows.is_empty(), "there is no digit");
    Ok((rows, labels))
}

fn parse(record: &StringRecord) -> Result<(Vec<f32>, usize)> {
    let fields: Vec<&str> = record.iter().collect();
    let (label, features) = fields.split_last().filter(|(_, features)| !features.is_empty()).context("no feature")?;
    let number = |(i, text): (usize, &&str)| {
        let value = text.trim().parse().ok().filter(|value: &f32| value.is_finite());
        value.with_context(|| format!("field {} is {text:?}, expected a number", i + 1))
    };
    let label = label.trim().parse().ok().filter(|label| *label < CLASSES);
    let label = label.with_context(|| format!("the label is {:?}, expected 0 to 9", fields[features.len()]))?;
    Ok((features.iter().enumerate().map(number).collect::<Result<_>>()?, label))
}
