//! Random gradients, the f64 oracle, dtype facts, and the faces of the library that tests run through.
//!
//! Shared by the tests, the benchmarks and the fuzz targets. The oracle is a set of naive loops in f64 and uses nothing
//! of the library but its types.

mod blender;
pub mod c;
#[cfg(feature = "cuda")]
pub mod cuda;
mod face;
mod failure;
mod models;
mod oracle;
mod property;
mod random;
mod sample;
mod saved;
mod tensor;

pub use blender::{TestBlender, TestPlan};
#[cfg(feature = "cuda")]
pub use cuda::{on_cuda as cuda, on_cuda_through_c as ffi_cuda};
pub use face::{Addresses, DeviceArray, Face, Input, Uploaded, cpu, ffi};
pub use failure::{Failure, Result, name, rejected, rejected_as};
pub use models::resnet_50;
pub use oracle::{Moments, Sums};
pub use property::property;
pub use proptest;
pub use random::Random;
pub use sample::Sample;
pub use saved::{forged, forged_second_moments, version_1};
pub use tensor::{Buffer, LENGTHS, Output, Tensor, bits, bits64};

/// Result of a test body: an error fails the test and names itself.
pub type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;
