//! Gradient-Blending for multi-modal networks: loss weights from how each modality overfits, and the gradients blended with
//! these weights, in one pass over memory.
//!
//! A [`Blender`] holds the running moments and the weights of K losses. A [`Plan`] is a checked list of parameter tensors
//! ([`TensorGrads`]); operations run on it:
//!
//! | operation | does |
//! |---|---|
//! | [`dot`](Blender::dot) | adds c_k = <g, v_k> and d_k = <t - g, v_k> to the pending sums |
//! | [`observe`](Blender::observe) | commits the pending sums as one observation: n, m and S |
//! | [`reweight`](Blender::reweight) | solves for the weights and puts them in force |
//! | [`blend`](Blender::blend) | writes sum_k w_k v_k |
//! | [`step`](Blender::step) | dot, blend and observe in one pass over memory |
//! | [`pass`](Blender::pass) | any of these parts in one pass ([`Pass`]) |
//!
//! v_k is the gradient of loss k on a training batch; t and g are the gradients of the fused loss on training and on held-out
//! data. Each loss, the fused one included, is called a *modality*.
//!
//! ```
//! use gradblend::{Blender, Config, Device, Schedule, Stream, TensorGrads};
//!
//! # fn main() -> gradblend::Result<()> {
//! let stream = Stream::default();
//! let mut blender = Blender::new(&Device::cpu(), Config::new(2))?;
//! let schedule = Schedule::online(10, 5)?;
//! let (t, g) = ([0.9_f32, 0.1], [0.7_f32, 0.3]);
//! let (audio, fused) = ([0.5_f32, 0.2], [0.8_f32, 0.2]);
//! let mut blended = [0.0_f32; 2];
//! let plan = blender.plan([TensorGrads::new(&t, &g, &[Some(&audio), Some(&fused)]).blended(&mut blended)])?;
//! for epoch in 0..15 {
//!     blender.step(&plan, stream)?;
//!     if schedule.ends(epoch) {
//!         blender.reweight(stream)?;
//!         blender.reset(stream)?;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Without gradients, [`gb_estimate`] finds weights from losses, and [`solve`] from any numerator and second moment. Source of
//! both estimators: Wang, Tran, Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?", CVPR 2020.
//!
//! # Devices
//!
//! [`Device::cpu`] needs nothing. [`Device::cuda`] needs the feature `cuda`, which compiles the kernels with nvcc; the driver is
//! loaded at run time. The operations are the same; on a CUDA device they submit work to the [`Stream`] given and return.
//! `report`, `second_moments` and `save` synchronize that stream.
//!
//! # Errors and panics
//!
//! Every check comes before any work: after an [`Error`] other than [`Error::Cuda`], a failure of the driver, nothing has
//! changed. No function panics on bad input.
//!
//! # Ranks
//!
//! [`Blender::reduce`] adds the products up over ranks that hold parts of each gradient, by MPI, NCCL or any engine ([`Ranks`]).
//! `docs/distributed.md` of the repository says what to add up in which case.
//!
//! # Processes
//!
//! A forked process cannot use the blenders and plans of its parent, whose threads and device contexts it lacks: their calls
//! return [`Error::Forked`], and their drop does nothing. It can make its own on the CPU. CUDA does not work after a fork in a
//! process whose parent has initialised the driver: [`Device::cuda`] then returns the same error.
//!
//! # Features
//!
//! - `cuda`: the CUDA backend.
//! - `nccl`: the engine `Nccl` for several CUDA devices; the library is loaded at run time.
//! - `capi`: the C functions of `include/gradblend.h`, for a crate type `cdylib` or `staticlib`.

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
mod gradient;
mod losses;
mod process;
mod ranks;
mod report;
mod schedule;
mod solve;
mod state;
mod table;
mod tensor;
pub mod trainer;

pub use abi::MAX_MODALITIES;
#[cfg(feature = "nccl")]
pub use backend::cuda::Nccl;
pub use blender::{Blender, Plan};
pub use config::{Cadence, Config, Pass};
pub use device::Device;
pub use error::{Error, Result, Role};
pub use gradient::{Gradient, GradientMut};
pub use half::{bf16, f16};
pub use losses::{Estimate, Losses, MeanLoss, Trainee, gb_estimate, ogr};
pub use ranks::{EngineError, Ranks, Sums};
pub use report::Report;
pub use schedule::Schedule;
pub use solve::{Negative, Overfitting, Policy, Solution, solve};
pub use state::{Average, Flags};
pub use tensor::{DType, Element, GradScale, Stream, StreamRef, TensorGrads};

/// The README's examples compile and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
