//! Gradients and streams of cudarc: memory that its owner tracks by events, and frees or reuses only after them.

use std::any::Any;
use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, CudaView, CudaViewMut, DriverError, SyncOnDrop};

use crate::error::Result;
use crate::gradient::{Grad, Gradient, GradientMut, Tracked};
use crate::tensor::{Element, StreamRef};

use super::driver;

impl<'a> Gradient<'a> {
    /// A gradient in device memory of cudarc, to be used in work on `stream`.
    ///
    /// `stream` waits for cudarc's earlier writes to the memory, and each pass on a plan of it is recorded as a read, as
    /// cudarc's own launches do. The plan is made, updated and run on `stream`, else [`Error::ForeignStream`](crate::Error::ForeignStream), and cannot
    /// be captured.
    pub fn cuda<T: Element>(memory: &'a CudaSlice<T>, stream: &'a CudaStream) -> Self {
        Self::cuda_view(memory.as_view(), stream)
    }

    /// A gradient in a part of device memory of cudarc, as [`cuda`](Self::cuda).
    pub fn cuda_view<T: Element>(memory: CudaView<'a, T>, stream: &'a CudaStream) -> Self {
        let len = memory.len();
        let (address, used) = memory.view_ptr(stream);
        gradient::<T>(address, len, used, stream)
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
        let len = memory.len();
        let (address, used) = memory.view_ptr_mut(stream);
        GradientMut(gradient::<T>(address, len, used, stream))
    }
}

fn gradient<'a, T: Element>(address: u64, len: usize, used: SyncOnDrop<'a>, stream: &'a CudaStream) -> Gradient<'a> {
    // An empty one is not read, but must not look absent.
    let address = if len == 0 { size_of::<T>() as u64 } else { address };
    let grad = Grad { address, len: len as u64, dtype: T::DTYPE };
    let event = event(used).map(|event| event as &(dyn Any + Send + Sync));
    Gradient::tracked(grad, Tracked { stream: stream.into(), address, owner: (stream, event) })
}

/// The event that cudarc would record when `used` is dropped. A plan records it after each pass instead: nothing depends
/// on when, or whether, the plan is dropped.
fn event(mut used: SyncOnDrop<'_>) -> Option<&CudaEvent> {
    match &mut used {
        SyncOnDrop::Record(target) => target.take().map(|(event, _)| event),
        SyncOnDrop::Sync(_) => None,
    }
}

/// Records cudarc's event, if it tracks the memory and has more than one stream.
pub(super) fn submitted(tracked: &Tracked<'_>) -> Result<()> {
    let (stream, event) = tracked.owner;
    let owner = (stream.downcast_ref::<CudaStream>(), event.and_then(|event| event.downcast_ref::<CudaEvent>()));
    match owner {
        (Some(stream), Some(event)) if stream.context().is_managing_stream_synchronization() => {
            event.record(stream).or_else(|DriverError(result)| driver::check("cuEventRecord", result))
        }
        _ => Ok(()),
    }
}

impl<'a> From<&'a CudaStream> for StreamRef<'a> {
    fn from(stream: &'a CudaStream) -> Self {
        // SAFETY: the stream is alive while it is borrowed. Work that is pending when it is destroyed still finishes.
        unsafe { StreamRef::from_raw(stream.cu_stream().cast()) }
    }
}

impl<'a> From<&'a Arc<CudaStream>> for StreamRef<'a> {
    fn from(stream: &'a Arc<CudaStream>) -> Self {
        stream.as_ref().into()
    }
}
