//! The work of one blender on a device: launches, what comes after them, and the memory that they use.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{CUevent, CUevent_flags, CUresult, CUstream};

use crate::abi::THREADS_PER_BLOCK;
use crate::error::{Error, Result};
use crate::tensor::Stream;

use super::context::{Context, Kernel, capturing, wait};
use super::driver::{self, call};

/// A parameter of a kernel, for as long as `value` stays where it is.
pub(super) fn parameter<T>(value: &T) -> *mut c_void {
    (&raw const *value).cast_mut().cast()
}

/// An event of the driver's, which comes after what was put on a stream before it was recorded.
#[derive(Debug)]
struct Event(CUevent);

impl Event {
    /// The context is current, here and below.
    fn new() -> Result<Self> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for the event.
        unsafe { call!(cuEventCreate(&mut event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)) }?;
        Ok(Event(event))
    }

    fn record(&self, stream: Stream) -> Result<()> {
        // SAFETY: the event is alive; whoever made the `Stream` vouches for it.
        unsafe { call!(cuEventRecord(self.0, stream.as_raw() as CUstream)) }
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive, and never recorded in a capture.
        unsafe { call!(cuEventSynchronize(self.0)) }
    }

    fn destroy(&self) {
        // SAFETY: made by `new`; whoever owns it calls this once, last.
        let _ = unsafe { call!(cuEventDestroy_v2(self.0)) };
    }
}

/// The work of one blender on a device, which its plans share.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) context: Arc<Context>,
    /// Comes after the latest work on the state. All of that is ordered, so it comes after all of it.
    done: Event,
    /// Whether there may be work that `done` does not speak of: that of graphs, which others launch.
    replayed: AtomicBool,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Work {}
// SAFETY: as above; nothing here but an atomic is written to after `new`.
unsafe impl Sync for Work {}

impl Work {
    pub(super) fn new(ordinal: i32) -> Result<Arc<Self>> {
        let context = Context::of(ordinal)?;
        let done = {
            let _current = context.enter_relaxed()?;
            Event::new()?
        };
        Ok(Arc::new(Work { context, done, replayed: AtomicBool::new(false) }))
    }

    /// Puts a kernel on a stream, with parameters that the driver copies. The context is current.
    ///
    /// # Safety
    /// The parameters are those of the kernel, and what they hold the addresses of stays alive until the work is done.
    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u64,
        parameters: &mut [*mut c_void],
        stream: Stream,
    ) -> Result<()> {
        let (threads, blocks) = (THREADS_PER_BLOCK as u32, blocks as u32);
        let (handle, parameters) = (stream.as_raw() as CUstream, parameters.as_mut_ptr());
        let none = std::ptr::null_mut();
        // SAFETY: as the caller's.
        unsafe { call!(cuLaunchKernel(kernel.function, blocks, 1, 1, threads, 1, 1, 0, handle, parameters, none)) }?;
        self.follow(stream);
        Ok(())
    }

    /// Notes that work on the state was put on a stream.
    pub(super) fn follow(&self, stream: Stream) {
        self.follow_with(&self.done, stream);
    }

    fn follow_with(&self, event: &Event, stream: Stream) {
        // An event that is recorded in a capture could not be waited for any more.
        let recorded = capturing(stream).is_ok_and(|capturing| !capturing) && event.record(stream).is_ok();
        if !recorded {
            self.replayed.store(true, Ordering::Relaxed);
        }
    }

    /// Waits for all work on the state; says whether it is done. The context is current.
    pub(super) fn idle(&self) -> bool {
        // The context as a whole is waited for only if it must be: that spoils whatever is being captured in it.
        // SAFETY: the context is current.
        self.done.wait().is_ok()
            && (!self.replayed.load(Ordering::Relaxed) || unsafe { call!(cuCtxSynchronize()) }.is_ok())
    }

    /// Memory on the device. The context is current.
    pub(super) fn allocate(self: &Arc<Self>, bytes: u64, what: &'static str) -> Result<Buffer> {
        let mut address = 0;
        let out_of_memory = || Error::OutOfMemory { what, bytes };
        let size = usize::try_from(bytes.max(1)).map_err(|_| out_of_memory())?;
        let written = Event::new()?;
        // SAFETY: a place for the address.
        let allocated = unsafe { call!(cuMemAlloc_v2(&mut address, size)) };
        if let Err(error) = allocated {
            written.destroy();
            let memory = driver::code(&error) == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32;
            return Err(if memory { out_of_memory() } else { error });
        }
        Ok(Buffer { work: self.clone(), address, bytes, written })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter_relaxed() {
            self.done.destroy();
        }
    }
}

/// Bytes that one copy has at the most: the driver takes so few along with the command, whereas it may wait for the
/// stream before it copies more from memory that is not pinned (CUDA driver API, "API synchronization behavior").
const PIECE: usize = 32 << 10;

/// Memory on the device.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) work: Arc<Work>,
    pub(super) address: u64,
    bytes: u64,
    /// Comes after the latest copy to it, which need not be ordered with the work of kernels.
    written: Event,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Buffer {}
// SAFETY: as above; nothing here is written to after `allocate`.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Copies to the memory from `offset` on, in the order of the stream. The bytes may change once this returns: the
    /// driver has copied them. Its context is current.
    pub(super) fn write<T: Copy>(&self, offset: u64, from: &[T], stream: Stream) -> Result<()> {
        let bytes = size_of_val(from);
        debug_assert!(offset + bytes as u64 <= self.bytes);
        let (handle, start) = (stream.as_raw() as CUstream, from.as_ptr().cast::<u8>());
        let mut copied = Ok(());
        for piece in (0..bytes).step_by(PIECE) {
            let to = self.address + offset + piece as u64;
            let len = PIECE.min(bytes - piece);
            // SAFETY: as many bytes are there on both sides.
            copied = unsafe { call!(cuMemcpyHtoDAsync_v2(to, start.add(piece).cast::<c_void>(), len, handle)) };
            if copied.is_err() {
                break;
            }
        }
        self.work.follow_with(&self.written, stream);
        copied
    }

    /// Copies from the start of the memory, and waits for the stream. Its context is current.
    ///
    /// # Safety
    /// The memory holds a `T`.
    pub(super) unsafe fn read<T>(&self, to: &mut T, stream: Stream) -> Result<()> {
        debug_assert!(size_of::<T>() as u64 <= self.bytes);
        let handle = stream.as_raw() as CUstream;
        // SAFETY: as many bytes are there on both sides, and `to` outlives the wait.
        let copied =
            unsafe { call!(cuMemcpyDtoHAsync_v2((&raw mut *to).cast(), self.address, size_of::<T>(), handle)) };
        // Even where the copy failed, nothing may write to `to` once it is out of reach.
        let waited = wait(stream);
        copied.and(waited)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Work that is pending, on whatever stream or in a graph, may use the memory. Where there is no telling that it
        // is done, the memory is not given back.
        let context = &self.work.context;
        let Ok(_current) = context.enter_relaxed() else { return };
        if self.written.wait().is_ok() && self.work.idle() {
            // SAFETY: made by `allocate`, given back once, and nothing uses it.
            let _ = unsafe { call!(cuMemFree_v2(self.address)) };
        } else {
            context.abandoned.store(true, Ordering::Relaxed);
        }
        self.written.destroy();
    }
}
