//! What is right: naive loops in f64, which share nothing with any contender.

use std::ops::Range;

use rayon::prelude::*;

use super::lists::{Lists, Real};

/// Errors of a blended element are in parts of this if its terms add up to less.
const TINY: f64 = 1.0 / 4096.0;

/// Elements that one thread adds up at a time.
const PIECE: usize = 1 << 16;

/// Sums c_k and d_k of each modality.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sums {
    pub(crate) c: Vec<f64>,
    pub(crate) d: Vec<f64>,
    /// Whether the d_k are what they are, or |d_k|.
    pub(crate) unsigned: bool,
}

impl Sums {
    /// Of the c_k, and the d_k behind them.
    pub(crate) fn of(mut both: Vec<f64>) -> Self {
        let d = both.split_off(both.len() / 2);
        Sums { c: both, d, unsigned: false }
    }
}

/// The sums, and those of the absolute terms.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exact {
    pub(crate) c: Vec<f64>,
    pub(crate) d: Vec<f64>,
    /// sum |g v_k|
    pub(crate) c_size: Vec<f64>,
    /// sum |(t - g) v_k|
    pub(crate) d_size: Vec<f64>,
    /// sum |t v_k| + |g v_k|: what cancels if the products are added up before they are subtracted.
    pub(crate) d_apart: Vec<f64>,
}

/// How far a contender's arithmetic may be off. A bound for random data, a few times what its roundings add up to, so that
/// it tells a wrong result from a rounded one; what was found is in the raw results.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    /// Of c_k and d_k, in parts of the sum of the absolute terms.
    pub(crate) sums: f64,
    /// Further, in roundings to the dtype: of each t - g, or of each tensor's result.
    pub(crate) roundings: f64,
    /// Whether d_k is a difference of two sums.
    pub(crate) cancels: bool,
    /// Roundings of a blended element to the dtype.
    pub(crate) blend: f64,
}

/// What a contender was found to be off by, at most: in parts of the sum of the absolute terms.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Errors {
    pub(crate) c: Option<f64>,
    pub(crate) d: Option<f64>,
    pub(crate) blend: Option<f64>,
}

pub(crate) fn exact<T: Real>(lists: &Lists<T>) -> Exact {
    let mut exact = Exact::default();
    if lists.train.is_empty() {
        return exact;
    }
    for v in &lists.modalities {
        let product = |range: Range<usize>| {
            let inputs = lists.train[range.clone()].iter().zip(&lists.valid[range.clone()]).zip(&v[range]);
            inputs.fold([0.0; 5], |[c, d, c_size, d_size, d_apart], ((t, g), v)| {
                let (t, g, v) = (t.to_f64(), g.to_f64(), v.to_f64());
                let (tv, gv, dv) = (t * v, g * v, (t - g) * v);
                [c + gv, d + dv, c_size + gv.abs(), d_size + dv.abs(), d_apart + tv.abs() + gv.abs()]
            })
        };
        // An absent list is zero, and so are the gaps.
        let pieces = (0..lists.len).into_par_iter().step_by(PIECE).map(|at| at..lists.len.min(at + PIECE));
        let add = |a: [f64; 5], b: [f64; 5]| std::array::from_fn(|i| a[i] + b[i]);
        let [c, d, c_size, d_size, d_apart] = pieces.map(product).reduce(Default::default, add);
        exact.c.push(c);
        exact.d.push(d);
        exact.c_size.push(c_size);
        exact.d_size.push(d_size);
        exact.d_apart.push(d_apart);
    }
    exact
}

/// Compares what a contender computed; says what is further off than `bound`.
pub(crate) fn check<T: Real>(
    lists: &Lists<T>,
    weights: &[f32],
    exact: &Exact,
    got: Option<&Sums>,
    bound: Bound,
) -> Result<Errors, String> {
    let mut errors = Errors::default();
    if let Some(got) = got {
        let part = bound.sums + bound.roundings * T::EPSILON;
        let (mut c_error, mut d_error) = (0.0_f64, 0.0_f64);
        for (k, (c, d)) in got.c.iter().zip(&got.d).enumerate() {
            let d_exact = if got.unsigned { exact.d[k].abs() } else { exact.d[k] };
            let (c_off, d_off) = ((c - exact.c[k]).abs(), (d - d_exact).abs());
            let d_size = if bound.cancels { exact.d_apart[k] } else { exact.d_size[k] };
            // Written so that NaN is off, too.
            let within = |off: f64, size: f64| off <= part * size;
            if !within(c_off, exact.c_size[k]) {
                return Err(format!("c_{k} is {c}, not {}", exact.c[k]));
            }
            if !within(d_off, d_size) {
                return Err(format!("d_{k} is {d}, not {d_exact}"));
            }
            c_error = c_error.max(c_off / exact.c_size[k]);
            d_error = d_error.max(d_off / exact.d_size[k]);
        }
        (errors.c, errors.d) = (Some(c_error), Some(d_error));
    }
    if !lists.blended.is_empty() {
        errors.blend = Some(check_blend(lists, weights, bound.blend)?);
    }
    Ok(errors)
}

fn check_blend<T: Real>(lists: &Lists<T>, weights: &[f32], roundings: f64) -> Result<f64, String> {
    let modalities = weights.len() as f64;
    let part = (2.0 * modalities + 1.0) / f64::from(1 << 24) + roundings * T::EPSILON;
    // Below the normal numbers of f16 a rounding is of this much at the most.
    let least = roundings / f64::from(1 << 25);
    let off = |i: usize| {
        let terms = || lists.modalities.iter().zip(weights).map(|(v, w)| v[i].to_f64() * f64::from(*w));
        let (want, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
        let got = lists.blended[i].to_f64();
        let off = (got - want).abs();
        if off <= size * part + least {
            Ok(off / size.max(TINY))
        } else {
            Err(format!("element {i} of the blend is {got}, not {want}"))
        }
    };
    let worst = |a: f64, b: f64| Ok(a.max(b));
    let tensor = |(_, range): &(_, Range<usize>)| {
        range.clone().into_par_iter().with_min_len(PIECE).map(off).try_reduce(|| 0.0, worst)
    };
    lists.tensors.par_iter().with_min_len(64).map(tensor).try_reduce(|| 0.0, worst)
}
