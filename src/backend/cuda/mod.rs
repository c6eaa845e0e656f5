//! The operations on a CUDA device: the same as on the CPU, as launches. The only room that names the driver.

mod context;
mod driver;
mod work;

use crate::abi::{
    ALIGNMENT, BLEND, BlenderArgs, Chunk, DOT, MAX_MODALITIES, OBSERVE, ObservationArgs, Progress, Span, State,
    TableArgs, TensorRecord, Weights,
};
use std::ffi::c_void;

use crate::error::{Error, Result, Role};
use crate::table::Table;
use crate::tensor::{Grad, Scale, Stream};

use context::{Context, Kernel, refuse_capture, wait};
use work::{Buffer, Work, parameter};

/// Looks whether there is such a device, and whether this build can run on it.
pub(crate) fn find(ordinal: i32) -> Result<()> {
    driver::find(ordinal).map(drop)
}

/// A blender's memory on a device, and the kernels.
#[derive(Debug)]
pub(crate) struct Cuda {
    /// The [`State`], then the [`Progress`], then zeros.
    state: Buffer,
    args: BlenderArgs,
}

/// A plan's table and partial sums on a device, one after the other.
#[derive(Debug)]
pub(crate) struct Scratch {
    buffer: Buffer,
    args: TableArgs,
}

const PROGRESS: u64 = size_of::<State>() as u64;
const ZEROS: u64 = (PROGRESS + size_of::<Progress>() as u64).next_multiple_of(ALIGNMENT);

impl Cuda {
    /// `args` has K and how to average, solve and reweight; `state` is where to begin.
    pub(crate) fn new(ordinal: i32, args: BlenderArgs, state: &State) -> Result<Self> {
        let work = Work::new(ordinal)?;
        let _current = work.context.enter_relaxed()?;
        let buffer = work.allocate(ZEROS + ALIGNMENT, "the blender")?;
        let own = work.context.own();
        buffer.write(0, std::slice::from_ref(state), own)?;
        buffer.write(PROGRESS, &[Progress { claimed: 0, finished: 0 }], own)?;
        buffer.write(ZEROS, &[0_u8; ALIGNMENT as usize], own)?;
        wait(own)?;
        let base = buffer.address;
        let args = BlenderArgs { state: base, progress: base + PROGRESS, zeros: base + ZEROS, ..args };
        Ok(Cuda { state: buffer, args })
    }

    fn context(&self) -> &Context {
        &self.state.work.context
    }

    /// Address of the pending sums on the device.
    pub(crate) fn pending_sums(&self) -> u64 {
        self.state.address + std::mem::offset_of!(State, pending) as u64
    }

    /// Address of the f32 weights on the device.
    pub(crate) fn device_weights(&self) -> u64 {
        self.state.address + std::mem::offset_of!(State, weights_f32) as u64
    }

    /// Puts a table on the device, with room for its partial sums. Waits for nothing that the caller has put on a stream.
    pub(crate) fn scratch(&self, table: &Table) -> Result<Scratch> {
        let context = self.context();
        let _current = context.enter_relaxed()?;
        let mut bytes = 0_u64;
        let mut place = |items: u64, size: usize| {
            let start = bytes;
            // Every table starts at a multiple of 8, the largest alignment of a record. Partial sums, two of which are
            // loaded at a time, come first, where all memory of a device is aligned to far more.
            bytes = bytes.saturating_add(items.saturating_mul(size as u64)).saturating_add(7) & !7;
            start
        };
        let spans = table.spans.len() as u64;
        let partials = place(spans.saturating_mul(2 * table.modalities as u64), size_of::<f64>());
        let tensors = place(table.tensors.len() as u64, size_of::<TensorRecord>());
        let addresses = place(table.addresses.len() as u64, size_of::<u64>());
        let indices = place(table.indices.len() as u64, size_of::<u32>());
        let chunks = place(table.chunks.len() as u64, size_of::<Chunk>());
        let at_spans = place(spans, size_of::<Span>());
        // The kernels count spans in 32 bits.
        if spans > u64::from(u32::MAX / 2) {
            return Err(Error::OutOfMemory { what: "the plan", bytes });
        }
        let buffer = self.state.work.allocate(bytes, "the plan")?;
        let base = buffer.address;
        let args = TableArgs {
            partials: base + partials,
            tensors: base + tensors,
            addresses: base + addresses,
            indices: base + indices,
            chunks: base + chunks,
            spans: base + at_spans,
            count: spans,
        };
        let scratch = Scratch { buffer, args };
        let own = context.own();
        scratch.buffer.write(chunks, &table.chunks, own)?;
        scratch.buffer.write(at_spans, &table.spans, own)?;
        scratch.bind(table, own)?;
        wait(own)?;
        Ok(scratch)
    }

    /// Refuses lists that are not in memory which the driver knows.
    pub(crate) fn check_memory(&self, lists: impl Iterator<Item = (usize, Role, Grad)>) -> Result<()> {
        check_memory(self.context(), lists)
    }

    /// Refuses a scale that is not in memory which the driver knows.
    pub(crate) fn check_scale(&self, address: u64) -> Result<()> {
        let _current = self.context().enter()?;
        if self.context().knows(address)? { Ok(()) } else { Err(Error::UnknownScale { address }) }
    }

