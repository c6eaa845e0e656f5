//! Configuration of a blender, and the parts of a pass.

use crate::abi::{self, MAX_MODALITIES};
use crate::error::{Error, Result};
use crate::solve::Policy;
use crate::state::Average;

/// Most CPU threads of a blender. No machine has more cores, so a larger number is a mistake.
pub(crate) const MAX_CPU_THREADS: u32 = 4096;

/// When a blender solves for its weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Cadence {
    /// When [`Blender::reweight`](crate::Blender::reweight) is called, for example at the end of a super-epoch.
    #[default]
    OnRequest = abi::ON_REQUEST,
    /// At each observation that enters the moments.
    EveryObservation = abi::EVERY_OBSERVATION,
}

/// Configuration of a [`Blender`](crate::Blender).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// K, from 1 to [`MAX_MODALITIES`], the fused loss included.
    pub modalities: u32,
    /// How observations are averaged.
    pub average: Average,
    /// How weights are solved for.
    pub policy: Policy,
    /// When weights are solved for.
    pub cadence: Cadence,
    /// CPU threads, the caller's included; 0 is one per core. Results do not depend on it.
    pub threads: u32,
}

impl Config {
    /// K modalities, an EMA with decay 0.99, the default [`Policy`], weights on request, all CPU threads.
    pub fn new(modalities: u32) -> Self {
        Config {
            modalities,
            average: Average::Ema { decay: 0.99 },
            policy: Policy::default(),
            cadence: Cadence::default(),
            threads: 0,
        }
    }

    /// K as an index type.
    pub(crate) fn k(&self) -> usize {
        self.modalities as usize
    }

    /// # Errors
    /// [`Error::Modalities`], [`Error::Decay`], [`Error::Damping`], [`Error::MinWeight`], [`Error::MinWeightSum`].
    pub(crate) fn check(&self) -> Result<()> {
        if self.modalities == 0 || self.k() > MAX_MODALITIES {
            return Err(Error::Modalities { got: u64::from(self.modalities) });
        }
        match self.average {
            Average::Ema { decay } if !(0.0..1.0).contains(&decay) => return Err(Error::Decay { got: decay }),
            _ => {}
        }
        self.policy.check(self.k())
    }
}

bitflags::bitflags! {
    /// The parts of one pass over the gradients.
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

impl Pass {
    /// # Errors
    /// [`Error::Pass`] for no bit, an unknown bit, or ACCUMULATE without BLEND.
    pub(crate) fn check(self) -> Result<()> {
        let lone = self.contains(Pass::ACCUMULATE) && !self.contains(Pass::BLEND);
        if self.is_empty() || !Pass::all().contains(self) || lone {
            return Err(Error::Pass { bits: self.bits() });
        }
        Ok(())
    }

    /// Whether the pass reads gradients.
    pub(crate) fn reads(self) -> bool {
        self.intersects(Pass::DOT | Pass::BLEND)
    }
}
