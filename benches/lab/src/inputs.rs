//! The inputs of a case. benches/README.md gives the formula, so that other programs make the same numbers.

use std::ops::Range;

use anyhow::Result;
use bytemuck::{Pod, Zeroable};
use gradblend::{DType, Role, bf16, f16};
use rayon::prelude::*;

use crate::case::{self, Case, Operation, Tensor};

/// Bytes that tensors are aligned to, as frameworks align them.
const ALIGNMENT: usize = 256;
/// Elements that one task of the thread pool makes.
const PIECE: usize = 1 << 16;

/// An element type.
pub(crate) trait Real: Pod + Send + Sync {
    /// Half the distance from 1 to the next number.
    const ROUNDING: f64;
    fn from_f32(x: f32) -> Self;
    fn to_f64(self) -> f64;
}

macro_rules! real {
    ($($element:ty, $bits:literal, $from:expr, $to:expr;)*) => {$(
        impl Real for $element {
            const ROUNDING: f64 = 1.0 / (1u64 << $bits) as f64;
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
            fn to_f64(self) -> f64 {
                $to(self)
            }
        }
    )*};
}
real! {
    f32, 24, std::convert::identity, f64::from;
    f16, 11, f16::from_f32, f16::to_f64;
    bf16, 8, bf16::from_f32, bf16::to_f64;
}

/// Evaluates an expression with a type name bound to the element type of a dtype.
macro_rules! with_dtype {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            gradblend::DType::F32 => {
                type $element = f32;
                $body
            }
            gradblend::DType::F16 => {
                type $element = gradblend::f16;
                $body
            }
            gradblend::DType::BF16 => {
                type $element = gradblend::bf16;
                $body
            }
        }
    };
}
pub(crate) use with_dtype;

/// Memory that is aligned as frameworks align it.
#[derive(Clone, Copy)]
#[repr(C, align(256))]
struct Unit([u8; ALIGNMENT]);

// SAFETY: an array of bytes, whose size is its alignment, so there is no padding.
unsafe impl Zeroable for Unit {}
// SAFETY: as for `Zeroable`: any bytes are a valid value.
unsafe impl Pod for Unit {}

/// The gradients of a case. Each role has one buffer, with the tensors in order. What lies between them, or is absent,
/// is 0.
pub(crate) struct Inputs {
    pub(crate) dtype: DType,
    pub(crate) modalities: usize,
    /// Each tensor, and its elements in every buffer.
    pub(crate) tensors: Vec<(Tensor, Range<usize>)>,
    /// Bytes of each buffer, gaps included.
    pub(crate) buffer_bytes: usize,
    /// Weights of the blend.
    pub(crate) weights: Vec<f32>,
    /// By [`Inputs::place`].
    buffers: Vec<Vec<Unit>>,
}

impl Inputs {
    pub(crate) fn new(case: &Case) -> Result<Self> {
        let per_unit = ALIGNMENT / case.dtype.bytes() as usize;
        let mut end = 0;
        let tensors = case.tensors()?.into_iter().map(|tensor| {
            let start = usize::next_multiple_of(end, per_unit) + usize::from(case.misaligned);
            end = start + tensor.len;
            (tensor, start..end)
        });
        let tensors: Vec<_> = tensors.collect();
        let units = end.div_ceil(per_unit);
        let mut inputs = Inputs {
            dtype: case.dtype,
            modalities: case.modalities,
            tensors,
            buffer_bytes: units * ALIGNMENT,
            weights: (0..case.modalities).map(|k| 0.125 + k as f32 / 16.0).collect(),
            buffers: vec![vec![Unit([0; ALIGNMENT]); units]; case.modalities + 3],
        };
        with_dtype!(case.dtype, T => inputs.fill::<T>());
        Ok(inputs)
    }

    fn fill<T: Real>(&mut self) {
        let blended = self.place(Role::Blended);
        for (place, buffer) in self.buffers[..blended].iter_mut().enumerate() {
            let elements = bytemuck::cast_slice_mut::<Unit, T>(buffer);
            let mut first = 0;
            for (tensor, range) in &self.tensors {
                if if place < 2 { tensor.has_fused() } else { tensor.present(place - 2) } {
                    elements[range.clone()].par_chunks_mut(PIECE).enumerate().for_each(|(piece, out)| {
                        let start = first + (piece * PIECE) as u64;
                        out.iter_mut().zip(start..).for_each(|(x, i)| *x = T::from_f32(number(place as u64, i)));
                    });
                }
                first += tensor.len as u64;
            }
        }
    }

    /// Which of the buffers has a role: t, g, each v_k, and the blended gradient.
    pub(crate) fn place(&self, role: Role) -> usize {
        match role {
            Role::Train => 0,
            Role::Valid => 1,
            Role::Modality(k) => 2 + k,
            Role::Blended | Role::Tensor => 2 + self.modalities,
        }
    }

    pub(crate) fn buffer<T: Real>(&self, role: Role) -> &[T] {
        bytemuck::cast_slice(&self.buffers[self.place(role)])
    }

    pub(crate) fn blended_mut<T: Real>(&mut self) -> &mut [T] {
        let place = self.place(Role::Blended);
        bytemuck::cast_slice_mut(&mut self.buffers[place])
    }

    /// t and g, the modalities, and the blended gradient to write to, of one tensor.
    pub(crate) fn split<T: Real>(&mut self, range: Range<usize>) -> ([&[T]; 2], Vec<&[T]>, &mut [T]) {
        let blended = self.place(Role::Blended);
        let (inputs, output) = self.buffers.split_at_mut(blended);
        let mut lists = inputs.iter().map(|buffer| &bytemuck::cast_slice::<Unit, T>(buffer)[range.clone()]);
        let fused = [lists.next().unwrap_or_default(), lists.next().unwrap_or_default()];
        (fused, lists.collect(), &mut bytemuck::cast_slice_mut(&mut output[0])[range.clone()])
    }

    /// The bytes of all buffers, in order of [`Inputs::place`].
    pub(crate) fn buffers(&self) -> impl Iterator<Item = &[u8]> {
        self.buffers.iter().map(|buffer| bytemuck::cast_slice(buffer))
    }

    /// The address of each buffer, in order of [`Inputs::place`]; gradblend writes to the last one.
    pub(crate) fn addresses(&mut self) -> Vec<u64> {
        self.buffers.iter_mut().map(|buffer| buffer.as_mut_ptr().expose_provenance() as u64).collect()
    }

    /// Bytes of the minimum traffic.
    pub(crate) fn minimum_traffic(&self, operation: Operation) -> usize {
        let tensors: Vec<Tensor> = self.tensors.iter().map(|(tensor, _)| *tensor).collect();
        case::minimum_traffic(&tensors, self.dtype, operation) as usize
    }

    /// The places of the buffers that take part in an operation.
    pub(crate) fn places(&self, operation: Operation) -> Range<usize> {
        let blended = self.place(Role::Blended);
        let first = if operation.dots() { 0 } else { 2 };
        first..blended + usize::from(operation.blends())
    }
}

/// A number in [-1, 1) that depends on buffer and element alone: SplitMix64 (Steele, Lea, Flood 2014).
fn number(buffer: u64, index: u64) -> f32 {
    let mut x = ((buffer << 40) + index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x >> 40) as i32 - (1 << 23)) as f32 / (1 << 23) as f32
}