    /// Any of dot, blend and observe, by the bits of `Pass`, in one launch. Waits for it where `waits`.
    ///
    /// # Safety
    /// The table's addresses are as `TensorGrads::from_raw` says, or come from slices and the call waits; and `scratch`
    /// is of a plan of this blender.
    pub(crate) unsafe fn pass(
        &mut self,
        scratch: &Scratch,
        what: u32,
        scale: Scale,
        stream: Stream,
        waits: bool,
    ) -> Result<()> {
        let _current = if waits { self.context().enter_relaxed()? } else { self.context().enter()? };
        if waits {
            refuse_capture(stream, "a plan of slices")?;
        }
        let kernels = &self.context().kernels;
        let kernel = match (what & DOT != 0, what & BLEND != 0) {
            (true, true) => kernels.dot_blend,
            (true, false) => kernels.dot,
            (false, true) => kernels.blend,
            (false, false) => kernels.observe,
        };
        // Only an observation reads the scale: whoever just adds up products may have freed it.
        let observation = observation(if what & OBSERVE == 0 { Scale::default() } else { scale });
        let blocks = if what & (DOT | BLEND) == 0 { 1 } else { scratch.args.count.clamp(1, kernel.resident) };
        let launched = if what & (DOT | BLEND) == 0 {
            self.launch(kernel, 1, &mut [parameter(&self.args), parameter(&observation)], stream)
        } else {
            let parameters =
                &mut [parameter(&scratch.args), parameter(&self.args), parameter(&observation), parameter(&what)];
            self.launch(kernel, blocks, parameters, stream)
        };
        launched?;
        let waited = if waits { wait(stream) } else { Ok(()) };
        if waited.is_err() {
            // Nothing may use the slices any more. If this fails too, so has the context, and with it the work.
            self.state.work.idle();
        }
        waited
    }

    /// Closes the pending sums, and reweights if that is the cadence.
    pub(crate) fn observe(&mut self, scale: Scale, stream: Stream) -> Result<()> {
        let _current = self.context().enter()?;
        let observation = observation(scale);
        self.launch(self.context().kernels.observe, 1, &mut [parameter(&self.args), parameter(&observation)], stream)
    }

    /// Puts in force what the moments say.
    pub(crate) fn reweight(&mut self, stream: Stream) -> Result<()> {
        let _current = self.context().enter()?;
        self.launch(self.context().kernels.reweight, 1, &mut [parameter(&self.args)], stream)
    }

    /// Forgets everything but the weights.
    pub(crate) fn reset(&mut self, stream: Stream) -> Result<()> {
        let _current = self.context().enter()?;
        self.launch(self.context().kernels.reset, 1, &mut [parameter(&self.args)], stream)
    }

    /// Puts K weights in force.
    pub(crate) fn set_weights(&mut self, weights: &[f64], stream: Stream) -> Result<()> {
        let mut values = [0.0; MAX_MODALITIES];
        values[..weights.len()].copy_from_slice(weights);
        let weights = Weights { values };
        let _current = self.context().enter()?;
        let parameters = &mut [parameter(&self.args), parameter(&weights)];
        self.launch(self.context().kernels.set_weights, 1, parameters, stream)
    }

    fn launch(&self, kernel: Kernel, blocks: u64, parameters: &mut [*mut c_void], stream: Stream) -> Result<()> {
        // SAFETY: the kernel's parameters; table and state are alive until dropped, and dropping them waits.
        unsafe { self.state.work.launch(kernel, blocks, parameters, stream) }
    }

    /// Copies the state from the device once the stream's work is done.
    pub(crate) fn read(&self, stream: Stream) -> Result<State> {
        let _current = self.context().enter_relaxed()?;
        refuse_capture(stream, "reading the state")?;
        let mut state = crate::state::EMPTY;
        // SAFETY: it was written by `new`.
        unsafe { self.state.read(&mut state, stream) }?;
        Ok(state)
    }

    /// Copies a state to the device, in the order of the stream.
    pub(crate) fn write(&mut self, state: &State, stream: Stream) -> Result<()> {
        let _current = self.context().enter_relaxed()?;
        refuse_capture(stream, "loading a state")?;
        let copied = self.state.write(0, std::slice::from_ref(state), stream);
        self.state.work.follow(stream);
        copied
    }
}

fn observation(scale: Scale) -> ObservationArgs {
    let (scale_address, scale) = match scale {
        Scale::Value(scale) => (0, scale),
        Scale::Address(address) => (address, 0.0),
    };
    ObservationArgs { scale_address, scale, reserved: 0 }
}

impl Scratch {
    /// Refuses lists that are not in memory which the driver knows.
    pub(crate) fn check_memory(&self, lists: impl Iterator<Item = (usize, Role, Grad)>) -> Result<()> {
        check_memory(&self.buffer.work.context, lists)
    }

    /// Refuses a stream on which the table cannot be updated, before anything is changed.
    pub(crate) fn check_update(&self, stream: Stream) -> Result<()> {
        let _current = self.buffer.work.context.enter()?;
        refuse_capture(stream, "updating a plan")
    }

    /// Copies addresses to the device, in the order of the stream. Waits for that where `waits`.
    pub(crate) fn update(&self, table: &Table, stream: Stream, waits: bool) -> Result<()> {
        let _current = self.buffer.work.context.enter_relaxed()?;
        self.bind(table, stream)?;
        if waits { wait(stream) } else { Ok(()) }
    }

    fn bind(&self, table: &Table, stream: Stream) -> Result<()> {
        let base = self.buffer.address;
        self.buffer.write(self.args.tensors - base, &table.tensors, stream)?;
        self.buffer.write(self.args.addresses - base, &table.addresses, stream)?;
        self.buffer.write(self.args.indices - base, &table.indices, stream)
    }
}

fn check_memory(context: &Context, lists: impl Iterator<Item = (usize, Role, Grad)>) -> Result<()> {
    let _current = context.enter()?;
    for (tensor, list, grad) in lists.filter(|(_, _, grad)| grad.len > 0) {
        for address in [grad.address, grad.address + grad.len * grad.dtype.bytes() - 1] {
            if !context.knows(address)? {
                return Err(Error::UnknownMemory { tensor, list, address });
            }
        }
    }
    Ok(())
}
