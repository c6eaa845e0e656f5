//! Gradients and streams of cudarc: memory that its owner tracks by events, and frees or reuses only after them.

use std::any::Any;
use std::sync::Arc;

use cudarc::driver::sys::CUcontext;
use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceSlice, DriverError, SyncOnDrop};

use crate::error::Result;
use crate::gradient::{Grad, Gradient, GradientMut, Tracked};
use crate::tensor::{Element, StreamRef};

use super::driver;

impl<'a> Gradient<'a> {
    /// A gradient in device memory of cudarc, to be used in work on `stream`.
    ///
    /// `stream` waits for cudarc's earlier writes to the memory, and each pass on a plan of it is recorded as a read, as
    /// cudarc's own launches do. The plan is made, updated and run on `stream`, which belongs to the `CudaContext` of the
    /// memory and to the blender's device; else [`Error::ForeignStream`](crate::Error::ForeignStream). It cannot be captured.
    pub fn cuda<T: Element>(memory: &'a CudaSlice<T>, stream: &'a CudaStream) -> Self {
        Self::cuda_view(memory.as_view(), stream)
    }

    /// A gradient in a part of device memory of cudarc, as [`cuda`](Self::cuda).
    pub fn cuda_view<T: Element>(memory: CudaView<'a, T>, stream: &'a CudaStream) -> Self {
        let (len, own) = (memory.len(), Arc::ptr_eq(memory.stream().context(), stream.context()));
        let (address, used) = memory.view_ptr(stream);
        gradient::<T>(address, len, used, own.then_some(stream), stream)
    }
}

impl<'a> GradientMut<'a> {
    /// A gradient in device memory of cudarc, to be written in work on `stream`.
    ///
    /// `stream` waits for cudarc's earlier work on the memory, and each pass on a plan of it is recorded as a write. Else
    /// as [`Gradient::cuda`].
    pub fn cuda<T: Element>(memory: &'a mut CudaSlice<T>, stream: &'a CudaStream) -> Self {
        Self::cuda_view(memory.as_view_mut(), stream)
    }

    /// A gradient in a part of device memory of cudarc, as [`cuda`](Self::cuda).
    pub fn cuda_view<T: Element>(memory: CudaViewMut<'a, T>, stream: &'a CudaStream) -> Self {
        let (len, own) = (memory.len(), Arc::ptr_eq(memory.stream().context(), stream.context()));
        let (address, used) = memory.view_ptr_mut(stream);
        GradientMut(gradient::<T>(address, len, used, own.then_some(stream), stream))
    }
}

/// `own` is the stream if it has the `CudaContext` of the memory: objects of cudarc with others do not know of each other.
fn gradient<'a, T: Element>(
    address: u64,
    len: usize,
    used: SyncOnDrop<'a>,
    own: Option<&'a CudaStream>,
    stream: &'a CudaStream,
) -> Gradient<'a> {
    // An empty one is not read, but must not look absent.
    let address = if len == 0 { size_of::<T>() as u64 } else { address };
    let grad = Grad { address, len: len as u64, dtype: T::DTYPE };
    let event = event(used).map(|event| event as &(dyn Any + Send + Sync));
    let owner = own.map(|stream| stream as &(dyn Any + Send + Sync));
    Gradient::tracked(grad, Tracked { stream: stream.into(), address, owner, event })
}

/// The event that cudarc would record when `used` is dropped. A plan records it after each pass instead: nothing depends
/// on when, or whether, the plan is dropped.
fn event(mut used: SyncOnDrop<'_>) -> Option<&CudaEvent> {
    match &mut used {
        SyncOnDrop::Record(target) => target.take().map(|(event, _)| event),
        SyncOnDrop::Sync(_) => None,
    }
}

/// Whether the memory and its stream belong to one `CudaContext`, and that to a context of the driver.
pub(super) fn belongs(tracked: &Tracked<'_>, context: CUcontext) -> bool {
    let stream = tracked.owner.and_then(|stream| stream.downcast_ref::<CudaStream>());
    stream.is_some_and(|stream| stream.context().cu_ctx() == context)
}

/// Records cudarc's event, if it tracks the memory and has more than one stream.
pub(super) fn submitted(tracked: &Tracked<'_>) -> Result<()> {
    let stream = tracked.owner.and_then(|stream| stream.downcast_ref::<CudaStream>());
    match (stream, tracked.event.and_then(|event| event.downcast_ref::<CudaEvent>())) {
        (Some(stream), Some(event)) if stream.context().is_managing_stream_synchronization() => {
            event.record(stream).or_else(|DriverError(result)| driver::check("cuEventRecord", result))
        }
        _ => Ok(()),
    }
}

impl<'a> From<&'a CudaStream> for StreamRef<'a> {
    fn from(stream: &'a CudaStream) -> Self {
        // SAFETY: the stream is alive while it is borrowed. Work that is pending when it is destroyed still finishes, and the
        // driver rejects a stream of another device.
        unsafe { StreamRef::from_raw(stream.cu_stream().cast()) }
    }
}

impl<'a> From<&'a Arc<CudaStream>> for StreamRef<'a> {
    fn from(stream: &'a Arc<CudaStream>) -> Self {
        stream.as_ref().into()
    }
}
