#![doc = include_str!("../README.md")]

mod blender;
#[cfg(feature = "capi")]
mod capi;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod dlpack;
mod error;
mod grad;
mod layout;
mod moments;
mod ogr;
mod plan;
mod schedule;
mod solve;

pub use blender::{Blender, Cadence, Config, Device, Pass, Plan, Report};
pub use error::{Error, List, Result};
pub use grad::{DType, Element, GradScale, Stream, TensorGrads};
pub use half::{bf16, f16};
pub use layout::MAX_MODALITIES;
pub use moments::{Average, Flags};
pub use ogr::{Estimate, Losses, MeanLoss, Trainee, gb_estimate, ogr};
pub use schedule::Schedule;
pub use solve::{Negative, Overfitting, Policy, Solution, solve};
