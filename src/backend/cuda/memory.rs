//! Device memory: buffers, and what a plan keeps in one.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytemuck::{AnyBitPattern, NoUninit, cast_slice};
use cudarc::driver::sys::CUstream;

use crate::abi::{Chunk, Span, TableArgs, TensorRecord};
use crate::backend::Memory;
use crate::error::{Error, Result};
use crate::gradient::Tracked;
use crate::table::{self, MAX_BYTES, Table};
use crate::tensor::StreamRef;

use super::context::{Context, reject_capture, synchronize};
use super::driver::call;
use super::queue::{Event, Queue};
use super::tracked;

/// Most bytes of one copy: half of the 64 KB up to which a copy from host memory that is not pinned returns before it ends
/// (CUDA C++ Programming Guide, "Concurrent Execution between Host and Device"). A longer one may wait for the stream.
const COPY_BYTES: usize = 32 << 10;

/// An allocation on the device.
#[derive(Debug)]
pub(super) struct Allocation {
    pub(super) queue: Arc<Queue>,
    pub(super) address: u64,
    pub(super) bytes: u64,
    /// Completes after the latest copy to the buffer, which need not be ordered with the work of kernels.
    pub(super) written: Event,
}

// SAFETY: any thread may use the driver's handles.
unsafe impl Send for Allocation {}
// SAFETY: any thread may use the driver's handles; nothing changes after `allocate`.
unsafe impl Sync for Allocation {}

impl Allocation {
    /// Copies bytes to the buffer from `offset` on, in the order of the stream. The driver has read `from` when this
    /// returns. The context must be current.
    pub(super) fn write(&self, offset: u64, from: &[u8], stream: StreamRef<'_>) -> Result<()> {
        debug_assert!(offset + from.len() as u64 <= self.bytes);
        let mut copied = Ok(());
        for (piece, from) in from.chunks(COPY_BYTES).enumerate() {
            let to = self.address + offset + (piece * COPY_BYTES) as u64;
            let (start, handle) = (from.as_ptr().cast::<c_void>(), stream.as_raw() as CUstream);
            // SAFETY: both sides have `from.len()` bytes; `Stream::from_raw` requires a live stream.
            copied = unsafe { call!(cuMemcpyHtoDAsync_v2(to, start, from.len(), handle)) };
            if copied.is_err() {
                break;
            }
        }
        self.queue.record_with(&self.written, stream);
        copied
    }

    /// Copies bytes within the buffer, in the order of the stream. The parts do not overlap. The context must be current.
    pub(super) fn copy(&self, to: u64, from: u64, bytes: usize, stream: StreamRef<'_>) -> Result<()> {
        debug_assert!(to.max(from) + bytes as u64 <= self.bytes);
        let (to, from, handle) = (self.address + to, self.address + from, stream.as_raw() as CUstream);
        // SAFETY: both parts are in the buffer; `Stream::from_raw` requires a live stream.
        unsafe { call!(cuMemcpyDtoDAsync_v2(to, from, bytes, handle)) }
    }

    /// Copies a record from the buffer, and synchronizes the stream. The context must be current.
    pub(super) fn read<T: AnyBitPattern + NoUninit>(&self, offset: u64, stream: StreamRef<'_>) -> Result<T> {
        let mut to = T::zeroed();
        debug_assert!(offset + size_of::<T>() as u64 <= self.bytes);
        let start = bytemuck::bytes_of_mut(&mut to).as_mut_ptr().cast::<c_void>();
        let handle = stream.as_raw() as CUstream;
        // SAFETY: both sides have as many bytes, and `to` outlives the copy: the stream is synchronized below.
        let copied = unsafe { call!(cuMemcpyDtoHAsync_v2(start, self.address + offset, size_of::<T>(), handle)) };
        // After a failed copy too: nothing may write to `to` once it is gone.
        let waited = synchronize(stream);
        copied.and(waited).map(|()| to)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // Pending work, on any stream or in a graph, may use the buffer. If its end cannot be known, the memory leaks.
        let context = &self.queue.context;
        let Ok(_current) = context.enter_relaxed() else { return };
        if self.written.synchronize().is_ok() && self.queue.is_idle() {
            // SAFETY: `allocate` made the memory, this frees it once, and nothing uses it. A failure leaves nothing to do.
            let _ = unsafe { call!(cuMemFree_v2(self.address)) };
        } else {
            context.leaked.store(true, Ordering::Relaxed);
        }
        self.written.destroy();
    }
}

/// A plan's table and partial sums on a device, in one buffer.
#[derive(Debug)]
pub(crate) struct PlanMemory {
    buffer: Allocation,
    pub(super) args: TableArgs,
}

