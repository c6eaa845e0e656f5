//! Queue of one blender's work on a device: launches, and what waits for them.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUevent, CUevent_flags, CUresult, CUstream};

use crate::abi::THREADS_PER_BLOCK;
use crate::error::{Error, Result};
use crate::tensor::StreamRef;

use super::context::{Context, Kernel, capturing};
use super::driver::{self, call};
use super::memory::Allocation;

/// Address of a kernel parameter, valid as long as `value` is not moved.
pub(super) fn parameter<T: bytemuck::Pod>(value: &T) -> *mut c_void {
    (&raw const *value).cast_mut().cast()
}

/// A driver event. It completes after the work submitted to a stream before it was recorded there.
#[derive(Debug)]
pub(super) struct Event(CUevent);

impl Event {
    /// A new event. The context must be current, for this and for all methods.
    pub(super) fn new() -> Result<Self> {
        let mut event = std::ptr::null_mut();
        // SAFETY: `event` is a valid out-pointer for one handle.
        unsafe { call!(cuEventCreate(&mut event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)) }?;
        Ok(Event(event))
    }

    fn record(&self, stream: StreamRef<'_>) -> Result<()> {
        // SAFETY: the event is alive; `Stream::from_raw` requires a live stream.
        unsafe { call!(cuEventRecord(self.0, stream.as_raw() as CUstream)) }
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the event is alive, and never recorded in a capture.
        unsafe { call!(cuEventSynchronize(self.0)) }
    }

    /// Destroys the event. The owner calls this once, last.
    pub(super) fn destroy(&self) {
        // SAFETY: `new` made the event, and its owner does not use it again. A failure leaves nothing to do.
        let _ = unsafe { call!(cuEventDestroy_v2(self.0)) };
    }
}

/// The work of one blender on a device. The blender and its plans share it.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) context: Arc<Context>,
    /// Completes after the latest work on the state, which is ordered after all earlier work on it.
    done: Event,
    /// Whether there may be work that `done` does not cover: launches of graphs by the caller.
    replayed: AtomicBool,
    /// Held from the wait for `done` until it is recorded again: plans are updated beside the blender's calls.
    submission: Mutex<()>,
}

// SAFETY: any thread may use the driver's handles.
unsafe impl Send for Queue {}
// SAFETY: any thread may use the driver's handles; after `new` only an atomic changes.
unsafe impl Sync for Queue {}

impl Queue {
    pub(super) fn new(ordinal: i32) -> Result<Arc<Self>> {
        let context = Context::of(ordinal)?;
        let done = {
            let _current = context.enter_relaxed()?;
            Event::new()?
        };
        Ok(Arc::new(Queue { context, done, replayed: AtomicBool::new(false), submission: Mutex::new(()) }))
    }

    /// Submits a kernel to a stream. The driver copies the parameters. The context must be current.
    ///
    /// # Safety
    /// - `parameters` has the addresses of the kernel's parameters, in their order;
    /// - the memory that they refer to stays alive until the kernel has finished.
    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u64,
        parameters: &mut [*mut c_void],
        stream: StreamRef<'_>,
    ) -> Result<()> {
        let submission = self.order(stream)?;
        let (threads, blocks) = (THREADS_PER_BLOCK as u32, blocks as u32);
        let (handle, parameters) = (stream.as_raw() as CUstream, parameters.as_mut_ptr());
        let none = std::ptr::null_mut();
        // SAFETY: the caller fulfils the contract of `launch`; the kernel belongs to the current context.
        unsafe { call!(cuLaunchKernel(kernel.function, blocks, 1, 1, threads, 1, 1, 0, handle, parameters, none)) }?;
        self.record(stream, submission);
        Ok(())
    }

    /// Makes a stream wait for the blender's work on other streams. The context must be current.
    pub(super) fn order(&self, stream: StreamRef<'_>) -> Result<MutexGuard<'_, ()>> {
        let submission = self.submission.lock().unwrap_or_else(PoisonError::into_inner);
        // A captured stream cannot wait for work outside of its graph.
        if !capturing(stream)? {
            // SAFETY: the event is alive, and never recorded in a capture; `StreamRef::from_raw` requires a live stream.
            unsafe { call!(cuStreamWaitEvent(stream.as_raw() as CUstream, self.done.0, 0)) }?;
        }
        Ok(submission)
    }

    /// Notes that work on the state was submitted to a stream.
    pub(super) fn record(&self, stream: StreamRef<'_>, _submission: MutexGuard<'_, ()>) {
        self.record_with(&self.done, stream);
    }

    pub(super) fn record_with(&self, event: &Event, stream: StreamRef<'_>) {
        // An event that was recorded in a capture can no longer be waited for.
        let recorded = capturing(stream).is_ok_and(|capturing| !capturing) && event.record(stream).is_ok();
        if !recorded {
            self.replayed.store(true, Ordering::Relaxed);
        }
    }

    /// Waits for all work on the state, and returns whether all of it has finished. The context must be current.
    pub(super) fn is_idle(&self) -> bool {
        // Waiting for the whole context invalidates captures in progress, so it is done only where necessary.
        // SAFETY: the context is current.
        self.done.synchronize().is_ok()
            && (!self.replayed.load(Ordering::Relaxed) || unsafe { call!(cuCtxSynchronize()) }.is_ok())
    }

    /// Allocates device memory. The context must be current.
    pub(super) fn allocate(self: &Arc<Self>, bytes: u64, what: &'static str) -> Result<Allocation> {
        let mut address = 0;
        let out_of_memory = || Error::OutOfMemory { what, bytes };
        let size = usize::try_from(bytes.max(1)).map_err(|_| out_of_memory())?;
        let written = Event::new()?;
        // SAFETY: `address` is a valid out-pointer for one address.
        let allocated = unsafe { call!(cuMemAlloc_v2(&mut address, size)) };
        if let Err(error) = allocated {
            written.destroy();
            let memory = driver::code(&error) == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32;
            return Err(if memory { out_of_memory() } else { error });
        }
        Ok(Allocation { queue: self.clone(), address, bytes, written })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter_relaxed() {
            self.done.destroy();
        }
    }
}
