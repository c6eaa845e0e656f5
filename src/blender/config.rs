//! What a blender is made with, and what a pass is asked for.

use crate::error::{Error, Result};
use crate::layout::{self, MAX_MODALITIES};
use crate::moments::Average;
use crate::solve::Policy;

/// What a blender works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(pub(super) Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(i32),
}

impl Device {
    /// The CPU.
    pub fn cpu() -> Self {
        Device(Kind::Cpu)
    }

    /// Ordinal of a CUDA device; `None` for the CPU.
    pub fn ordinal(&self) -> Option<i32> {
        match self.0 {
            Kind::Cpu => None,
            #[cfg(feature = "cuda")]
            Kind::Cuda(ordinal) => Some(ordinal),
        }
    }

    /// The CUDA device with this ordinal, if it can run this build.
    ///
    /// # Errors
    /// [`Error::NotBuilt`] without the feature `cuda`; [`Error::NoDriver`], [`Error::NoDevice`],
    /// [`Error::UnsupportedDevice`]; [`Error::Cuda`].
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: i32) -> Result<Self> {
        crate::cuda::find(ordinal)?;
        Ok(Device(Kind::Cuda(ordinal)))
    }

    /// The CUDA device with this ordinal, in a build with the feature `cuda`.
    ///
    /// # Errors
    /// [`Error::NotBuilt`]: this build has no CUDA backend.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(ordinal: i32) -> Result<Self> {
        Err(Error::NotBuilt { backend: "CUDA", ordinal })
    }
}

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

    /// What a kernel must know of this.
    #[cfg(feature = "cuda")]
    pub(super) fn terms(&self) -> crate::layout::Launch {
        use crate::solve::{Negative, Overfitting};
        let (average, decay) = self.average.coded();
        crate::layout::Launch {
            modalities: self.modalities,
            average,
            decay,
            damping: self.policy.damping,
            overfitting: u32::from(self.policy.overfitting == Overfitting::Correlated),
            negative: u32::from(self.policy.negative == Negative::Signed),
            cadence: u32::from(self.cadence == Cadence::EveryObservation),
            ..Default::default()
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
        const DOT = layout::DOT;
        /// Write sum_k w_k v_k with the weights in force.
        const BLEND = layout::BLEND;
        /// With BLEND: add to the blended gradient instead of replacing it.
        const ACCUMULATE = layout::ACCUMULATE;
        /// Close the pending sums as one observation.
        const OBSERVE = layout::OBSERVE;
    }
}
