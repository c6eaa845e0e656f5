//! What a blender is made with, and what a pass is asked for.

use crate::abi::{self, MAX_MODALITIES};
use crate::error::{Error, Result};
use crate::solve::Policy;
use crate::state::Average;

/// Most CPU threads of a blender. No machine has more cores, so a larger number is a mistake.
pub(crate) const MAX_CPU_THREADS: u32 = 4096;

/// When the weights are solved for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Cadence {
    /// When [`Blender::reweight`](crate::Blender::reweight) is called, as at the end of a super-epoch.
    #[default]
    OnRequest,
    /// At each observation that enters the moments.
    EveryObservation,
}

/// How a blender averages, solves and runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// K, from 1 to [`MAX_MODALITIES`], the fused loss included.
    pub modalities: u32,
    /// How observations are averaged.
    pub average: Average,
    /// How weights are solved for.
    pub policy: Policy,
    /// When they are.
    pub cadence: Cadence,
    /// CPU threads, the caller's included; 0 is all. Results do not depend on it.
    pub threads: u32,
}

impl Config {
    /// K modalities, an EMA of decay 0.99, the default [`Policy`], weights on request, all threads.
    pub fn new(modalities: u32) -> Self {
        Config {
            modalities,
            average: Average::Ema { decay: 0.99 },
            policy: Policy::default(),
            cadence: Cadence::default(),
            threads: 0,
        }
    }

    /// The kernels' view of this; the blender's addresses are still 0.
    #[cfg(feature = "cuda")]
    pub(crate) fn args(&self) -> abi::BlenderArgs {
        use crate::solve::{Negative, Overfitting};
        let (average, decay) = self.average.coded();
        abi::BlenderArgs {
            state: 0,
            progress: 0,
            zeros: 0,
            decay,
            damping: self.policy.damping,
            modalities: self.modalities,
            average,
            overfitting: u32::from(self.policy.overfitting == Overfitting::Correlated),
            negative: u32::from(self.policy.negative == Negative::Signed),
            cadence: u32::from(self.cadence == Cadence::EveryObservation),
            reserved: 0,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.modalities == 0 || self.modalities as usize > MAX_MODALITIES {
            return Err(Error::Modalities { got: u64::from(self.modalities) });
        }
        match self.average {
            Average::Ema { decay } if !(0.0..1.0).contains(&decay) => return Err(Error::Decay { got: decay }),
            _ => {}
        }
        self.policy.check()
    }
}

bitflags::bitflags! {
    /// What one pass over the gradients does.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Pass: u32 {
        /// Add <g, v_k> and <t - g, v_k> to the pending sums.
        const DOT = abi::DOT;
        /// Write sum_k w_k v_k with the weights in force.
        const BLEND = abi::BLEND;
        /// With BLEND: add to the blended gradient instead of replacing it.
        const ACCUMULATE = abi::ACCUMULATE;
        /// Close the pending sums as one observation.
        const OBSERVE = abi::OBSERVE;
    }
}
