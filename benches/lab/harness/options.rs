//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use super::cases::Case;
use super::{Extent, Role};

/// Measures an operation of gradblend beside whatever else does it. Every result is checked first.
#[derive(Parser)]
pub(super) struct Options {
    /// Only cases whose name has one of these in it, such as `ResNet-50` or `K4/bf16`
    filters: Vec<String>,
    /// Only contenders of this name or role (limit, ours, peer), such as `gradblend`; may be given again
    #[arg(long, value_name = "WHO")]
    only: Vec<String>,
    /// Check every contender once on tiny inputs; times of these mean nothing
    #[arg(long)]
    test: bool,
    /// A few large cases
    #[arg(long)]
    quick: bool,
    /// Where to run; everywhere there is, by default
    #[arg(long)]
    pub(super) device: Option<Device>,
    /// Where to append raw results; target/benches/DATE-DEVICE.jsonl by default
    #[arg(long, value_name = "FILE", requires = "device")]
    pub(super) results: Option<PathBuf>,
    /// Start no case after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub(super) budget: Option<u64>,
    /// Given by `cargo bench`; without it this is a test
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Device {
    Cpu,
    Cuda,
}

impl Options {
    pub(super) fn extent(&self) -> Extent {
        match (self.test || !self.bench, self.quick) {
            (true, _) => Extent::Test,
            (false, true) => Extent::Quick,
            (false, false) => Extent::Full,
        }
    }

    /// Those of the cases that are wanted, or the filter that none of them has in its name.
    pub(super) fn wanted(&self, cases: Vec<Case>) -> Result<Vec<Case>, String> {
        let names: Vec<String> = cases.iter().map(Case::to_string).collect();
        if let Some(filter) = self.filters.iter().find(|filter| !names.iter().any(|name| name.contains(*filter))) {
            return Err(format!("no case has {filter:?} in its name; there are: {}", names.join(", ")));
        }
        let wants = |name: &String| self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter));
        Ok(cases.into_iter().zip(names).filter(|(_, name)| wants(name)).map(|(case, _)| case).collect())
    }

    pub(super) fn wants(&self, contender: &str, role: Role) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == contender || only == role.name())
    }
}
