//! Random gradients, the f64 oracle, dtype facts, and the faces of the library that tests run through.
//!
//! Shared by the tests, the benchmarks, the fuzz target and the integrations. The oracle is a set of naive loops in f64
//! and uses nothing of the library but its types.

mod oracle;
mod random;
mod sample;
mod tensor;

pub use oracle::Sums;
pub use random::Random;
pub use sample::Sample;
pub use tensor::{Buffer, LENGTHS, Output, Tensor, bits, bits64};

/// Result of a test body: an error fails the test and names itself.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;
