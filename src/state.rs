//! State of a blender: n, the running means m_k of c_k and S_jk of d_j d_k, and the weights in force.

use bytemuck::Zeroable;

use crate::abi::{self, MAX_MODALITIES, State};

bitflags::bitflags! {
    /// Conditions of the latest reweight and of the latest observation.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Flags: u32 {
        /// Of the latest reweight: there was no observation, or the solver found no weights. Those in force stay.
        const HELD = abi::HELD;
        /// Of the latest observation: a product was not finite, and the observation was skipped.
        const NONFINITE = abi::NONFINITE;
        /// Of the latest reweight: a weight is 0 that would be negative without that bound. With HELD: a step on some
        /// modality raises the validation loss.
        const CLAMPED = abi::CLAMPED;
        /// Of the latest reweight: a weight is at its [`min_weight`](crate::Policy::min_weight) and would be smaller without
        /// it.
        const FLOORED = abi::FLOORED;
        /// Of the latest reweight: the weights may not be the minimum, because the solver met a negative pivot, which a second
        /// moment does not have, or reached the bound of its steps.
        const INEXACT = abi::INEXACT;
    }
}

/// How observations are averaged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Average {
    /// Plain running mean since the last reset.
    Mean,
    /// Exponential moving average, bias-corrected by 1 / (1 - decay^n).
    Ema {
        /// b, at least 0 and below 1.
        decay: f64,
    },
}

impl Average {
    /// Code of the variant (for kernels, saved states and C), and the decay (0 for a mean).
    pub(crate) fn coded(self) -> (u32, f64) {
        match self {
            Average::Mean => (abi::MEAN, 0.0),
            // Adding 0 makes 0 of -0, so that both are the same decay.
            Average::Ema { decay } => (abi::EMA, decay + 0.0),
        }
    }

    /// Effective number of observations, (sum of their weights)^2 / sum of squared weights, where `normaliser` is the sum.
    pub(crate) fn effective(self, observed: u64, normaliser: f64) -> f64 {
        match self {
            Average::Mean => observed as f64,
            // Weights (1 - b) b^i, i < n, have the sum z = 1 - b^n and the squared sum (1 - b) / (1 + b) * z (2 - z).
            Average::Ema { decay } => (1.0 + decay) / (1.0 - decay) * (normaliser / (2.0 - normaliser)),
        }
    }

    /// Factor of the old moments when the `n`-th observation enters.
    fn keep(self, n: u64) -> f64 {
        match self {
            Average::Mean => (n - 1) as f64 / n as f64,
            Average::Ema { decay } => decay,
        }
    }
}

/// Commits the pending sums of K modalities as one observation, and returns whether it entered the moments.
///
/// Divides the products by `scale` squared first. The observation is skipped if a c_k, a d_k or the square of a d_k is not
/// finite.
pub(crate) fn observe(state: &mut State, modalities: usize, average: Average, scale: f32) -> bool {
    // Division by infinity would turn every product into 0.
    let scale = if scale.is_finite() { f64::from(scale) * f64::from(scale) } else { f64::NAN };
    let (mut c, mut d) = ([0.0; MAX_MODALITIES], [0.0; MAX_MODALITIES]);
    let mut nonfinite = 0;
    for k in 0..modalities {
        c[k] = state.pending[k] / scale;
        d[k] = state.pending[modalities + k] / scale;
        if !c[k].is_finite() || !(d[k] * d[k]).is_finite() {
            nonfinite |= 1 << k;
        }
    }
    state.pending.fill(0.0);
    state.nonfinite = nonfinite;
    let mut flags = Flags::from_bits_retain(state.flags);
    flags.set(Flags::NONFINITE, nonfinite != 0);
    state.flags = flags.bits();
    if nonfinite != 0 {
        state.skipped = state.skipped.saturating_add(1);
        return false;
    }
    state.observed = state.observed.saturating_add(1);
    let keep = average.keep(state.observed);
    let add = match average {
        // Nearer to the exact factor than 1 - keep, which rounds twice.
        Average::Mean => 1.0 / state.observed as f64,
        Average::Ema { decay } => 1.0 - decay,
    };
    state.normaliser = match average {
        Average::Mean => 1.0,
        Average::Ema { .. } => keep * state.normaliser + add,
    };
    for j in 0..modalities {
        state.mean[j] = keep * state.mean[j] + add * c[j];
        let mean_square = keep * state.mean_square[j] + add * (c[j] * c[j]);
        // 0 times infinity.
        state.mean_square[j] = if mean_square.is_nan() { f64::INFINITY } else { mean_square };
        for k in 0..modalities {
            let moment = &mut state.second_moment[j * modalities + k];
            *moment = keep * *moment + add * (d[j] * d[k]);
        }
    }
    true
}

/// Writes the normalised m (K) and S (K x K) to `mean` and `second_moment`; zeros before the first observation.
pub(crate) fn moments(state: &State, modalities: usize, mean: &mut [f64], second_moment: &mut [f64]) {
    let normalise = |sum: f64| if state.observed == 0 { 0.0 } else { sum / state.normaliser };
    for (m, sum) in mean.iter_mut().zip(&state.mean[..modalities]) {
        *m = normalise(*sum);
    }
    for (s, sum) in second_moment.iter_mut().zip(&state.second_moment[..modalities * modalities]) {
        *s = normalise(*sum);
    }
}

/// Forgets everything but the weights: moments, counters, flags and pending sums.
pub(crate) fn reset(state: &mut State) {
    let (weights, weights_f32) = (state.weights, state.weights_f32);
    *state = State { weights, weights_f32, ..State::zeroed() };
}

/// Puts weights in force.
pub(crate) fn set_weights(state: &mut State, weights: &[f64]) {
    state.weights[..weights.len()].copy_from_slice(weights);
    for (rounded, weight) in state.weights_f32.iter_mut().zip(weights) {
        *rounded = *weight as f32;
    }
}
