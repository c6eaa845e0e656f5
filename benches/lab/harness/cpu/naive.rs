//! The naive way, by kernels in plain Rust or of ndarray.

use std::hint::black_box;

use rayon::prelude::*;

use super::super::Way;
use super::super::heap;
use super::super::lists::{Lists, Real};
use super::super::naive::Kernels;
use super::super::oracle::Sums;
use super::Inputs;

/// t - g, then two dots a modality, then a product and axpys, each operation over a whole tensor.
pub(super) struct Separately<T: 'static> {
    kernels: &'static Kernels<T>,
    /// Room for t - g of the largest tensor, used again for each: kinder than allocating it.
    difference: Vec<T>,
    /// No tensor is longer than a piece, so nothing is shared out, and a pool's threads would only have to be woken.
    alone: bool,
    sums: Sums,
}

impl<T: Real> Separately<T> {
    pub(super) fn new(inputs: &Inputs<T>, kernels: &'static Kernels<T>) -> Result<Self, String> {
        let dots = inputs.operation.dots();
        let longest = inputs.lists.tensors.iter().map(|(tensor, _)| tensor.len).max().unwrap_or(0);
        let alone = inputs.threads == 1 || longest <= PIECE;
        let longest = if dots { longest } else { 0 };
        let needed = (longest * size_of::<T>()) as u64;
        if needed > heap::free() {
            return Err(format!("needs {:.1} GB for t - g", needed as f64 / 1e9));
        }
        Ok(Separately { kernels, difference: vec![T::from_f32(1.0); longest], alone, sums: Sums::default() })
    }
}

impl<T: Real> Way<Inputs<T>> for Separately<T> {
    fn run(&mut self, inputs: &mut Inputs<T>, _: usize) {
        let Inputs { operation, threads, pool, weights, lists, .. } = inputs;
        let Lists { tensors, train, valid, modalities, blended, .. } = lists;
        let (operation, threads) = (*operation, *threads);
        let mut all = || {
            let mut sums = Sums { c: vec![0.0; weights.len()], d: vec![0.0; weights.len()], unsigned: false };
            for (tensor, range) in &*tensors {
                let v = |k: usize| &modalities[k][range.clone()];
                let present = || (0..weights.len()).filter(|k| tensor.present(*k));
                if tensor.dots(operation) {
                    let (t, g) = (&train[range.clone()], &valid[range.clone()]);
                    let difference = &mut self.difference[..range.len()];
                    write(threads, difference, [t, g], |out, [t, g]| (self.kernels.difference)(t, g, out));
                    for k in present() {
                        sums.c[k] += dot(threads, g, v(k), self.kernels.dot);
                        sums.d[k] += dot(threads, difference, v(k), self.kernels.dot);
                    }
                }
                if operation.blends() {
                    let blended = &mut blended[range.clone()];
                    for (nth, k) in present().enumerate() {
                        // The first needs no zeros to add to: a list less than K axpys.
                        let kernel = if nth == 0 { self.kernels.scale } else { self.kernels.axpy };
                        write(threads, blended, [v(k), v(k)], |out, [v, _]| kernel(weights[k], v, out));
                    }
                }
            }
            sums
        };
        self.sums = black_box(if self.alone { all() } else { pool.install(all) });
    }

    fn sums(&mut self, _: &mut Inputs<T>) -> Option<Sums> {
        Some(self.sums.clone())
    }
}

/// Elements of a piece of the naive way: below, an operation is not worth a second thread.
const PIECE: usize = 1 << 16;

fn dot<T: Real>(threads: usize, a: &[T], b: &[T], kernel: fn(&[T], &[T]) -> f32) -> f64 {
    let piece = |(a, b): (&[T], &[T])| f64::from(kernel(a, b));
    if threads == 1 || a.len() <= PIECE {
        a.chunks(PIECE).zip(b.chunks(PIECE)).map(piece).sum()
    } else {
        a.par_chunks(PIECE).zip(b.par_chunks(PIECE)).map(piece).sum()
    }
}

fn write<T: Real>(threads: usize, out: &mut [T], [a, b]: [&[T]; 2], kernel: impl Fn(&mut [T], [&[T]; 2]) + Sync) {
    if threads == 1 || out.len() <= PIECE {
        kernel(out, [a, b]);
    } else {
        let inputs = a.par_chunks(PIECE).zip(b.par_chunks(PIECE));
        out.par_chunks_mut(PIECE).zip(inputs).for_each(|(out, (a, b))| kernel(out, [a, b]));
    }
}
