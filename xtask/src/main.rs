//! Builds and checks of this repository: `cargo xtask --help`.

fn main() {}
