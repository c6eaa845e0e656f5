//! Solver: weights from a numerator and a second-moment matrix. Both estimators use it (`docs/method.md`).

use crate::abi::{self, MAX_MODALITIES};
use crate::error::{Error, Result};
use crate::state::Flags;

/// Assumption on the overfitting of two different modalities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Overfitting {
    /// E\[d_j d_k\] = 0 for j != k, as in Proposition 1 of the paper: w_k = m_k / sigma^2_k, normalised.
    #[default]
    Uncorrelated = abi::UNCORRELATED,
    /// None: w = S^-1 m, normalised.
    Correlated = abi::CORRELATED,
}

/// Treatment of a modality whose weight would be negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Negative {
    /// It gets no weight.
    #[default]
    Clamp = abi::CLAMP,
    /// It keeps its negative weight, provided that the sum of the weights before normalisation is positive.
    Signed = abi::SIGNED,
}

/// Policy of the solver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Assumption on the overfitting of two different modalities.
    pub overfitting: Overfitting,
    /// Treatment of a modality whose weight would be negative.
    pub negative: Negative,
    /// Factor of the mean sigma^2_k that is added to each sigma^2_k; at least 0 and finite.
    pub damping: f64,
}

impl Default for Policy {
    /// Uncorrelated, clamped, damping 1e-12.
    fn default() -> Self {
        Policy { overfitting: Overfitting::default(), negative: Negative::default(), damping: 1e-12 }
    }
}

impl Policy {
    /// # Errors
    /// [`Error::Damping`] for a damping that is negative or not finite.
    pub(crate) fn check(&self) -> Result<()> {
        if self.damping.is_finite() && self.damping >= 0.0 {
            return Ok(());
        }
        Err(Error::Damping { got: self.damping })
    }
}

/// Result of [`solve`].
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// K weights that sum to 1; `None` where the sum of the a_k of [`solve`] is not positive, or a weight is not finite as
    /// f32: keep the weights in force.
    pub weights: Option<Vec<f64>>,
    /// [`Flags::HELD`] if `weights` is `None`; [`Flags::CLAMPED`] if a negative weight was set to 0.
    pub flags: Flags,
}

/// Weights with a small OGR^2 = w'Sw / (w'm)^2 and sum 1, by `policy`. Without a negative weight they minimise it.
///
/// `numerator` has K values m; `second_moment` is S, K x K, row-major. From gradients these are the moments of a
/// [`Blender`](crate::Blender); from losses they are dG and the diagonal matrix of dO^2. Only the symmetric part of S is
/// used, and of uncorrelated overfitting only its diagonal.
///
/// - Uncorrelated: a_k = m_k / (S_kk + damping * trace(S) / K), or m_k where S is zero. Clamped, a negative a_k
///   becomes 0.
/// - Correlated: a = (S + damping * trace(S) / K * I)^-1 m. Clamped, modalities with a negative a_k are dropped and the
///   rest is solved again, until none is negative: a heuristic, not always the minimum among weights of at least 0. A
///   matrix that is not positive definite even with the damping is solved as uncorrelated.
/// - w_k = a_k / sum a, if that sum is positive and every w_k is finite; else `None`.
///
/// Source: Wang, Tran, Feiszli, CVPR 2020 (arXiv 1905.12681), Proposition 1; Z as in `docs/method.md`.
///
/// # Errors
/// [`Error::Modalities`] for no or more than 32 numerators, [`Error::Count`] for a matrix of another size,
/// [`Error::Damping`], [`Error::Numerator`] and [`Error::SecondMoment`] for values that are not finite or a negative
/// value on the diagonal.
///
/// ```
/// use gradblend::{Policy, solve};
/// let solution = solve(&[1.0, 1.0], &[1.0, 0.0, 0.0, 3.0], &Policy::default())?;
/// let weights = solution.weights.unwrap_or_default();
/// assert!((weights[0] - 0.75).abs() < 1e-9 && (weights[1] - 0.25).abs() < 1e-9);
/// # Ok::<(), gradblend::Error>(())
/// ```
pub fn solve(numerator: &[f64], second_moment: &[f64], policy: &Policy) -> Result<Solution> {
    let modalities = numerator.len();
    if modalities == 0 || modalities > MAX_MODALITIES {
        return Err(Error::Modalities { got: modalities as u64 });
    }
    if second_moment.len() != modalities * modalities {
        let (expected, got) = (modalities * modalities, second_moment.len());
        return Err(Error::Count { what: "the second moment", expected, got });
    }
    policy.check()?;
    if let Some(modality) = numerator.iter().position(|m| !m.is_finite()) {
        return Err(Error::Numerator { modality, got: numerator[modality] });
    }
    let bad = |(i, s): (usize, &f64)| !s.is_finite() || (*s < 0.0 && i / modalities == i % modalities);
    if let Some(i) = second_moment.iter().enumerate().position(bad) {
        return Err(Error::SecondMoment { row: i / modalities, column: i % modalities, got: second_moment[i] });
    }
    let mut weights = vec![0.0; modalities];
    let flags = solve_into(numerator, second_moment, policy, &mut weights);
    Ok(Solution { weights: (!flags.contains(Flags::HELD)).then_some(weights), flags })
}

