//! The CUDA backend: each operation is one launch. The only module that names the driver.

mod alias;
mod context;
mod driver;
mod library;
mod memory;
#[cfg(feature = "nccl")]
mod nccl;
mod queue;
mod tracked;

use std::ffi::c_void;

use bytemuck::{Zeroable, bytes_of, cast_slice};

use crate::abi::{ALIGNMENT, BlenderArgs, MAX_MODALITIES, ObservationArgs, Progress, State, Weights};
use crate::config::{Config, Pass};
use crate::error::{Error, Result};
use crate::ranks::Sums;
use crate::table::{Grouping, Table};
use crate::tensor::{Scale, StreamRef};

use super::{Backend, PendingSums};
#[cfg(feature = "nccl")]
pub use nccl::Nccl;

use context::{Context, Kernel, reject_capture, synchronize};
use memory::{Allocation, PlanMemory};
use queue::{Queue, parameter};

/// Checks that the device exists and can run the kernels of this build.
pub(crate) fn find(ordinal: i32) -> Result<()> {
    driver::find(ordinal).map(drop)
}

/// A blender's memory on a device.
#[derive(Debug)]
pub(crate) struct Cuda {
    config: Config,
    args: BlenderArgs,
    scale: ObservationArgs,
    /// [`State`], [`Progress`], zeros, then the pending sums that were kept.
    buffer: Allocation,
}

const PROGRESS_OFFSET: u64 = size_of::<State>() as u64;
const ZEROS_OFFSET: u64 = (PROGRESS_OFFSET + size_of::<Progress>() as u64).next_multiple_of(ALIGNMENT);
const KEPT_OFFSET: u64 = ZEROS_OFFSET + ALIGNMENT;
const SUMS_OFFSET: u64 = std::mem::offset_of!(State, pending) as u64;

impl Cuda {
    pub(crate) fn new(ordinal: i32, config: Config, state: &State) -> Result<Self> {
        let queue = Queue::new(ordinal)?;
        let _current = queue.context.enter_relaxed()?;
        let kept = PendingSums::zeroed();
        let buffer = queue.allocate(KEPT_OFFSET + size_of_val(&kept) as u64, "the blender")?;
        let own = queue.context.own();
        buffer.write(0, bytes_of(state), own)?;
        buffer.write(PROGRESS_OFFSET, bytes_of(&Progress::zeroed()), own)?;
        buffer.write(ZEROS_OFFSET, &[0; ALIGNMENT as usize], own)?;
        buffer.write(KEPT_OFFSET, bytes_of(&kept), own)?;
        synchronize(own)?;
        let (average, decay) = config.average.coded();
        let args = BlenderArgs {
            state: buffer.address,
            progress: buffer.address + PROGRESS_OFFSET,
            zeros: buffer.address + ZEROS_OFFSET,
            decay,
            damping: config.policy.damping,
            modalities: config.modalities,
            average,
            overfitting: config.policy.overfitting as u32,
            negative: config.policy.negative as u32,
            cadence: config.cadence as u32,
            reserved: 0,
            min_weight: config.policy.min_weight,
        };
        Ok(Cuda { config, args, scale: observation(Scale::default()), buffer })
    }

    fn context(&self) -> &Context {
        &self.buffer.queue.context
    }

    /// Replaces bytes of the buffer.
    fn put(&self, offset: u64, bytes: &[u8], what: &'static str, stream: StreamRef<'_>) -> Result<()> {
        let _current = self.context().enter_relaxed()?;
        reject_capture(stream, what)?;
        let submission = self.buffer.queue.order(stream)?;
        let copied = self.buffer.write(offset, bytes, stream);
        self.buffer.queue.record(stream, submission);
        copied
    }

    /// Launches a kernel on the blender's state, with the parameters that follow [`BlenderArgs`].
    fn launch_on_state(&self, kernel: Kernel, more: Option<*mut c_void>, stream: StreamRef<'_>) -> Result<()> {
        let _current = self.context().enter()?;
        let mut parameters = [parameter(&self.args), more.unwrap_or(std::ptr::null_mut())];
        // SAFETY: these are the kernel's parameters, and `Allocation::drop` waits for the work that uses the state.
        unsafe { self.buffer.queue.launch(kernel, 1, &mut parameters, stream) }
    }
}

/// The kernels' form of a gradient scale.
fn observation(scale: Scale) -> ObservationArgs {
    let (scale_address, scale) = match scale {
        Scale::Value(scale) => (0, scale),
        Scale::Address(address) => (address, 0.0),
    };
    ObservationArgs { scale_address, scale, reserved: 0 }
}

impl Backend for Cuda {
    type Memory = PlanMemory;

    fn config(&self) -> &Config {
        &self.config
    }

    fn grouping(&self) -> Grouping {
        Grouping::BLOCKS
    }

    fn memory(&self, table: &Table) -> Result<PlanMemory> {
        PlanMemory::new(&self.buffer.queue, table)
    }

