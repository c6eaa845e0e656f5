//! Solver: weights from a numerator and a second-moment matrix. Both estimators use it (`docs/method.md`).

mod active_set;
mod policy;

use crate::abi::MAX_MODALITIES;
use crate::error::{Error, Result};
use crate::state::Flags;

use active_set::{Factor, LEAST_PIVOT, Minimum, Problem, Vector, minimize};
pub use policy::{Negative, Overfitting, Policy};

/// Result of [`solve`].
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// K weights that sum to 1; `None` where no weights have w'm > 0, or a weight is not finite as f32: keep the weights
    /// in force.
    pub weights: Option<Vec<f64>>,
    /// [`Flags::HELD`] if `weights` is `None`; [`Flags::CLAMPED`], [`Flags::FLOORED`], [`Flags::INEXACT`].
    pub flags: Flags,
}

/// The weights that minimise OGR^2 = w'Qw / (w'm)^2 under w'm > 0, sum w = 1 and the bounds of `policy`.
///
/// `numerator` has K values m; `second_moment` is S, K x K, row-major. From gradients these are the moments of a
/// [`Blender`](crate::Blender); from losses they are dG and the diagonal matrix of dO^2. Only the symmetric part of S is
/// used, and of uncorrelated overfitting only its diagonal. Q = S + damping * trace(S) / K * I.
///
/// - [`Negative::Clamp`]: w_k >= `min_weight`_k. With f = `min_weight` and B = I + f 1' / (1 - sum f), w is proportional to
///   B u, where u minimises u'(B'QB)u / 2 - (B'm)'u under u >= 0, a non-negative least-squares problem. Uncorrelated and
///   without least weights that is u_k = max(m_k, 0) / Q_kk. `None` where B'm has no positive entry: w'm > 0 for no weights,
///   every step raises the validation loss. Where nothing overfits (S = 0), u_k = max(m_k, 0).
/// - [`Negative::Signed`]: w is proportional to Q^-1 m, if the sum of that is positive; else `None`. A Q that is not
///   positive definite is solved as uncorrelated.
///
/// S must be positive semidefinite, as every second moment is, up to rounding. If it is not, weights of Clamp respect their
/// bounds but may not be the minimum. [`Flags::INEXACT`] is set where the method meets a negative pivot, or reaches the bound
/// of its steps.
///
/// Source: Wang, Tran, Feiszli, CVPR 2020 (arXiv 1905.12681), Proposition 1; Z and the bounds as in `docs/method.md`.
///
/// # Errors
/// [`Error::Modalities`] for no or more than 32 numerators, [`Error::Count`] for a matrix of another size,
/// [`Error::Damping`], [`Error::MinWeight`], [`Error::MinWeightSum`]; [`Error::Numerator`] and [`Error::SecondMoment`] for
/// values that are not finite or a negative value on the diagonal.
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
    policy.check(modalities)?;
    if let Some(modality) = numerator.iter().position(|m| !m.is_finite()) {
        return Err(Error::Numerator { modality, got: numerator[modality] });
    }
    let bad = |(i, s): (usize, &f64)| !s.is_finite() || (*s < 0.0 && i / modalities == i % modalities);
    if let Some(i) = second_moment.iter().enumerate().position(bad) {
        return Err(Error::SecondMoment { row: i / modalities, column: i % modalities, got: second_moment[i] });
    }
    let mut weights = vec![0.0; modalities];
    let found = solve_into(numerator, second_moment, policy, &mut weights);
    Ok(Solution { weights: (!found.flags.contains(Flags::HELD)).then_some(weights), flags: found.flags })
}

/// What [`solve_into`] found besides the weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(crate) flags: Flags,
    /// Bit k: modality k has its least weight, which is above 0, and with less OGR would be smaller.
    pub(crate) floored: u32,
}

/// [`solve`] for input that was checked: writes `weights` unless the flags it returns say HELD. kernels/solve.cuh has the
/// same operations in the same order.
pub(crate) fn solve_into(m: &[f64], second_moment: &[f64], policy: &Policy, weights: &mut [f64]) -> Found {
    let problem = Problem::new(m, second_moment, policy);
    let minimum = match policy.negative {
        Negative::Clamp => problem.clamped(policy.overfitting),
        Negative::Signed => problem.signed(policy.overfitting),
    };
    let u = &minimum.u[..m.len()];
    let sum = u.iter().sum::<f64>();
    // `blend` multiplies by the weights as f32, so that is where they must be finite.
    let held = sum <= 0.0 || !sum.is_finite() || u.iter().any(|u| !((u / sum) as f32).is_finite());
    let mut floored = 0;
    if !held {
        for (k, (w, floor)) in weights.iter_mut().zip(policy.min_weight).enumerate() {
            *w = floor + problem.left * (u[k] / sum);
            floored |= u32::from(floor > 0.0) << k & minimum.bound;
        }
    }
    let mut flags = Flags::empty();
    flags.set(Flags::HELD, held);
    flags.set(Flags::CLAMPED, minimum.bound & !floored != 0);
    flags.set(Flags::FLOORED, floored != 0);
    flags.set(Flags::INEXACT, !minimum.exact);
    Found { flags, floored }
}

