//! The naive steps on the CPU, in plain Rust and by ndarray.

use anyhow::{Result, ensure};
use gradblend_testkit::Sample;
use half::slice::HalfFloatSliceExt;
use ndarray::{ArrayView1, ArrayViewMut1, azip};
use rayon::prelude::*;

use crate::backend::Implementation;
use crate::case::Operation;
use crate::heap;
use crate::inputs::{Buffer, Inputs};
use crate::oracle::Sums;
use crate::per_tensor::{At, PerTensor, Steps};

/// The four loops on f32.
pub(crate) struct Kernels {
    /// out = t - g
    difference: fn(&[f32], &[f32], &mut [f32]),
    dot: fn(&[f32], &[f32]) -> f32,
    /// out = w v
    scale: fn(f32, &[f32], &mut [f32]),
    /// out += w v
    axpy: fn(f32, &[f32], &mut [f32]),
}

/// Plain Rust.
pub(crate) static PLAIN: Kernels = Kernels {
    difference: |t, g, out| out.iter_mut().zip(t).zip(g).for_each(|((out, t), g)| *out = t - g),
    dot: plain_dot,
    scale: |w, v, out| out.iter_mut().zip(v).for_each(|(out, v)| *out = w * v),
    axpy: |w, v, out| out.iter_mut().zip(v).for_each(|(out, v)| *out += w * v),
};

/// ndarray.
pub(crate) static NDARRAY: Kernels = Kernels {
    difference: |t, g, out| {
        azip!((out in ArrayViewMut1::from(out), t in ArrayView1::from(t), g in ArrayView1::from(g)) *out = t - g);
    },
    dot: |a, b| ArrayView1::from(a).dot(&ArrayView1::from(b)),
    scale: |w, v, out| azip!((out in ArrayViewMut1::from(out), v in ArrayView1::from(v)) *out = w * v),
    axpy: |w, v, out| ArrayViewMut1::from(out).scaled_add(w, &ArrayView1::from(v)),
};

/// Sums side by side, which a compiler keeps in vector registers: a single one is four times slower, even beyond the
/// cache.
fn plain_dot(a: &[f32], b: &[f32]) -> f32 {
    const SUMS: usize = 32;
    let mut sums = [0.0_f32; SUMS];
    let (a, b) = (a.chunks_exact(SUMS), b.chunks_exact(SUMS));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for i in 0..SUMS {
            sums[i] += a[i] * b[i];
        }
    }
    rest + sums.iter().sum::<f32>()
}

/// Elements that are converted together: three buffers of them stay in the first-level cache.
const BLOCK: usize = 1024;
type Block = [f32; BLOCK];

/// An element type that the loops on f32 can work on.
pub(crate) trait Convert: Sample {
    /// Elements that one call of a loop takes.
    const STEP: usize = BLOCK;
    fn widen<'a>(x: &'a [Self], block: &'a mut Block) -> &'a [f32];
    /// Calls `work` on `out` in f32; `read`: with its elements.
    fn update(out: &mut [Self], read: bool, work: impl FnOnce(&mut [f32]));
}

impl Convert for f32 {
    const STEP: usize = usize::MAX;

    fn widen<'a>(x: &'a [f32], _: &'a mut Block) -> &'a [f32] {
        x
    }

    fn update(out: &mut [f32], _: bool, work: impl FnOnce(&mut [f32])) {
        work(out);
    }
}

/// `half` converts a slice with F16C where the processor has it, which is several times faster than single elements.
macro_rules! convert {
    ($($element:ty),*) => {$(
        impl Convert for $element {
            fn widen<'a>(x: &'a [Self], block: &'a mut Block) -> &'a [f32] {
                x.convert_to_f32_slice(&mut block[..x.len()]);
                &block[..x.len()]
            }

            fn update(out: &mut [Self], read: bool, work: impl FnOnce(&mut [f32])) {
                let mut block = [0.0; BLOCK];
                let block = &mut block[..out.len()];
                if read {
                    out.convert_to_f32_slice(block);
                }
                work(block);
                out.convert_from_f32_slice(block);
            }
        }
    )*};
}
convert!(gradblend::f16, gradblend::bf16);

/// Elements of a task of the thread pool. A shorter operation costs more on two threads than on one.
const PIECE: usize = 1 << 16;

