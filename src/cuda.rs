//! The operations on a CUDA device: the same as on the CPU, as launches. The only room that names the driver.

mod context;
mod driver;
mod work;

use crate::error::{Error, List, Result};
use crate::grad::{Grad, Scale, Stream};
use crate::layout::{
    ALIGNMENT, BLEND, Chunk, DOT, Launch, MAX_MODALITIES, OBSERVE, Progress, Span, State, TensorRecord, Weights,
};
use crate::plan::Table;

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
    /// What every launch of this blender is made from.
    terms: Launch,
}

/// A plan's table and partial sums on a device, one after the other.
#[derive(Debug)]
pub(crate) struct Scratch {
    buffer: Buffer,
    /// What every launch on this plan is made from.
    terms: Launch,
}

const PROGRESS: u64 = size_of::<State>() as u64;
const ZEROS: u64 = (PROGRESS + size_of::<Progress>() as u64).next_multiple_of(ALIGNMENT);

impl Cuda {
    /// `terms` has K and how to average, solve and reweight; `state` is where to begin.
    pub(crate) fn new(ordinal: i32, terms: Launch, state: &State) -> Result<Self> {
        let work = Work::new(ordinal)?;
        let _current = work.context.enter_relaxed()?;
        let buffer = work.allocate(ZEROS + ALIGNMENT, "the blender")?;
        let own = work.context.own();
        buffer.write(0, std::slice::from_ref(state), own)?;
        buffer.write(PROGRESS, &[Progress::default()], own)?;
        buffer.write(ZEROS, &[0_u8; ALIGNMENT as usize], own)?;
        wait(own)?;
        let base = buffer.address;
        let terms = Launch { state: base, progress: base + PROGRESS, zeros: base + ZEROS, ..terms };
        Ok(Cuda { state: buffer, terms })
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
        let terms = Launch {
            partials: base + partials,
            tensors: base + tensors,
            addresses: base + addresses,
            indices: base + indices,
            chunks: base + chunks,
            spans: base + at_spans,
            count: spans,
            ..Launch::default()
        };
        let scratch = Scratch { buffer, terms };
        let own = context.own();
        scratch.buffer.write(chunks, &table.chunks, own)?;
        scratch.buffer.write(at_spans, &table.spans, own)?;
        scratch.bind(table, own)?;
        wait(own)?;
        Ok(scratch)
    }

    /// Refuses lists that are not in memory which the driver knows.
    pub(crate) fn check_memory(&self, lists: impl Iterator<Item = (usize, List, Grad)>) -> Result<()> {
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
        let table = scratch.terms;
        // Only an observation reads the scale: whoever just adds up products may have freed it.
        let mut terms = if what & OBSERVE == 0 { self.terms } else { self.scaled(scale) };
        (terms.tensors, terms.addresses, terms.indices) = (table.tensors, table.addresses, table.indices);
        (terms.chunks, terms.spans, terms.count) = (table.chunks, table.spans, table.count);
        (terms.partials, terms.what) = (table.partials, what);
        let blocks = if what & (DOT | BLEND) == 0 { 1 } else { table.count.clamp(1, kernel.resident) };
        // SAFETY: as the caller's; the table and the state are alive until dropped, and dropping them waits.
        unsafe { self.state.work.launch(kernel, blocks, &mut [parameter(&terms)], stream) }?;
        let waited = if waits { wait(stream) } else { Ok(()) };
        if waited.is_err() {
            // Nothing may use the slices any more. If this fails too, so has the context, and with it the work.
            self.state.work.idle();
        }
        waited
    }

    /// Closes the pending sums, and reweights if that is the cadence.
    pub(crate) fn observe(&mut self, scale: Scale, stream: Stream) -> Result<()> {
        self.run(self.context().kernels.observe, &self.scaled(scale), stream)
    }

    /// Puts in force what the moments say.
    pub(crate) fn reweight(&mut self, stream: Stream) -> Result<()> {
        self.run(self.context().kernels.reweight, &self.terms, stream)
    }

    /// Forgets everything but the weights.
    pub(crate) fn reset(&mut self, stream: Stream) -> Result<()> {
        self.run(self.context().kernels.reset, &self.terms, stream)
    }

    /// Puts K weights in force.
    pub(crate) fn set_weights(&mut self, weights: &[f64], stream: Stream) -> Result<()> {
        let mut values = [0.0; MAX_MODALITIES];
        values[..weights.len()].copy_from_slice(weights);
        let (kernel, weights) = (self.context().kernels.set_weights, Weights { values });
        let _current = self.context().enter()?;
        // SAFETY: the kernel's parameters; the state is alive until dropped, and dropping it waits.
        unsafe { self.state.work.launch(kernel, 1, &mut [parameter(&self.terms), parameter(&weights)], stream) }
    }

    /// Copies the state from the device once the stream's work is done.
    pub(crate) fn read(&self, stream: Stream) -> Result<State> {
        let _current = self.context().enter_relaxed()?;
        refuse_capture(stream, "reading the state")?;
        let mut state = crate::moments::EMPTY;
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

    fn scaled(&self, scale: Scale) -> Launch {
        match scale {
            Scale::Value(scale) => Launch { scale, ..self.terms },
            Scale::Address(scale_address) => Launch { scale_address, ..self.terms },
        }
    }

    /// Launches a kernel that works on the state alone.
    fn run(&self, kernel: Kernel, terms: &Launch, stream: Stream) -> Result<()> {
        let _current = self.context().enter()?;
        // SAFETY: the kernel's parameter; the state is alive until dropped, and dropping it waits.
        unsafe { self.state.work.launch(kernel, 1, &mut [parameter(terms)], stream) }
    }
}

impl Scratch {
    /// Refuses lists that are not in memory which the driver knows.
    pub(crate) fn check_memory(&self, lists: impl Iterator<Item = (usize, List, Grad)>) -> Result<()> {
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
        self.buffer.write(self.terms.tensors - base, &table.tensors, stream)?;
        self.buffer.write(self.terms.addresses - base, &table.addresses, stream)?;
        self.buffer.write(self.terms.indices - base, &table.indices, stream)
    }
}

fn check_memory(context: &Context, lists: impl Iterator<Item = (usize, List, Grad)>) -> Result<()> {
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
