//! Compares implementations of dot, blend and step in rounds.

fn main() {}
