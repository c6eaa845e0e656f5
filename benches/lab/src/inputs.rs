//! The inputs of a case. benches/README.md gives the formula, so that other programs make the same numbers.

use std::ops::Range;

use anyhow::Result;
use bytemuck::{Pod, Zeroable};
use gradblend::DType;
use gradblend_testkit::Sample;
use rayon::prelude::*;

use crate::case::{self, Case, Operation, Tensor};

/// Bytes that tensors are aligned to, as frameworks align them.
const ALIGNMENT: usize = 256;
/// Elements that one task of the thread pool makes.
const PIECE: usize = 1 << 16;

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

/// A buffer of a case.
#[derive(Clone, Copy)]
pub(crate) enum Buffer {
    /// The train gradient t.
    Train,
    /// The validation gradient g.
    Valid,
    /// The gradient v_k of modality k.
    Modality(usize),
    /// The blended gradient, which implementations write.
    Blended,
}

/// The gradients of a case. Each is one [`Buffer`], with the tensors in order. What lies between them, or is absent,
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
    /// In order of [`Inputs::index`].
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

    fn fill<T: Sample>(&mut self) {
        let inputs = self.index(Buffer::Blended);
        for (index, buffer) in self.buffers[..inputs].iter_mut().enumerate() {
            let elements = bytemuck::cast_slice_mut::<Unit, T>(buffer);
            let mut first = 0;
            for (tensor, range) in &self.tensors {
                if if index < 2 { tensor.has_fused() } else { tensor.present(index - 2) } {
                    elements[range.clone()].par_chunks_mut(PIECE).enumerate().for_each(|(piece, out)| {
                        let start = first + (piece * PIECE) as u64;
                        out.iter_mut().zip(start..).for_each(|(x, i)| *x = T::round(number(index as u64, i)));
                    });
                }
                first += tensor.len as u64;
            }
        }
    }

    /// The number of a buffer in the formula of [`number`]: t, g, each v_k, the blended gradient.
    pub(crate) fn index(&self, buffer: Buffer) -> usize {
        match buffer {
            Buffer::Train => 0,
            Buffer::Valid => 1,
            Buffer::Modality(k) => 2 + k,
            Buffer::Blended => 2 + self.modalities,
        }
    }

    pub(crate) fn buffer<T: Sample>(&self, buffer: Buffer) -> &[T] {
        bytemuck::cast_slice(&self.buffers[self.index(buffer)])
    }

    pub(crate) fn blended_mut<T: Sample>(&mut self) -> &mut [T] {
        let index = self.index(Buffer::Blended);
        bytemuck::cast_slice_mut(&mut self.buffers[index])
    }

    /// The elements of a tensor in a buffer.
    pub(crate) fn tensor<T: Sample>(&self, buffer: Buffer, tensor: usize) -> &[T] {
        &self.buffer(buffer)[self.tensors[tensor].1.clone()]
    }

    /// Of a tensor, v_k and the blended gradient.
    pub(crate) fn blend_operands<T: Sample>(&mut self, k: usize, tensor: usize) -> (&[T], &mut [T]) {
        let (v, blended) = (self.index(Buffer::Modality(k)), self.index(Buffer::Blended));
        let range = self.tensors[tensor].1.clone();
        let (inputs, output) = self.buffers.split_at_mut(blended);
        let v: &[T] = bytemuck::cast_slice(&inputs[v]);
        (&v[range.clone()], &mut bytemuck::cast_slice_mut(&mut output[0])[range])
    }

    /// Elements of the longest tensor.
    pub(crate) fn longest(&self) -> usize {
        self.tensors.iter().map(|(tensor, _)| tensor.len).max().unwrap_or(0)
    }

    /// The bytes of all buffers, in order of [`Inputs::index`].
    pub(crate) fn buffers(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.buffers.iter().map(|buffer| bytemuck::cast_slice(buffer))
    }

    /// The address of each buffer, in order of [`Inputs::index`]; gradblend writes to the last one.
    pub(crate) fn addresses(&mut self) -> Vec<u64> {
        self.buffers.iter_mut().map(|buffer| buffer.as_mut_ptr().expose_provenance() as u64).collect()
    }

    /// Bytes of the minimum traffic.
    pub(crate) fn minimum_traffic(&self, operation: Operation) -> usize {
        let tensors: Vec<Tensor> = self.tensors.iter().map(|(tensor, _)| *tensor).collect();
        case::minimum_traffic(&tensors, self.dtype, operation) as usize
    }

    /// The first buffer that takes part in an operation; those after it do, too, except for the blended gradient of a dot.
    pub(crate) fn first(&self, operation: Operation) -> Buffer {
        if operation.dots() { Buffer::Train } else { Buffer::Modality(0) }
    }

    /// The indices of the buffers that take part in an operation.
    pub(crate) fn indices(&self, operation: Operation) -> Range<usize> {
        let blended = self.index(Buffer::Blended);
        self.index(self.first(operation))..blended + usize::from(operation.blends())
    }
}

impl AsRef<Inputs> for Inputs {
    fn as_ref(&self) -> &Inputs {
        self
    }
}

/// A number in [-1, 1) that depends on buffer and element alone: SplitMix64 (Steele, Lea, Flood 2014).
fn number(buffer: u64, index: u64) -> f64 {
    let mut x = ((buffer << 40) + index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    f64::from((x >> 40) as i32 - (1 << 23)) / f64::from(1 << 23)
}
