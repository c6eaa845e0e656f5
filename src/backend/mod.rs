//! Backends: where a blender keeps its state and runs its operations. Backends do not know each other.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "unbuilt.rs"]
pub(crate) mod cuda;

use std::fmt::Debug;

use crate::abi::{MAX_MODALITIES, State};
use crate::config::{Config, Pass};
use crate::error::{Error, Result};
use crate::gradient::Tracked;
use crate::ranks::Sums;
use crate::table::{Buffer, Grouping, Table};
use crate::tensor::{Scale, StreamRef};

use cpu::Cpu;
use cuda::Cuda;

/// Pending sums as a state has them.
pub(crate) type PendingSums = [f64; 2 * MAX_MODALITIES];

/// A blender's configuration, state and operations on one kind of device.
pub(crate) trait Backend: Debug + Sized {
    /// What a plan keeps on the device.
    type Memory: Memory;

    /// The configuration that the backend was made with.
    fn config(&self) -> &Config;

    /// How the chunks of a table are grouped.
    fn grouping(&self) -> Grouping;

    /// Checks that the device can access the buffers of `table`, and allocates a plan's memory.
    fn memory(&self, table: &Table) -> Result<Self::Memory>;

    /// Runs the parts of `what` with the weights in force at entry, and reweights after an observation if the cadence
    /// says so. If the table has slices, the call synchronizes before it returns.
    ///
    /// # Safety
    /// - the addresses of `table` are valid: they come from slices that the plan borrows, or fulfil the contract of
    ///   `TensorGrads::from_raw`;
    /// - `memory` was made by this backend for `table`.
    unsafe fn pass(&mut self, table: &Table, memory: &Self::Memory, what: Pass, stream: StreamRef<'_>) -> Result<()>;

    /// Commits the pending sums as one observation, and reweights if the cadence says so.
    fn observe(&mut self, stream: StreamRef<'_>) -> Result<()>;

    /// Solves for the weights and puts them in force.
    fn reweight(&mut self, stream: StreamRef<'_>) -> Result<()>;

    /// Forgets everything but the weights.
    fn reset(&mut self, stream: StreamRef<'_>) -> Result<()>;

    /// Puts K weights in force.
    fn set_weights(&mut self, weights: &[f64], stream: StreamRef<'_>) -> Result<()>;

    /// Sets the gradient scale of the next observations.
    fn set_grad_scale(&mut self, scale: Scale) -> Result<()>;

    /// The state, once all work on `stream` has finished.
    fn read(&self, stream: StreamRef<'_>) -> Result<State>;

    /// Replaces the state.
    fn write(&mut self, state: &State, stream: StreamRef<'_>) -> Result<()>;

    /// Address of the 2K pending sums.
    fn pending_sums(&self) -> *mut f64;

    /// The 2K pending sums, for work on `stream`, which waits for the earlier work on them.
    fn sums<'a>(&'a mut self, stream: StreamRef<'a>) -> Result<Sums<'a>>;

    /// Makes later work on the state wait for what was submitted to `stream`.
    fn record(&mut self, stream: StreamRef<'_>) -> Result<()>;

    /// Keeps a copy of the pending sums.
    fn keep_sums(&mut self, stream: StreamRef<'_>) -> Result<()>;

    /// The sums that were kept, at the start of an array; zeros before. Synchronizes `stream`.
    fn kept_sums(&self, stream: StreamRef<'_>) -> Result<PendingSums>;

    /// Replaces the first pending sums.
    fn put_sums(&mut self, sums: &[f64], stream: StreamRef<'_>) -> Result<()>;

    /// Address of the K weights in force as f32.
    fn device_weights(&self) -> *const f32;
}

/// What a plan keeps on the device.
pub(crate) trait Memory: Debug {
    /// Rejects buffers that the device cannot access, and a stream on which [`update`](Self::update) cannot run.
    fn check_update(&self, buffers: impl Iterator<Item = Buffer>, stream: StreamRef<'_>) -> Result<()>;

    /// Rejects memory that belongs to another kind of device, or is tracked by another stream, or by one being captured.
    fn check_tracked(&self, tracked: &[Tracked<'_>], stream: Option<StreamRef<'_>>) -> Result<()>;

    /// Tells the owners of memory that work on it was submitted.
    fn submitted(&self, tracked: &[Tracked<'_>]) -> Result<()>;

    /// Copies the addresses of `table` to the device. If the table has slices, the call synchronizes before it returns.
    fn update(&self, table: &Table, stream: StreamRef<'_>) -> Result<()>;
}

/// The backend of a device.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one for each blender, and none is moved in a loop")]
pub(crate) enum AnyBackend {
    Cpu(Cpu),
    Cuda(Cuda),
}

/// The plan memory of a backend.
#[derive(Debug)]
pub(crate) enum AnyMemory {
    Cpu(<Cpu as Backend>::Memory),
    Cuda(<Cuda as Backend>::Memory),
}

impl AnyBackend {
    /// The backend of a CUDA device, or of the CPU for `None`, with `state` as its first state.
    pub(crate) fn new(ordinal: Option<i32>, config: Config, state: &State) -> Result<Self> {
        Ok(match ordinal {
            None => AnyBackend::Cpu(Cpu::new(config, state)?),
            Some(ordinal) => AnyBackend::Cuda(Cuda::new(ordinal, config, state)?),
        })
    }
}

/// Evaluates an expression for the one backend that `$any` holds.
macro_rules! each {
    ($any:expr, $backend:ident => $body:expr) => {
        match $any {
            AnyBackend::Cpu($backend) => $body,
            AnyBackend::Cuda($backend) => $body,
        }
    };
}

impl Backend for AnyBackend {
    type Memory = AnyMemory;

    fn config(&self) -> &Config {
        each!(self, backend => backend.config())
    }

    fn grouping(&self) -> Grouping {
        each!(self, backend => backend.grouping())
    }

    fn memory(&self, table: &Table) -> Result<AnyMemory> {
        Ok(match self {
            AnyBackend::Cpu(cpu) => AnyMemory::Cpu(cpu.memory(table)?),
            AnyBackend::Cuda(cuda) => AnyMemory::Cuda(cuda.memory(table)?),
        })
    }

    unsafe fn pass(&mut self, table: &Table, memory: &AnyMemory, what: Pass, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: the caller fulfils the contract of `pass`; table and memory are handed on as they are.
        unsafe {
            match (self, memory) {
                (AnyBackend::Cpu(cpu), AnyMemory::Cpu(memory)) => cpu.pass(table, memory, what, stream),
                (AnyBackend::Cuda(cuda), AnyMemory::Cuda(memory)) => cuda.pass(table, memory, what, stream),
                _ => Err(Error::ForeignPlan),
            }
        }
    }

    fn observe(&mut self, stream: StreamRef<'_>) -> Result<()> {
        each!(self, backend => backend.observe(stream))
    }

    fn reweight(&mut self, stream: StreamRef<'_>) -> Result<()> {
        each!(self, backend => backend.reweight(stream))
    }

    fn reset(&mut self, stream: StreamRef<'_>) -> Result<()> {
        each!(self, backend => backend.reset(stream))
    }

    fn set_weights(&mut self, weights: &[f64], stream: StreamRef<'_>) -> Result<()> {
        each!(self, backend => backend.set_weights(weights, stream))
    }

    fn set_grad_scale(&mut self, scale: Scale) -> Result<()> {
        each!(self, backend => backend.set_grad_scale(scale))
    }

    fn read(&self, stream: StreamRef<'_>) -> Result<State> {
        each!(self, backend => backend.read(stream))
    }

    fn write(&mut self, state: &State, stream: StreamRef<'_>) -> Result<()> {
        each!(self, backend => backend.write(state, stream))
    }

    fn pending_sums(&self) -> *mut f64 {
        each!(self, backend => backend.pending_sums())
    }

    fn sums<'a>(&'a mut self, stream: StreamRef<'a>) -> Result<Sums<'a>> {
        each!(self, backend => backend.sums(stream))
    }

    fn record(&mut self, stream: StreamRef<'_>) -> Result<()> {
        each!(self, backend => backend.record(stream))
    }

    fn keep_sums(&mut self, stream: StreamRef<'_>) -> Result<()> {
        each!(self, backend => backend.keep_sums(stream))
    }

    fn kept_sums(&self, stream: StreamRef<'_>) -> Result<PendingSums> {
        each!(self, backend => backend.kept_sums(stream))
    }

    fn put_sums(&mut self, sums: &[f64], stream: StreamRef<'_>) -> Result<()> {
        each!(self, backend => backend.put_sums(sums, stream))
    }

    fn device_weights(&self) -> *const f32 {
        each!(self, backend => backend.device_weights())
    }
}

impl Memory for AnyMemory {
    fn check_update(&self, buffers: impl Iterator<Item = Buffer>, stream: StreamRef<'_>) -> Result<()> {
        match self {
            AnyMemory::Cpu(memory) => memory.check_update(buffers, stream),
            AnyMemory::Cuda(memory) => memory.check_update(buffers, stream),
        }
    }

    fn check_tracked(&self, tracked: &[Tracked<'_>], stream: Option<StreamRef<'_>>) -> Result<()> {
        match self {
            AnyMemory::Cpu(memory) => memory.check_tracked(tracked, stream),
            AnyMemory::Cuda(memory) => memory.check_tracked(tracked, stream),
        }
    }

    fn submitted(&self, tracked: &[Tracked<'_>]) -> Result<()> {
        match self {
            AnyMemory::Cpu(memory) => memory.submitted(tracked),
            AnyMemory::Cuda(memory) => memory.submitted(tracked),
        }
    }

    fn update(&self, table: &Table, stream: StreamRef<'_>) -> Result<()> {
        match self {
            AnyMemory::Cpu(memory) => memory.update(table, stream),
            AnyMemory::Cuda(memory) => memory.update(table, stream),
        }
    }
}