fn dot<T: Convert>(a: &[T], b: &[T], kernel: fn(&[f32], &[f32]) -> f32) -> f64 {
    let piece = |(a, b): (&[T], &[T])| {
        let (mut x, mut y) = ([0.0; BLOCK], [0.0; BLOCK]);
        let blocks = a.chunks(T::STEP).zip(b.chunks(T::STEP));
        f64::from(blocks.map(|(a, b)| kernel(T::widen(a, &mut x), T::widen(b, &mut y))).sum::<f32>())
    };
    if a.len() <= PIECE { piece((a, b)) } else { a.par_chunks(PIECE).zip(b.par_chunks(PIECE)).map(piece).sum() }
}

/// Calls `kernel` with blocks of the inputs and of the output.
fn write<T: Convert>(out: &mut [T], read: bool, [a, b]: [&[T]; 2], kernel: impl Fn(&[f32], &[f32], &mut [f32]) + Sync) {
    let piece = |(out, (a, b)): (&mut [T], (&[T], &[T]))| {
        let (mut x, mut y) = ([0.0; BLOCK], [0.0; BLOCK]);
        for ((out, a), b) in out.chunks_mut(T::STEP).zip(a.chunks(T::STEP)).zip(b.chunks(T::STEP)) {
            let (a, b) = (T::widen(a, &mut x), T::widen(b, &mut y));
            T::update(out, read, |out| kernel(a, b, out));
        }
    };
    if out.len() <= PIECE {
        piece((out, (a, b)));
    } else {
        let inputs = a.par_chunks(PIECE).zip(b.par_chunks(PIECE));
        out.par_chunks_mut(PIECE).zip(inputs).for_each(piece);
    }
}

/// Steps that take a whole tensor each.
struct Loops<T> {
    kernels: &'static Kernels,
    /// t - g of one tensor at a time, reused, which is faster than a new allocation for each.
    difference: Vec<T>,
    sums: Sums,
}

impl<T: Convert> Steps<Inputs> for Loops<T> {
    fn begin_sums(&mut self, _: &mut Inputs) -> Result<()> {
        self.sums.c.fill(0.0);
        self.sums.d.fill(0.0);
        Ok(())
    }

    fn difference(&mut self, inputs: &mut Inputs, at: At) -> Result<()> {
        let [t, g] = [Buffer::Train, Buffer::Valid].map(|buffer| inputs.tensor::<T>(buffer, at.tensor));
        write(&mut self.difference[..t.len()], false, [t, g], self.kernels.difference);
        Ok(())
    }

    fn dots(&mut self, inputs: &mut Inputs, at: At, k: usize) -> Result<()> {
        let [g, v] = [Buffer::Valid, Buffer::Modality(k)].map(|buffer| inputs.tensor::<T>(buffer, at.tensor));
        self.sums.c[k] += dot(g, v, self.kernels.dot);
        self.sums.d[k] += dot(&self.difference[..v.len()], v, self.kernels.dot);
        Ok(())
    }

    fn blend(&mut self, inputs: &mut Inputs, at: At, k: usize, first: bool) -> Result<()> {
        let w = inputs.weights[k];
        let kernel = if first { self.kernels.scale } else { self.kernels.axpy };
        let (v, blended) = inputs.blend_operands::<T>(k, at.tensor);
        write(blended, !first, [v; 2], |v, _, out| kernel(w, v, out));
        Ok(())
    }

    fn sums(&mut self, _: &mut Inputs) -> Result<Sums> {
        Ok(self.sums.clone())
    }
}

/// The steps, on the thread pool where a tensor is divided among threads.
pub(crate) struct Naive<T> {
    per_tensor: PerTensor<Loops<T>>,
    /// No tensor is divided, so the thread pool need not be entered.
    single: bool,
}

impl<T: Convert> Naive<T> {
    pub(crate) fn new(inputs: &Inputs, operation: Operation, kernels: &'static Kernels) -> Result<Self> {
        let longest = inputs.longest();
        let len = if operation.dots() { longest } else { 0 };
        ensure!((len * size_of::<T>()) as u64 <= heap::free_bytes(), "no memory for t - g");
        // Not zeros, whose pages the system would allocate in the first round.
        let difference = vec![T::round(1.0); len];
        let sums = Sums::from_pending(vec![0.0; 2 * inputs.modalities]);
        let per_tensor = PerTensor { operation, steps: Loops { kernels, difference, sums } };
        Ok(Naive { per_tensor, single: longest <= PIECE })
    }
}

impl<T: Convert> Implementation<Inputs> for Naive<T> {
    fn run(&mut self, inputs: &mut Inputs, set: usize) -> Result<()> {
        if self.single { self.per_tensor.run(inputs, set) } else { rayon::scope(|_| self.per_tensor.run(inputs, set)) }
    }

    fn sums(&mut self, inputs: &mut Inputs) -> Result<Option<Sums>> {
        self.per_tensor.sums(inputs)
    }
}
