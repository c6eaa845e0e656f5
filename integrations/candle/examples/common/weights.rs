//! Where the weights of the losses come from.

use anyhow::Result;
use gradblend::{Average, Schedule};
use gradblend_candle::GradBlendConfig;

/// Epochs of the first super-epoch and of each one after it, as in the paper.
pub(crate) const WARM_UP: u64 = 10;
pub(crate) const SUPER_EPOCH: u64 = 5;

/// Where the weights of the losses come from.
pub(crate) enum Weights {
    /// They do not change. A loss of weight 0 is not computed.
    Fixed(Vec<f64>),
    /// Estimated from losses at the start of each super-epoch, for its length: each loss is trained alone.
    FromLosses(Schedule),
    /// Estimated from gradients, and in force after each observation, or at the end of a super-epoch.
    FromGradients(Box<GradBlendConfig>),
    /// By another method: see `peers.rs`.
    GradNorm,
    MmPareto,
}

impl Weights {
    /// All weight on one of `k` losses.
    pub(crate) fn only(loss: usize, k: usize) -> Self {
        Weights::Fixed((0..k).map(|j| f64::from(u8::from(j == loss))).collect())
    }

    pub(crate) fn uniform(k: usize) -> Self {
        Weights::Fixed(uniform(k))
    }

    /// From losses, before training.
    pub(crate) fn offline_loss() -> Self {
        Weights::FromLosses(Schedule::offline())
    }

    /// From losses, at the start of each super-epoch.
    pub(crate) fn online_loss() -> Result<Self> {
        Ok(Weights::FromLosses(Schedule::online(WARM_UP, SUPER_EPOCH)?))
    }

    /// From gradients, at the end of each super-epoch. All its observations count alike: the moments are reset at its end.
    pub(crate) fn per_super_epoch(k: usize) -> Result<GradBlendConfig> {
        let schedule = Schedule::online(WARM_UP, SUPER_EPOCH)?;
        Ok(config(k).average(Average::Mean).schedule(schedule))
    }

    /// From gradients, at each step, with moving averages of this decay.
    pub(crate) fn per_step(k: usize, decay: f64) -> GradBlendConfig {
        config(k).decay(decay)
    }
}

impl From<GradBlendConfig> for Weights {
    fn from(config: GradBlendConfig) -> Self {
        Weights::FromGradients(Box::new(config))
    }
}

pub(crate) fn uniform(k: usize) -> Vec<f64> {
    vec![1.0 / k as f64; k]
}

/// One thread: runs are parallel.
fn config(k: usize) -> GradBlendConfig {
    GradBlendConfig::new(k as u32).threads(1)
}
