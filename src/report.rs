//! Report of a blender.

use crate::abi::State;
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
    /// w_k in force, K values.
    pub weights: Vec<f64>,
    /// m_k, K values; 0 before the first observation.
    pub mean: Vec<f64>,
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
    pub(crate) fn new(state: &State, modalities: usize) -> Self {
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
        Report {
            observed: state.observed,
            skipped: state.skipped,
            flags: Flags::from_bits_retain(state.flags),
            nonfinite: state.nonfinite,
            ogr: second_moment.iter().zip(&mean).map(|(s, m)| s.sqrt() / m.abs()).collect(),
            ogr_blend: ratio(&weights),
            ogr_uniform: ratio(&vec![1.0 / modalities as f64; modalities]),
            weights,
            mean,
            second_moment,
        }
    }
}
