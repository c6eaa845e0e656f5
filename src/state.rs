//! The running moments: n, the means m_k of c_k, and the means S_jk of d_j d_k.

use crate::abi::{self, MAX_MODALITIES, State};

bitflags::bitflags! {
    /// What the latest reweight and the latest observation met with.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Flags: u32 {
        /// The latest reweight had nothing to go by and kept the weights in force.
        const HELD = abi::HELD;
        /// The latest observation had a product that was not finite and was skipped.
        const NONFINITE = abi::NONFINITE;
        /// In the latest reweight, a modality's weight would have been negative and was set to zero. With HELD: all were,
        /// or what was left was nothing to go by.
        const CLAMPED = abi::CLAMPED;
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
    /// Its code, for kernels, saved states and C, and its decay (0 for a mean, which has none).
    pub(crate) fn coded(self) -> (u32, f64) {
        match self {
            Average::Mean => (0, 0.0),
            // One zero, so that -0 and 0 are the same decay.
            Average::Ema { decay } => (1, decay + 0.0),
        }
    }

    /// The share of the old moments in the new ones when the `n`-th observation enters.
    fn keep(self, n: u64) -> f64 {
        match self {
            Average::Mean => (n - 1) as f64 / n as f64,
            Average::Ema { decay } => decay,
        }
    }
}

/// Closes the pending sums of K modalities as one observation; says whether it entered the moments.
///
/// Products are divided by `scale` squared first. Not finite is a c_k, a d_k, or a d_k whose square overflows.
pub(crate) fn observe(state: &mut State, modalities: usize, average: Average, scale: f32) -> bool {
    // Dividing by infinity would make zeros of anything.
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
        // 1 - (n - 1) / n would round; 1 / n is nearer.
        Average::Mean => 1.0 / state.observed as f64,
        Average::Ema { decay } => 1.0 - decay,
    };
    state.normaliser = match average {
        Average::Mean => 1.0,
        Average::Ema { .. } => keep * state.normaliser + add,
    };
    for j in 0..modalities {
        state.mean[j] = keep * state.mean[j] + add * c[j];
        for k in 0..modalities {
            let moment = &mut state.second_moment[j * modalities + k];
            *moment = keep * *moment + add * (d[j] * d[k]);
        }
    }
    true
}

/// Writes m (K) and S (K x K), normalised, to `mean` and `second_moment`; zeros before the first observation.
pub(crate) fn moments(state: &State, modalities: usize, mean: &mut [f64], second_moment: &mut [f64]) {
    let normalise = |sum: f64| if state.observed == 0 { 0.0 } else { sum / state.normaliser };
    for (m, sum) in mean.iter_mut().zip(&state.mean[..modalities]) {
        *m = normalise(*sum);
    }
    for (s, sum) in second_moment.iter_mut().zip(&state.second_moment[..modalities * modalities]) {
        *s = normalise(*sum);
    }
}

/// Forgets the moments, the counters, the flags and the pending sums; the weights stay.
pub(crate) fn reset(state: &mut State) {
    let (weights, weights_f32) = (state.weights, state.weights_f32);
    *state = State { weights, weights_f32, ..EMPTY };
}

/// Puts weights in force.
pub(crate) fn put_weights(state: &mut State, weights: &[f64]) {
    state.weights[..weights.len()].copy_from_slice(weights);
    for (rounded, weight) in state.weights_f32.iter_mut().zip(weights) {
        *rounded = *weight as f32;
    }
}

/// No observation, no weights.
pub(crate) const EMPTY: State = State {
    pending: [0.0; 2 * MAX_MODALITIES],
    weights_f32: [0.0; MAX_MODALITIES],
    weights: [0.0; MAX_MODALITIES],
    mean: [0.0; MAX_MODALITIES],
    second_moment: [0.0; MAX_MODALITIES * MAX_MODALITIES],
    normaliser: 0.0,
    observed: 0,
    skipped: 0,
    flags: 0,
    nonfinite: 0,
};
