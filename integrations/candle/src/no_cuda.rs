//! Without the feature `cuda`, no tensor is on a CUDA device.

use std::ops::Range;

use candle_core::{CudaDevice, CudaStorage, Device};
use gradblend::{Gradient, GradientMut, StreamRef};

/// No stream.
pub(crate) type Stream = ();

pub(crate) fn ordinal(_: &CudaDevice) -> i32 {
    0
}

pub(crate) fn stream(_: &Device) -> Stream {}

pub(crate) fn handle(_: &Stream) -> StreamRef<'_> {
    StreamRef::default()
}

pub(crate) fn gradient<'a>(_: &'a CudaStorage, _: Range<usize>, _: &'a Stream) -> Option<Gradient<'a>> {
    None
}

pub(crate) fn gradient_mut<'a>(_: &'a mut CudaStorage, _: &'a Stream) -> Option<GradientMut<'a>> {
    None
}