impl PlanMemory {
    /// Checks the table's buffers and copies the table to the device. Does not wait for work of the caller.
    pub(super) fn new(queue: &Arc<Queue>, table: &Table) -> Result<Self> {
        check_memory(&queue.context, table.buffers())?;
        let _current = queue.context.enter_relaxed()?;
        let mut bytes = 0_u64;
        let mut place = |items: u64, size: usize| {
            let start = bytes;
            // Each array starts at a multiple of 8, the largest alignment of a record. Partial sums, which are loaded in
            // pairs, come first, and device memory is aligned to 256 bytes.
            bytes = bytes.saturating_add(items.saturating_mul(size as u64)).saturating_add(7) & !7;
            start
        };
        let count = table.spans.len() as u64;
        let partials = place(count.saturating_mul(2 * table.modalities as u64), size_of::<f64>());
        let tensors = place(table.rows.tensors.len() as u64, size_of::<TensorRecord>());
        let addresses = place(table.rows.addresses.len() as u64, size_of::<u64>());
        let indices = place(table.rows.indices.len() as u64, size_of::<u32>());
        let chunks = place(table.chunks.len() as u64, size_of::<Chunk>());
        let spans = place(count, size_of::<Span>());
        // The kernels count spans in 32 bits: `reserved` has rejected more.
        const { assert!(MAX_BYTES / size_of::<Span>() as u64 <= i32::MAX as u64) };
        let buffer = queue.allocate(bytes, "the plan")?;
        let own = queue.context.own();
        buffer.write(chunks, cast_slice(&table.chunks), own)?;
        buffer.write(spans, cast_slice(&table.spans), own)?;
        let base = buffer.address;
        let args = TableArgs {
            tensors: base + tensors,
            addresses: base + addresses,
            indices: base + indices,
            chunks: base + chunks,
            spans: base + spans,
            count,
            partials: base + partials,
        };
        let memory = PlanMemory { buffer, args };
        memory.write_rows(table, own)?;
        synchronize(own)?;
        Ok(memory)
    }

    fn write_rows(&self, table: &Table, stream: StreamRef<'_>) -> Result<()> {
        let base = self.buffer.address;
        self.buffer.write(self.args.tensors - base, cast_slice(&table.rows.tensors), stream)?;
        self.buffer.write(self.args.addresses - base, cast_slice(&table.rows.addresses), stream)?;
        self.buffer.write(self.args.indices - base, cast_slice(&table.rows.indices), stream)
    }
}

impl Memory for PlanMemory {
    fn check_update(&self, buffers: impl Iterator<Item = table::Buffer>, stream: StreamRef<'_>) -> Result<()> {
        let context = &self.buffer.queue.context;
        check_memory(context, buffers)?;
        let _current = context.enter()?;
        reject_capture(stream, "updating a plan")
    }

    fn check_tracked(&self, all: &[Tracked<'_>], stream: Option<StreamRef<'_>>) -> Result<()> {
        let Some(first) = all.first() else { return Ok(()) };
        let (context, expected) = (&self.buffer.queue.context, stream.unwrap_or(first.stream));
        if all.iter().any(|memory| memory.stream != expected || !tracked::belongs(memory, context.handle())) {
            return Err(Error::ForeignStream);
        }
        // An event that is recorded in a capture cannot order the owner's work.
        let _current = context.enter()?;
        reject_capture(expected, "a plan of cudarc's memory")
    }

    fn submitted(&self, all: &[Tracked<'_>]) -> Result<()> {
        let mut failed = None;
        for memory in all {
            failed = tracked::submitted(memory).err().or(failed);
        }
        let Some(error) = failed else { return Ok(()) };
        // Without its event, the owner would not wait for the work.
        let _current = self.buffer.queue.context.enter_relaxed()?;
        if synchronize(all[0].stream).is_err() {
            self.buffer.queue.is_idle();
        }
        Err(error)
    }

    fn update(&self, table: &Table, stream: StreamRef<'_>) -> Result<()> {
        let queue = &self.buffer.queue;
        let _current = queue.context.enter_relaxed()?;
        let submission = queue.order(stream)?;
        let copied = self.write_rows(table, stream);
        // Another stream's work must wait for the copies.
        queue.record(stream, submission);
        copied?;
        if table.rows.slices { synchronize(stream) } else { Ok(()) }
    }
}

/// Rejects a buffer whose first or last byte the driver does not know, on a device that cannot access other memory.
fn check_memory(context: &Context, buffers: impl Iterator<Item = table::Buffer>) -> Result<()> {
    let _current = context.enter()?;
    for table::Buffer { tensor, role, start, end } in buffers {
        for address in [start, end - 1] {
            if !context.knows(address)? {
                return Err(Error::UnknownMemory { tensor, role, address });
            }
        }
    }
    Ok(())
}
