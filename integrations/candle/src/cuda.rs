//! Gradients in memory of candle's CUDA devices.

use std::ops::Range;
use std::sync::Arc;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, CudaStorage, Device};
use gradblend::{Gradient, GradientMut, StreamRef};

/// The stream of candle's work on a device; none on the CPU.
pub(crate) type Stream = Option<Arc<CudaStream>>;

pub(crate) fn ordinal(device: &CudaDevice) -> i32 {
    device.cuda_stream().context().ordinal() as i32
}

pub(crate) fn stream(device: &Device) -> Stream {
    match device {
        Device::Cuda(device) => Some(device.cuda_stream()),
        _ => None,
    }
}

pub(crate) fn handle(stream: &Stream) -> StreamRef<'_> {
    stream.as_ref().map(StreamRef::from).unwrap_or_default()
}

pub(crate) fn gradient<'a>(storage: &'a CudaStorage, range: Range<usize>, stream: &'a Stream) -> Option<Gradient<'a>> {
    let stream = stream.as_deref()?;
    match &storage.slice {
        CudaStorageSlice::F32(slice) => Some(Gradient::cuda_view(slice.slice(range), stream)),
        CudaStorageSlice::F16(slice) => Some(Gradient::cuda_view(slice.slice(range), stream)),
        CudaStorageSlice::BF16(slice) => Some(Gradient::cuda_view(slice.slice(range), stream)),
        _ => None,
    }
}

pub(crate) fn gradient_mut<'a>(storage: &'a mut CudaStorage, stream: &'a Stream) -> Option<GradientMut<'a>> {
    let stream = stream.as_deref()?;
    match &mut storage.slice {
        CudaStorageSlice::F32(slice) => Some(GradientMut::cuda(slice, stream)),
        CudaStorageSlice::F16(slice) => Some(GradientMut::cuda(slice, stream)),
        CudaStorageSlice::BF16(slice) => Some(GradientMut::cuda(slice, stream)),
        _ => None,
    }
}
