//! Checks of numbers on the command line.

use clap::builder::RangedU64ValueParser;

/// Parses a count from 1 to `most`.
pub(crate) fn count(most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=most)
}

/// Parses a number that `is_right`.
pub(crate) fn number(
    is_right: fn(f64) -> bool,
    expected: &'static str,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync {
    move |text| text.parse().ok().filter(|value| is_right(*value)).ok_or_else(|| format!("expected {expected}"))
}

/// A weight or a decay.
pub(crate) fn is_part(value: f64) -> bool {
    (0.0..1.0).contains(&value)
}
