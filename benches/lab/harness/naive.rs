//! What the naive way is made of: a kernel for each step of the arithmetic, in plain Rust and by ndarray.

use gradblend::{bf16, f16};
use half::slice::HalfFloatSliceExt;
use ndarray::{ArrayView1, ArrayViewMut1, azip};

use super::lists::Real;

/// Elements that are converted together: they stay in the first-level cache.
const BLOCK: usize = 1024;

/// The four kernels that a user writes first.
pub(crate) struct Kernels<T> {
    /// out = t - g
    pub(crate) difference: fn(&[T], &[T], &mut [T]),
    pub(crate) dot: fn(&[T], &[T]) -> f32,
    /// out = w v
    pub(crate) scale: fn(f32, &[T], &mut [T]),
    /// out += w v
    pub(crate) axpy: fn(f32, &[T], &mut [T]),
}

/// An element that the kernels take.
pub(crate) trait Naive: Real {
    /// The kernels in plain Rust.
    const PLAIN: Kernels<Self>;
    /// The kernels of ndarray, which has them for f32.
    const NDARRAY: Option<Kernels<Self>>;
}

impl Naive for f32 {
    const PLAIN: Kernels<f32> =
        Kernels { difference: plain::difference, dot: plain::dot, scale: plain::scale, axpy: plain::axpy };
    const NDARRAY: Option<Kernels<f32>> =
        Some(Kernels { difference: nd::difference, dot: nd::dot, scale: nd::scale, axpy: nd::axpy });
}

/// Plain Rust on f32.
mod plain {
    pub(super) fn difference(t: &[f32], g: &[f32], out: &mut [f32]) {
        for ((out, t), g) in out.iter_mut().zip(t).zip(g) {
            *out = t - g;
        }
    }

    /// Sums side by side, which a compiler may keep in vectors; one alone is four times slower even beyond the cache.
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
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

    pub(super) fn scale(w: f32, v: &[f32], out: &mut [f32]) {
        for (out, v) in out.iter_mut().zip(v) {
            *out = w * v;
        }
    }

    pub(super) fn axpy(w: f32, v: &[f32], out: &mut [f32]) {
        for (out, v) in out.iter_mut().zip(v) {
            *out += w * v;
        }
    }
}

/// 16-bit elements: converted by `half` in blocks (with F16C where the processor has it, which is several times
/// faster than element by element), then the kernels of f32.
macro_rules! naive_16 {
    ($name:ident, $element:ty) => {
        impl Naive for $element {
            const PLAIN: Kernels<Self> =
                Kernels { difference: $name::difference, dot: $name::dot, scale: $name::scale, axpy: $name::axpy };
            const NDARRAY: Option<Kernels<Self>> = None;
        }

        mod $name {
            use super::*;

            pub(super) fn difference(t: &[$element], g: &[$element], out: &mut [$element]) {
                let (mut a, mut b, mut c) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
                for ((t, g), out) in t.chunks(BLOCK).zip(g.chunks(BLOCK)).zip(out.chunks_mut(BLOCK)) {
                    let (a, b, c) = (&mut a[..t.len()], &mut b[..t.len()], &mut c[..t.len()]);
                    t.convert_to_f32_slice(a);
                    g.convert_to_f32_slice(b);
                    plain::difference(a, b, c);
                    out.convert_from_f32_slice(c);
                }
            }

            pub(super) fn dot(a: &[$element], b: &[$element]) -> f32 {
                let (mut x, mut y, mut sum) = ([0.0; BLOCK], [0.0; BLOCK], 0.0);
                for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
                    let (x, y) = (&mut x[..a.len()], &mut y[..a.len()]);
                    a.convert_to_f32_slice(x);
                    b.convert_to_f32_slice(y);
                    sum += plain::dot(x, y);
                }
                sum
            }

            pub(super) fn scale(w: f32, v: &[$element], out: &mut [$element]) {
                let (mut x, mut y) = ([0.0; BLOCK], [0.0; BLOCK]);
                for (v, out) in v.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
                    let (x, y) = (&mut x[..v.len()], &mut y[..v.len()]);
                    v.convert_to_f32_slice(x);
                    plain::scale(w, x, y);
                    out.convert_from_f32_slice(y);
                }
            }

            pub(super) fn axpy(w: f32, v: &[$element], out: &mut [$element]) {
                let (mut x, mut y) = ([0.0; BLOCK], [0.0; BLOCK]);
                for (v, out) in v.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
                    let (x, y) = (&mut x[..v.len()], &mut y[..v.len()]);
                    v.convert_to_f32_slice(x);
                    out.convert_to_f32_slice(y);
                    plain::axpy(w, x, y);
                    out.convert_from_f32_slice(y);
                }
            }
        }
    };
}
naive_16!(half_f16, f16);
naive_16!(half_bf16, bf16);

/// The same kernels by ndarray.
mod nd {
    use super::*;

    pub(super) fn difference(t: &[f32], g: &[f32], out: &mut [f32]) {
        azip!((out in ArrayViewMut1::from(out), t in ArrayView1::from(t), g in ArrayView1::from(g)) *out = t - g);
    }

    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        ArrayView1::from(a).dot(&ArrayView1::from(b))
    }

    pub(super) fn scale(w: f32, v: &[f32], out: &mut [f32]) {
        azip!((out in ArrayViewMut1::from(out), v in ArrayView1::from(v)) *out = w * v);
    }

    pub(super) fn axpy(w: f32, v: &[f32], out: &mut [f32]) {
        ArrayViewMut1::from(out).scaled_add(w, &ArrayView1::from(v));
    }
}
