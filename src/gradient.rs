//! One gradient as the caller holds it: a slice, or device memory that its owner tracks.

use std::any::Any;
use std::marker::PhantomData;

use crate::tensor::{DType, Element, StreamRef};

/// Address, length and dtype of one gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grad {
    pub(crate) address: u64,
    pub(crate) len: u64,
    pub(crate) dtype: DType,
}

impl Grad {
    pub(crate) fn from_slice<T: Element>(slice: &[T]) -> Self {
        Grad { address: slice.as_ptr().expose_provenance() as u64, len: slice.len() as u64, dtype: T::DTYPE }
    }

    pub(crate) fn from_slice_mut<T: Element>(slice: &mut [T]) -> Self {
        Grad { address: slice.as_mut_ptr().expose_provenance() as u64, len: slice.len() as u64, dtype: T::DTYPE }
    }

    pub(crate) fn from_raw(address: u64, len: u64, dtype: DType) -> Option<Self> {
        (address != 0).then_some(Grad { address, len, dtype })
    }
}

/// Memory of a device in use on a stream, which its owner must know of. It has no drop, so a plan may be dropped after what it
/// borrows.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "without the feature cuda, no memory is tracked")]
pub(crate) struct Tracked<'a> {
    /// The stream that waits for the owner's work on the memory.
    pub(crate) stream: StreamRef<'a>,
    pub(crate) address: u64,
    /// The owner's stream and event, of types that the backend of the device knows. No stream: that of another owner.
    pub(crate) owner: Option<&'a (dyn Any + Send + Sync)>,
    pub(crate) event: Option<&'a (dyn Any + Send + Sync)>,
}

/// A gradient that is read, with a dtype that is known at run time: for
/// [`TensorGrads::from_gradients`](crate::TensorGrads::from_gradients).
///
/// Made from a `&[T]`; with the feature `cuda` also from a `CudaSlice` or a view of one, by `Gradient::cuda`.
#[derive(Debug)]
pub struct Gradient<'a> {
    pub(crate) grad: Grad,
    pub(crate) slice: bool,
    pub(crate) tracked: Option<Tracked<'a>>,
    borrow: PhantomData<&'a [u8]>,
}

impl<'a> Gradient<'a> {
    fn from_host(grad: Grad) -> Self {
        Gradient { grad, slice: true, tracked: None, borrow: PhantomData }
    }

    #[allow(dead_code, reason = "without the feature cuda, no memory is tracked")]
    pub(crate) fn tracked(grad: Grad, tracked: Tracked<'a>) -> Self {
        Gradient { grad, slice: false, tracked: Some(tracked), borrow: PhantomData }
    }
}

impl<'a, T: Element> From<&'a [T]> for Gradient<'a> {
    fn from(slice: &'a [T]) -> Self {
        Gradient::from_host(Grad::from_slice(slice))
    }
}

/// A gradient that is written, for [`TensorGrads::from_gradients`](crate::TensorGrads::from_gradients).
///
/// Made from a `&mut [T]`; with the feature `cuda` also from a `CudaSlice` or a view of one, by `GradientMut::cuda`.
#[derive(Debug)]
pub struct GradientMut<'a>(pub(crate) Gradient<'a>);

impl<'a, T: Element> From<&'a mut [T]> for GradientMut<'a> {
    fn from(slice: &'a mut [T]) -> Self {
        GradientMut(Gradient::from_host(Grad::from_slice_mut(slice)))
    }
}
