//! The inputs of a case. benches/README.md says how each number is made, for other programs to make the same.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use gradblend::{Element, bf16, f16};
use rayon::prelude::*;

use super::Operation;
use super::cases::{Case, Tensor};

/// Bytes that tensors are aligned to, as frameworks do it.
const ALIGNMENT: usize = 256;
/// Elements that one thread makes at a time.
const PIECE: usize = 1 << 16;

/// An element.
pub(crate) trait Real: Element + PartialEq {
    /// Half the distance from 1 to the next number.
    const EPSILON: f64;
    fn from_f32(x: f32) -> Self;
    fn to_f64(self) -> f64;
}

impl Real for f32 {
    const EPSILON: f64 = 1.0 / (1u64 << 24) as f64;
    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

macro_rules! real_16 {
    ($element:ty, $bits:literal) => {
        impl Real for $element {
            const EPSILON: f64 = 1.0 / (1u64 << $bits) as f64;
            fn from_f32(x: f32) -> Self {
                <$element>::from_f32(x)
            }
            fn to_f64(self) -> f64 {
                <$element>::to_f64(self)
            }
        }
    };
}
real_16!(f16, 11);
real_16!(bf16, 8);

/// A list's memory, aligned as frameworks align it.
pub(crate) struct Memory<T> {
    units: Vec<Unit>,
    len: usize,
    element: PhantomData<T>,
}

#[derive(Clone, Copy)]
#[repr(align(256))]
struct Unit(#[allow(dead_code, reason = "read as elements")] [u8; ALIGNMENT]);

impl<T: Real> Memory<T> {
    /// So many zeros.
    fn zeros(len: usize) -> Self {
        let units = (len * size_of::<T>()).div_ceil(ALIGNMENT);
        Memory { units: vec![Unit([0; ALIGNMENT]); units], len, element: PhantomData }
    }
}

impl<T: Real> Deref for Memory<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: there is room for `len` elements, and any bytes are one.
        unsafe { std::slice::from_raw_parts(self.units.as_ptr().cast(), self.len) }
    }
}

impl<T: Real> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.units.as_mut_ptr().cast(), self.len) }
    }
}

/// The gradients of a list of tensors. A list is one piece of memory; what is between its tensors, or absent, is zero.
pub(crate) struct Lists<T> {
    pub(crate) tensors: Vec<(Tensor, Range<usize>)>,
    /// Elements of each list, gaps included.
    pub(crate) len: usize,
    /// Empty where the operation does not read them.
    pub(crate) train: Memory<T>,
    pub(crate) valid: Memory<T>,
    pub(crate) modalities: Vec<Memory<T>>,
    /// Empty where the operation does not write it.
    pub(crate) blended: Memory<T>,
}

impl<T: Real> Lists<T> {
    pub(crate) fn new(case: &Case, operation: Operation) -> Self {
        let mut end = 0;
        let tensors = case.tensors().into_iter().map(|tensor| {
            let start = usize::next_multiple_of(end, ALIGNMENT / size_of::<T>()) + usize::from(case.misaligned);
            end = start + tensor.len;
            (tensor, start..end)
        });
        let mut lists = Lists::<T> {
            tensors: tensors.collect(),
            len: 0,
            train: Memory::zeros(0),
            valid: Memory::zeros(0),
            modalities: Vec::new(),
            blended: Memory::zeros(0),
        };
        lists.len = end.next_multiple_of(ALIGNMENT / size_of::<T>());
        if operation.dots() {
            lists.valid = lists.random(1, |tensor| tensor.fused);
            lists.train = lists.random(0, |tensor| tensor.fused);
            if case.near {
                let pairs = lists.train.par_iter_mut().zip(lists.valid.par_iter());
                pairs.for_each(|(t, g)| *t = T::from_f32(g.to_f64() as f32 + t.to_f64() as f32 / 64.0));
            }
        }
        lists.modalities =
            (0..case.modalities).map(|k| lists.random(2 + k as u64, |tensor| tensor.present(k))).collect();
        if operation.blends() {
            lists.blended = Memory::zeros(lists.len);
        }
        lists
    }

    fn random(&self, list: u64, there: impl Fn(&Tensor) -> bool) -> Memory<T> {
        let mut memory = Memory::<T>::zeros(self.len);
        let mut first = 0;
        for (tensor, range) in &self.tensors {
            if there(tensor) {
                memory[range.clone()].par_chunks_mut(PIECE).enumerate().for_each(|(piece, out)| {
                    let start = first + (piece * PIECE) as u64;
                    out.iter_mut().zip(start..).for_each(|(x, index)| *x = T::from_f32(number(list, index)));
                });
            }
            first += tensor.len as u64;
        }
        memory
    }

    /// All lists of the operation: t, g, the v_k, and the blended one.
    pub(crate) fn all(&self) -> impl Iterator<Item = &[T]> {
        let lists = [&self.train, &self.valid].into_iter().chain(&self.modalities).chain([&self.blended]);
        lists.map(|list| &**list).filter(|list| !list.is_empty())
    }
}

/// A number in [-1, 1) that depends on list and element alone: splitmix64 (Steele, Lea, Flood 2014).
fn number(list: u64, index: u64) -> f32 {
    let mut x = ((list << 40) + index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x >> 40) as i32 - (1 << 23)) as f32 / (1 << 23) as f32
}