/// [`solve`] for input that was checked: writes `weights` unless the flags it returns say HELD.
pub(crate) fn solve_into(m: &[f64], second_moment: &[f64], policy: &Policy, weights: &mut [f64]) -> Flags {
    let modalities = m.len();
    let mut a = [0.0; MAX_MODALITIES];
    let a = &mut a[..modalities];
    // Weights do not change when m or S is scaled. Bringing both to about 1 keeps the trace, the products and the
    // quotients from overflowing or vanishing.
    let m_scale = m.iter().fold(0.0, |max: f64, m| max.max(m.abs()));
    let s_scale = (0..modalities).fold(0.0, |max: f64, k| max.max(second_moment[k * modalities + k]));
    let m = |k: usize| if m_scale > 0.0 { m[k] / m_scale } else { 0.0 };
    let s = |j: usize, k: usize| {
        if s_scale > 0.0 {
            0.5 * (second_moment[j * modalities + k] / s_scale) + 0.5 * (second_moment[k * modalities + j] / s_scale)
        } else if j == k {
            1.0
        } else {
            0.0
        }
    };
    let damping = if s_scale > 0.0 {
        policy.damping * ((0..modalities).map(|k| s(k, k)).sum::<f64>() / modalities as f64)
    } else {
        0.0
    };
    let mut clamped = false;
    let solved = match policy.overfitting {
        Overfitting::Correlated => correlated(&m, &s, damping, policy.negative, a),
        Overfitting::Uncorrelated => None,
    };
    if let Some(dropped) = solved {
        clamped = dropped;
    } else {
        for (k, a) in a.iter_mut().enumerate() {
            *a = m(k) / (s(k, k) + damping);
            // 0 / 0: no overfitting and no generalisation, hence no weight.
            if m(k) == 0.0 || (policy.negative == Negative::Clamp && *a < 0.0) {
                clamped |= *a < 0.0;
                *a = 0.0;
            }
        }
    }
    let sum = a.iter().sum::<f64>();
    // `blend` multiplies by the weights as f32, so that is where they must be finite.
    let held = sum <= 0.0 || !sum.is_finite() || a.iter().any(|a| !((a / sum) as f32).is_finite());
    if !held {
        for (w, a) in weights.iter_mut().zip(a) {
            *w = *a / sum;
        }
    }
    let mut flags = Flags::empty();
    flags.set(Flags::HELD, held);
    flags.set(Flags::CLAMPED, clamped);
    flags
}

/// a = (S + damping I)^-1 m on the modalities that are not dropped, by Cholesky factors. Returns whether a modality was
/// dropped; `None` for a matrix that is not positive definite, which has no such factors.
fn correlated(
    m: &impl Fn(usize) -> f64,
    s: &impl Fn(usize, usize) -> f64,
    damping: f64,
    negative: Negative,
    a: &mut [f64],
) -> Option<bool> {
    let mut active = [0_usize; MAX_MODALITIES];
    let mut count = a.len();
    for (k, modality) in active[..count].iter_mut().enumerate() {
        *modality = k;
    }
    loop {
        let rows = &active[..count];
        let mut factor = [[0.0; MAX_MODALITIES]; MAX_MODALITIES];
        let mut x = [0.0; MAX_MODALITIES];
        for (i, &row) in rows.iter().enumerate() {
            for (j, &column) in rows[..=i].iter().enumerate() {
                let mut rest = s(row, column) + if i == j { damping } else { 0.0 };
                for (l, r) in factor[i][..j].iter().zip(&factor[j][..j]) {
                    rest -= l * r;
                }
                if i != j {
                    factor[i][j] = rest / factor[j][j];
                } else if rest > 0.0 && rest.is_finite() {
                    factor[i][i] = rest.sqrt();
                } else {
                    return None;
                }
            }
            let known: f64 = factor[i][..i].iter().zip(&x[..i]).map(|(l, x)| l * x).sum();
            x[i] = (m(row) - known) / factor[i][i];
        }
        for i in (0..count).rev() {
            // In descending j, the order of the kernel (solve.cuh), for the same bits.
            let known: f64 = (i + 1..count).rev().map(|j| factor[j][i] * x[j]).sum();
            x[i] = (x[i] - known) / factor[i][i];
        }
        a.fill(0.0);
        for (&k, x) in rows.iter().zip(&x) {
            a[k] = *x;
        }
        if negative == Negative::Signed || x[..count].iter().all(|x| *x >= 0.0) {
            return Some(count < a.len());
        }
        // A NaN is kept: it makes the sum of the a_k NaN, and the weights are held.
        let mut kept = 0;
        for i in 0..count {
            if x[i] >= 0.0 || x[i].is_nan() {
                active[kept] = active[i];
                kept += 1;
            }
        }
        if kept == count {
            return Some(count < a.len());
        }
        count = kept;
    }
}