impl Problem {
    /// The problem of a policy. m and Q are scaled to about 1, which changes no weight and keeps products and quotients from
    /// overflowing or vanishing.
    fn new(m: &[f64], second_moment: &[f64], policy: &Policy) -> Self {
        let (k, f) = (m.len(), &policy.min_weight);
        let m_scale = m.iter().fold(0.0, |max: f64, m| max.max(m.abs()));
        let s_scale = (0..k).fold(0.0, |max: f64, i| max.max(second_moment[i * k + i]));
        let zeros = [0.0; MAX_MODALITIES];
        let (mut scaled, mut q) = (zeros, [zeros; MAX_MODALITIES]);
        for i in 0..k {
            scaled[i] = if m_scale > 0.0 { m[i] / m_scale } else { 0.0 };
            for j in 0..k {
                if s_scale > 0.0 && (policy.overfitting == Overfitting::Correlated || i == j) {
                    let (s, transposed) = (second_moment[i * k + j], second_moment[j * k + i]);
                    q[i][j] = 0.5 * (s / s_scale) + 0.5 * (transposed / s_scale);
                }
            }
        }
        let trace = (0..k).map(|i| q[i][i]).sum::<f64>();
        let damping = policy.damping * (trace / k as f64);
        for (i, row) in q[..k].iter_mut().enumerate() {
            row[i] += damping;
        }
        let sum = |value: &dyn Fn(usize) -> f64| (0..k).fold(0.0, |sum, i| sum + value(i));
        let all = sum(&|i| f[i]);
        let left = 1.0 - all;
        let qf: Vector = std::array::from_fn(|i| sum(&|j| q[i][j] * f[j]));
        let (fqf, fm) = (sum(&|i| f[i] * qf[i]), sum(&|i| f[i] * scaled[i]));
        let gain = std::array::from_fn(|i| if i < k { left * scaled[i] + fm } else { 0.0 });
        let variance = std::array::from_fn(|i| left * (left * q[i][i] + (qf[i] + qf[i])) + fqf);
        let (overfits, has_floors) = (s_scale > 0.0, all > 0.0);
        Problem { k, m: scaled, q, overfits, floors: *f, has_floors, qf, left, gain, variance }
    }

    /// The minimum under u >= 0.
    fn clamped(&self, overfitting: Overfitting) -> Minimum {
        let Problem { k, m, gain, variance, .. } = self;
        let free = |i: usize| gain[i] > 0.0 && variance[i] <= 0.0;
        if !gain.iter().any(|gain| *gain > 0.0) {
            self.closed(gain, |_| 0.0)
        } else if !self.overfits {
            self.closed(m, |i| m[i])
        } else if (0..*k).any(free) {
            // OGR is 0 for what gains without overfitting, so nothing else gets weight.
            self.closed(gain, |i| if free(i) { gain[i] } else { 0.0 })
        } else if overfitting == Overfitting::Uncorrelated && !self.has_floors {
            self.closed(m, |i| m[i] / self.q[i][i])
        } else {
            minimize(self)
        }
    }

    /// u_k = `value(k)` where `sign` is positive, else 0.
    fn closed(&self, sign: &Vector, value: impl Fn(usize) -> f64) -> Minimum {
        let u = std::array::from_fn(|i| if sign[i] > 0.0 { value(i) } else { 0.0 });
        let bound = (0..self.k).fold(0, |bound, i| bound | u32::from(sign[i] < 0.0) << i);
        Minimum { u, bound, exact: true }
    }

    /// Q^-1 m, of any sign.
    fn signed(&self, overfitting: Overfitting) -> Minimum {
        let Problem { k, m, q, overfits, .. } = self;
        let mut factor = Factor::new();
        let correlated = *overfits && overfitting == Overfitting::Correlated;
        if correlated && (0..*k).all(|i| factor.append(self, i, LEAST_PIVOT)) {
            return Minimum { u: factor.solve(self), bound: 0, exact: true };
        }
        // 0 / 0: no overfitting and no generalisation, hence no weight.
        let value = |i: usize| if m[i] == 0.0 || !overfits { m[i] } else { m[i] / q[i][i] };
        Minimum { u: std::array::from_fn(value), bound: 0, exact: true }
    }
}
