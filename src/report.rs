//! Report of a blender.

use crate::abi::State;
use crate::config::Config;
use crate::state::{self, Flags};

/// Weights, moments, counters and ratios of a blender, read at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// n: observations in the moments since the last reset.
    pub observed: u64,
    /// Observations skipped since the last reset because a product was not finite.
    pub skipped: u64,
    /// Conditions of the latest reweight and of the latest observation.
    pub flags: Flags,
    /// Bit k: modality k made the latest observation not finite.
    pub nonfinite: u32,
    /// Bit k: the latest reweight gave modality k its least weight ([`Policy::min_weight`](crate::Policy::min_weight)), and
    /// without it the weight would be smaller.
    pub floored: u32,
    /// w_k in force, K values.
    pub weights: Vec<f64>,
    /// m_k, K values; 0 before the first observation.
    pub mean: Vec<f64>,
    /// Standard error of m_k, K values, from the running variance of c_k: sqrt((E\[c_k^2\] - m_k^2) / (n_eff - 1)), where n_eff
    /// is [`effective`](Self::effective). Infinite where n_eff is at most 1 (before the second observation, and with an EMA of
    /// decay 0), and until a reset after a c_k whose square overflows and after a state that version 0.1.0 saved.
    ///
    /// Where it is not well below |m_k|, the sign of m_k is uncertain, and w_k is noise; see `docs/method.md`.
    pub standard_error: Vec<f64>,
    /// n_eff, the number of equally weighted observations whose mean is as uncertain as m_k: n for a mean; for an EMA it
    /// approaches (1 + b) / (1 - b).
    pub effective: f64,
    /// sigma^2_k = S_kk, K values; 0 before the first observation.
    pub second_moment: Vec<f64>,
    /// OGR of each modality alone, sqrt(S_kk) / |m_k|, K values; 0 / 0 is NaN.
    pub ogr: Vec<f64>,
    /// OGR of the blend, sqrt(w'Sw) / |w'm|, with the weights in force.
    pub ogr_blend: f64,
    /// The same with uniform weights 1 / K.
    pub ogr_uniform: f64,
}

impl Report {
    /// m_k over its standard error, K values: the signal-to-noise ratio. 0 where the standard error is unknown; NaN where both
    /// are 0.
    ///
    /// Below 2 in magnitude the sign of m_k is in doubt, and the weights are noise; `docs/method.md` has measurements.
    pub fn signal_to_noise(&self) -> Vec<f64> {
        self.mean.iter().zip(&self.standard_error).map(|(m, error)| m / error).collect()
    }

    pub(crate) fn new(state: &State, config: &Config) -> Self {
        let modalities = config.k();
        let mut mean = vec![0.0; modalities];
        let mut moments = vec![0.0; modalities * modalities];
        state::moments(state, modalities, &mut mean, &mut moments);
        let weights = state.weights[..modalities].to_vec();
        let second_moment: Vec<f64> = (0..modalities).map(|k| moments[k * modalities + k]).collect();
        let ratio = |w: &[f64]| {
            let (mut variance, mut gain) = (0.0, 0.0);
            for j in 0..modalities {
                gain += w[j] * mean[j];
                for k in 0..modalities {
                    variance += w[j] * w[k] * moments[j * modalities + k];
                }
            }
            // S is positive semidefinite up to rounding.
            f64::max(variance, 0.0).sqrt() / f64::abs(gain)
        };
        let effective = config.average.effective(state.observed, state.normaliser);
        let error = |k: usize| {
            let square = state.mean_square[k] / state.normaliser;
            if state.observed < 2 || effective <= 1.0 || square.is_infinite() {
                return f64::INFINITY;
            }
            // A variance of 0 can be negative by a rounding.
            (f64::max(square - mean[k] * mean[k], 0.0) / (effective - 1.0)).sqrt()
        };
        Report {
            standard_error: (0..modalities).map(error).collect(),
            effective,
            observed: state.observed,
            skipped: state.skipped,
            flags: Flags::from_bits_retain(state.flags),
            nonfinite: state.nonfinite,
            floored: state.floored,
            ogr: second_moment.iter().zip(&mean).map(|(s, m)| s.sqrt() / m.abs()).collect(),
            ogr_blend: ratio(&weights),
            ogr_uniform: ratio(&vec![1.0 / modalities as f64; modalities]),
            weights,
            mean,
            second_moment,
        }
    }
}
