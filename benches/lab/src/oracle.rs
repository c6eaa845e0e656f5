//! The expected results: naive loops in f64 that share no code with any implementation.

use std::ops::Range;

use anyhow::{Result, ensure};
use gradblend_testkit::Sample;
use rayon::prelude::*;

use crate::case::Operation;
use crate::inputs::{Buffer, Inputs};
use crate::record::Errors;

/// Elements that one task of the thread pool adds up.
const PIECE: usize = 1 << 16;

/// The sums c_k and d_k of each modality.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sums {
    pub(crate) c: Vec<f64>,
    pub(crate) d: Vec<f64>,
    /// Whether d has |d_k|, its square root being all that a report of gradblend knows.
    pub(crate) unsigned: bool,
}

impl Sums {
    /// From the c_k, followed by the d_k.
    pub(crate) fn from_pending(mut both: Vec<f64>) -> Self {
        let d = both.split_off(both.len() / 2);
        Sums { c: both, d, unsigned: false }
    }
}

/// The exact sums, and those of the absolute terms.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exact {
    pub(crate) c: Vec<f64>,
    pub(crate) d: Vec<f64>,
    /// sum |g v_k|
    pub(crate) c_size: Vec<f64>,
    /// sum |(t - g) v_k|
    pub(crate) d_size: Vec<f64>,
    /// sum |t v_k| + |g v_k|: the terms where products are added before they are subtracted.
    d_size_of_products: Vec<f64>,
}

/// How far an implementation's arithmetic may be from the exact result. The bounds are for random inputs: a few times the
/// error that their roundings add up to. The errors that were found are in the raw results.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    /// Of c_k and d_k, relative to the sum of the absolute terms.
    pub(crate) sums: f64,
    /// Added to it, in roundings to the dtype: of each t - g, or of each tensor's result.
    pub(crate) roundings: f64,
    /// Whether d_k is a difference of two sums.
    pub(crate) cancels: bool,
    /// Roundings of a blended element to the dtype.
    pub(crate) blend: f64,
}

/// The naive steps: sums in f32, and t - g and the blend rounded to the dtype at each step, of at most 32 modalities.
pub(crate) const NAIVE: Bound = Bound { sums: 1.0 / 8192.0, roundings: 1.0, cancels: false, blend: 33.0 };

/// gradblend's results: the guaranteed accuracy of the sums, and one rounding of the blend.
pub(crate) const OURS: Bound = Bound { sums: 1.0 / 65536.0, roundings: 0.0, cancels: false, blend: 1.0 };

pub(crate) fn exact<T: Sample>(inputs: &Inputs) -> Exact {
    let mut exact = Exact::default();
    let (t, g) = (inputs.buffer::<T>(Buffer::Train), inputs.buffer::<T>(Buffer::Valid));
    for k in 0..inputs.modalities {
        let v = inputs.buffer::<T>(Buffer::Modality(k));
        let piece = |start: usize| {
            let range = start..v.len().min(start + PIECE);
            let elements = t[range.clone()].iter().zip(&g[range.clone()]).zip(&v[range]);
            elements.fold([0.0; 5], |[c, d, c_size, d_size, products], ((t, g), v)| {
                let (t, g, v) = (t.exact(), g.exact(), v.exact());
                let (tv, gv, dv) = (t * v, g * v, (t - g) * v);
                [c + gv, d + dv, c_size + gv.abs(), d_size + dv.abs(), products + tv.abs() + gv.abs()]
            })
        };
        let add = |a: [f64; 5], b: [f64; 5]| std::array::from_fn(|i| a[i] + b[i]);
        let starts = (0..v.len()).into_par_iter().step_by(PIECE);
        let [c, d, c_size, d_size, products] = starts.map(piece).reduce(Default::default, add);
        exact.c.push(c);
        exact.d.push(d);
        exact.c_size.push(c_size);
        exact.d_size.push(d_size);
        exact.d_size_of_products.push(products);
    }
    exact
}

/// Compares the results of an operation with the exact ones; an error names the first that is out of bounds.
pub(crate) fn check<T: Sample>(
    inputs: &Inputs,
    operation: Operation,
    exact: &Exact,
    got: Option<&Sums>,
    bound: Bound,
) -> Result<Errors> {
    let mut errors = Errors::default();
    if operation.dots() {
        let got = got.ok_or_else(|| anyhow::anyhow!("it has no sums"))?;
        let relative = bound.sums + bound.roundings * T::EPS;
        let d_exact: Vec<f64> = exact.d.iter().map(|d| if got.unsigned { d.abs() } else { *d }).collect();
        let d_terms = if bound.cancels { &exact.d_size_of_products } else { &exact.d_size };
        // Returns the largest error relative to `size`; `terms` is what the bound is relative to.
        let compare = |name, got: &[f64], exact: &[f64], size: &[f64], terms: &[f64]| -> Result<f64> {
            let mut worst = 0.0_f64;
            ensure!(got.len() == exact.len(), "{} sums {name}, not {}", got.len(), exact.len());
            for k in 0..got.len() {
                let error = (got[k] - exact[k]).abs();
                // False for a NaN.
                ensure!(error <= relative * terms[k], "{name}_{k} is {}, not {}", got[k], exact[k]);
                worst = worst.max(error / size[k]);
            }
            Ok(worst)
        };
        errors.error_c = Some(compare("c", &got.c, &exact.c, &exact.c_size, &exact.c_size)?);
        errors.error_d = Some(compare("d", &got.d, &d_exact, &exact.d_size, d_terms)?);
    }
    if operation.blends() {
        errors.error_blend = Some(check_blend::<T>(inputs, bound.blend)?);
    }
    Ok(errors)
}

/// The largest error of a blended element relative to sum_k |w_k v_k|, or to 2^-12 where that is smaller.
fn check_blend<T: Sample>(inputs: &Inputs, roundings: f64) -> Result<f64> {
    let relative = (2.0 * inputs.modalities as f64 + 1.0) / f64::from(1 << 24) + roundings * T::EPS;
    // Below the normal numbers of f16, a rounding is at most this much.
    let least = roundings / f64::from(1 << 25);
    let blended = inputs.buffer::<T>(Buffer::Blended);
    let modalities: Vec<&[T]> = (0..inputs.modalities).map(|k| inputs.buffer(Buffer::Modality(k))).collect();
    let error = |i: usize| {
        let terms = || modalities.iter().zip(&inputs.weights).map(|(v, w)| v[i].exact() * f64::from(*w));
        let (want, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
        let (got, bound) = (blended[i].exact(), size * relative + least);
        let error = (got - want).abs();
        ensure!(error <= bound, "element {i} of the blend is {got}, not {want}");
        Ok(error / size.max(1.0 / 4096.0))
    };
    let worst = |a: f64, b: f64| Ok(a.max(b));
    let tensor = |(_, range): &(_, Range<usize>)| {
        range.clone().into_par_iter().with_min_len(PIECE).map(error).try_reduce(|| 0.0, worst)
    };
    inputs.tensors.par_iter().with_min_len(64).map(tensor).try_reduce(|| 0.0, worst)
}
