//! Statistics over seeds, and tables of them.

use comfy_table::{Row, Table, presets};

/// A table that is Markdown too.
pub(crate) fn table(header: impl Into<Row>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    table
}

pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard deviation of a sample; NaN for fewer than two values.
pub(crate) fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0)).sqrt()
}

/// Mean and standard deviation as text. One seed has no deviation.
pub(crate) fn spread(values: &[f64]) -> String {
    format!("{:.3}{}", mean(values), plus_minus(deviation(values)))
}

/// Mean of the differences and its standard error, as text, seed by seed: all methods of a seed share its samples, whose
/// spread so cancels. Empty where nothing differs.
pub(crate) fn paired(values: &[f64], baseline: &[f64]) -> String {
    if values == baseline {
        return String::new();
    }
    let differences: Vec<f64> = values.iter().zip(baseline).map(|(a, b)| a - b).collect();
    let error = deviation(&differences) / (differences.len() as f64).sqrt();
    format!("{:+.3}{}", mean(&differences), plus_minus(error))
}

fn plus_minus(error: f64) -> String {
    if error.is_nan() { String::new() } else { format!(" ± {error:.3}") }
}
