//! Gradients of one tensor, with random elements.

use std::ops::{Deref, DerefMut};

use gradblend::TensorGrads;

use crate::{Random, Sample};

/// Lengths at which a kernel's path changes: vectors of 4 and 8 elements, one round of a warp and of a thread block, the
/// chunk of a warp (8,192) and of a thread block (65,536).
pub const LENGTHS: [usize; 24] = [
    0, 1, 3, 4, 5, 7, 8, 9, 63, 255, 256, 257, 1023, 1024, 1025, 4099, 8191, 8192, 8193, 65_535, 65_536, 65_537,
    131_080, 200_000,
];

/// One buffer of a tensor. Its elements start `offset` elements into its memory, so that tests choose its alignment.
#[derive(Clone, Debug)]
pub struct Buffer<T> {
    /// Elements in `memory` before the first one of the buffer.
    pub offset: usize,
    /// All elements.
    pub memory: Vec<T>,
}

impl<T: Sample> Buffer<T> {
    /// `len` random elements, `offset` elements into their memory.
    pub fn random(random: &mut Random, len: usize, offset: usize) -> Self {
        Buffer { offset, memory: (0..len + offset).map(|_| T::round(random.number())).collect() }
    }

    /// The same elements at another offset.
    pub fn at_offset(&self, offset: usize) -> Self {
        let before = std::iter::repeat_n(T::round(0.0), offset);
        Buffer { offset, memory: before.chain(self.iter().copied()).collect() }
    }
}

impl<T> From<Vec<T>> for Buffer<T> {
    fn from(memory: Vec<T>) -> Self {
        Buffer { offset: 0, memory }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.memory[self.offset..]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.offset..]
    }
}

/// Where the blended gradient of a tensor is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Nowhere: the tensor is not blended.
    None,
    /// Into the buffer `blended`.
    Blended,
    /// Over the gradient of this modality.
    InPlace(usize),
}

/// The buffers of one tensor.
#[derive(Clone, Debug)]
pub struct Tensor<T> {
    /// The train gradient t.
    pub train: Buffer<T>,
    /// The validation gradient g.
    pub valid: Buffer<T>,
    /// The modality gradients v_k; `None` is absent.
    pub modalities: Vec<Option<Buffer<T>>>,
    /// Memory for the blended gradient.
    pub blended: Buffer<T>,
    /// Whether `train` and `valid` are given to the library; without them the tensor is only blended.
    pub has_products: bool,
    /// Where the blended gradient is written.
    pub output: Output,
}

impl<T: Sample> Tensor<T> {
    /// A tensor of `len` random elements and `k` modalities, each of which is absent once in `absent` times (0: never).
    pub fn random(random: &mut Random, len: usize, k: usize, offset: usize, absent: usize) -> Self {
        let train = Buffer::random(random, len, offset);
        let valid = Buffer::random(random, len, offset);
        let modalities = (0..k)
            .map(|_| {
                let v = Buffer::random(random, len, offset);
                (absent == 0 || random.below(absent) != 0).then_some(v)
            })
            .collect();
        let blended = Buffer::random(random, len, offset);
        Tensor { train, valid, modalities, blended, has_products: true, output: Output::Blended }
    }

    /// Elements of each buffer.
    pub fn len(&self) -> usize {
        self.train.len()
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many modalities are present.
    pub fn present(&self) -> usize {
        self.modalities.iter().flatten().count()
    }

    /// All buffers but `blended`.
    pub fn inputs(&mut self) -> impl Iterator<Item = &mut Buffer<T>> {
        [&mut self.train, &mut self.valid].into_iter().chain(self.modalities.iter_mut().flatten())
    }

    /// All buffers.
    pub fn buffers(&mut self) -> impl Iterator<Item = &mut Buffer<T>> {
        [&mut self.train, &mut self.valid]
            .into_iter()
            .chain(self.modalities.iter_mut().flatten())
            .chain([&mut self.blended])
    }

    /// Multiplies all inputs by `factor`.
    pub fn scale(&mut self, factor: f64) {
        self.inputs().flat_map(|buffer| buffer.iter_mut()).for_each(|x| *x = T::round(x.exact() * factor));
    }

    /// The same elements, each buffer at a random offset from 0 to 3.
    pub fn scattered(&self, random: &mut Random) -> Self {
        let mut tensor = self.clone();
        tensor.buffers().for_each(|buffer| *buffer = buffer.at_offset(random.below(4)));
        tensor
    }

    /// The buffer that the blended gradient is written to; `blended` where there is none.
    pub fn written(&self) -> &Buffer<T> {
        match self.output {
            Output::InPlace(k) => self.modalities[k].as_ref().unwrap_or(&self.blended),
            _ => &self.blended,
        }
    }

    /// The tensor as slices, which need no `unsafe`.
    pub fn grads(&mut self) -> TensorGrads<'_> {
        let mut in_place = None;
        let mut refs: Vec<Option<&[T]>> = Vec::with_capacity(self.modalities.len());
        for (k, v) in self.modalities.iter_mut().enumerate() {
            if self.output == Output::InPlace(k) {
                in_place = v.as_deref_mut();
                refs.push(None);
            } else {
                refs.push(v.as_deref());
            }
        }
        let grads = match self.has_products {
            true => TensorGrads::new(&self.train, &self.valid, &refs),
            false => TensorGrads::blend_only(&refs),
        };
        match (self.output, in_place) {
            (Output::InPlace(k), Some(gradient)) => grads.in_place(k, gradient),
            (Output::Blended, _) => grads.blended(&mut self.blended),
            _ => grads,
        }
    }
}

/// Bits of elements, for comparisons that distinguish the two zeros.
pub fn bits<T: Sample>(elements: &[T]) -> Vec<u32> {
    elements.iter().map(|x| x.bits()).collect()
}

/// Bits of f64 numbers.
pub fn bits64(numbers: &[f64]) -> Vec<u64> {
    numbers.iter().map(|x| x.to_bits()).collect()
}