    unsafe fn pass(&mut self, table: &Table, memory: &PlanMemory, what: Pass, stream: StreamRef<'_>) -> Result<()> {
        let slices = table.rows.slices;
        let _current = if slices { self.context().enter_relaxed()? } else { self.context().enter()? };
        if slices {
            reject_capture(stream, "a plan of slices")?;
        }
        let kernels = &self.context().kernels;
        let kernel = match (what.contains(Pass::DOT), what.contains(Pass::BLEND)) {
            (true, true) => kernels.dot_blend,
            (true, false) => kernels.dot,
            (false, true) => kernels.blend,
            (false, false) => return self.observe(stream),
        };
        // Only an observation reads the scale. Without one, its address may be invalid already.
        let scale = if what.contains(Pass::OBSERVE) { self.scale } else { observation(Scale::default()) };
        let blocks = memory.args.count.clamp(1, kernel.resident_blocks);
        let bits = what.bits();
        let parameters = &mut [parameter(&memory.args), parameter(&self.args), parameter(&scale), parameter(&bits)];
        // SAFETY: these are the kernel's parameters; the caller guarantees the table's addresses; dropping the table's
        // or the state's buffer waits for this work.
        unsafe { self.buffer.queue.launch(kernel, blocks, parameters, stream) }?;
        let waited = if slices { synchronize(stream) } else { Ok(()) };
        if waited.is_err() {
            // The work must not use the slices after this call. If this fails too, the context and its work have failed.
            self.buffer.queue.is_idle();
        }
        waited
    }

    fn observe(&mut self, stream: StreamRef<'_>) -> Result<()> {
        self.launch_on_state(self.context().kernels.observe, Some(parameter(&self.scale)), stream)
    }

    fn reweight(&mut self, stream: StreamRef<'_>) -> Result<()> {
        self.launch_on_state(self.context().kernels.reweight, None, stream)
    }

    fn reset(&mut self, stream: StreamRef<'_>) -> Result<()> {
        self.launch_on_state(self.context().kernels.reset, None, stream)
    }

    fn set_weights(&mut self, weights: &[f64], stream: StreamRef<'_>) -> Result<()> {
        let mut values = [0.0; MAX_MODALITIES];
        values[..weights.len()].copy_from_slice(weights);
        self.launch_on_state(self.context().kernels.set_weights, Some(parameter(&Weights { values })), stream)
    }

    fn set_grad_scale(&mut self, scale: Scale) -> Result<()> {
        if let Scale::Address(address) = scale {
            let _current = self.context().enter()?;
            if !self.context().knows(address)? {
                return Err(Error::UnknownScale { address });
            }
        }
        self.scale = observation(scale);
        Ok(())
    }

    fn read(&self, stream: StreamRef<'_>) -> Result<State> {
        let _current = self.context().enter_relaxed()?;
        reject_capture(stream, "reading the state")?;
        drop(self.buffer.queue.order(stream)?);
        self.buffer.read(0, stream)
    }

    fn write(&mut self, state: &State, stream: StreamRef<'_>) -> Result<()> {
        self.put(0, bytes_of(state), "loading a state", stream)
    }

    fn pending_sums(&self) -> *mut f64 {
        std::ptr::without_provenance_mut((self.buffer.address + SUMS_OFFSET) as usize)
    }

    fn sums<'a>(&'a mut self, stream: StreamRef<'a>) -> Result<Sums<'a>> {
        let _current = self.context().enter()?;
        drop(self.buffer.queue.order(stream)?);
        Ok(Sums::Device { address: self.pending_sums(), count: 2 * self.config.k(), stream })
    }

    fn record(&mut self, stream: StreamRef<'_>) -> Result<()> {
        let _current = self.context().enter()?;
        self.buffer.queue.record(stream, self.buffer.queue.order(stream)?);
        Ok(())
    }

    fn keep_sums(&mut self, stream: StreamRef<'_>) -> Result<()> {
        let _current = self.context().enter()?;
        let submission = self.buffer.queue.order(stream)?;
        self.buffer.copy(KEPT_OFFSET, SUMS_OFFSET, size_of::<PendingSums>(), stream)?;
        self.buffer.queue.record(stream, submission);
        Ok(())
    }

    fn kept_sums(&self, stream: StreamRef<'_>) -> Result<PendingSums> {
        let _current = self.context().enter_relaxed()?;
        reject_capture(stream, "reading the sums")?;
        drop(self.buffer.queue.order(stream)?);
        self.buffer.read(KEPT_OFFSET, stream)
    }

    fn put_sums(&mut self, sums: &[f64], stream: StreamRef<'_>) -> Result<()> {
        self.put(SUMS_OFFSET, cast_slice(sums), "replacing the sums", stream)
    }

    fn device_weights(&self) -> *const f32 {
        let offset = std::mem::offset_of!(State, weights_f32);
        std::ptr::without_provenance(self.buffer.address as usize + offset)
    }
}
