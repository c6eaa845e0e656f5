#![doc = include_str!("../README.md")]

mod abi;
mod backend;
mod blender;
mod checkpoint;
mod config;
mod device;
pub mod dlpack;
mod error;
#[cfg(feature = "capi")]
#[doc(hidden)]
pub mod ffi;
mod losses;
mod report;
mod schedule;
mod solve;
mod state;
mod table;
mod tensor;

pub use abi::MAX_MODALITIES;
pub use blender::{Blender, Plan};
pub use config::{Cadence, Config, Pass};
pub use device::Device;
pub use error::{Error, Result, Role};
pub use half::{bf16, f16};
pub use losses::{Estimate, Losses, MeanLoss, Trainee, gb_estimate, ogr};
pub use report::Report;
pub use schedule::Schedule;
pub use solve::{Negative, Overfitting, Policy, Solution, solve};
pub use state::{Average, Flags};
pub use tensor::{DType, Element, GradScale, Stream, TensorGrads};
