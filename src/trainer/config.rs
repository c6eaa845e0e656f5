//! Options of a trainer, with the names and defaults that they have in every framework.

use crate::config::{Cadence, Config};
use crate::error::{Error, Result};
use crate::schedule::Schedule;
use crate::solve::{Negative, Overfitting};
use crate::state::Average;

/// Options of a trainer.
///
/// ```
/// use gradblend::trainer::GradBlendConfig;
/// let config = GradBlendConfig::new(3).every(10).min_weight(&[0.0, 0.0, 0.5]);
/// # let _ = config;
/// ```
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct GradBlendConfig {
    blender: Config,
    pub(super) every: u64,
    pub(super) schedule: Option<Schedule>,
    cadence: Option<Cadence>,
    min_weight: Vec<f64>,
    threads: Option<u32>,
    pub(super) leave_sums: bool,
}

impl GradBlendConfig {
    /// K losses, of which the last is the fused one. Each call observes; moments are exponential averages with decay 0.99;
    /// overfitting is uncorrelated; negative weights are clamped; all CPU threads.
    pub fn new(num_losses: u32) -> Self {
        let blender = Config::new(num_losses);
        GradBlendConfig {
            blender,
            every: 1,
            schedule: None,
            cadence: None,
            min_weight: Vec::new(),
            threads: None,
            leave_sums: false,
        }
    }

    /// Observe at the first call, then at each `every`-th. A larger number is cheaper, and weights move more slowly.
    pub fn every(self, every: u64) -> Self {
        GradBlendConfig { every, ..self }
    }

    /// Reweight at the end of a super-epoch, in [`Trainer::end_epoch`](super::Trainer::end_epoch), not at each observation.
    /// With [`Schedule::offline`] no call observes: the weights are those of
    /// [`Trainer::set_weights`](super::Trainer::set_weights).
    pub fn schedule(self, schedule: Schedule) -> Self {
        GradBlendConfig { schedule: Some(schedule), ..self }
    }

    /// When to solve for the weights: at each observation unless there is a schedule. With [`Cadence::OnRequest`] in
    /// [`Trainer::reweight`](super::Trainer::reweight).
    pub fn cadence(self, cadence: Cadence) -> Self {
        GradBlendConfig { cadence: Some(cadence), ..self }
    }

    /// K least weights of the losses. They bound the weights that are found; the first weights are 1/K.
    pub fn min_weight(self, min_weight: &[f64]) -> Self {
        GradBlendConfig { min_weight: min_weight.to_vec(), ..self }
    }

    /// Whether the overfitting of the losses is correlated.
    pub fn overfitting(mut self, overfitting: Overfitting) -> Self {
        self.blender.policy.overfitting = overfitting;
        self
    }

    /// What to do with negative weights.
    pub fn negative(mut self, negative: Negative) -> Self {
        self.blender.policy.negative = negative;
        self
    }

    /// Damping of the second moments: see [`Policy`](crate::Policy).
    pub fn damping(mut self, damping: f64) -> Self {
        self.blender.policy.damping = damping;
        self
    }

    /// How observations are averaged.
    pub fn average(mut self, average: Average) -> Self {
        self.blender.average = average;
        self
    }

    /// An exponential average with this decay.
    pub fn decay(self, decay: f64) -> Self {
        self.average(Average::Ema { decay })
    }

    /// On several ranks: observing calls leave the products pending, for [`Trainer::reduce`](super::Trainer::reduce) or
    /// [`Trainer::observe_each`](super::Trainer::observe_each), which observes them.
    pub fn leave_sums(self, leave: bool) -> Self {
        GradBlendConfig { leave_sums: leave, ..self }
    }

    /// CPU threads of gradblend, the caller's included; 0 is one per core. By default those of the framework, where it has a
    /// number.
    pub fn threads(self, threads: u32) -> Self {
        GradBlendConfig { threads: Some(threads), ..self }
    }

    /// As [`threads`](Self::threads), unless they are given: for the crate of a framework.
    pub fn default_threads(self, threads: u32) -> Self {
        GradBlendConfig { threads: self.threads.or(Some(threads)), ..self }
    }

    /// The blender's configuration.
    ///
    /// # Errors
    /// [`Error::Every`]; [`Error::Count`] for a number of least weights that is not K. [`Blender::new`](crate::Blender::new)
    /// checks the rest.
    pub(super) fn checked(&self) -> Result<Config> {
        if self.every == 0 {
            return Err(Error::Every);
        }
        let mut config = Config { threads: self.threads.unwrap_or(0), ..self.blender };
        let by_schedule = if self.schedule.is_some() { Cadence::OnRequest } else { Cadence::EveryObservation };
        config.cadence = self.cadence.unwrap_or(by_schedule);
        let (expected, got) = (config.k(), self.min_weight.len());
        if got != 0 && got != expected {
            return Err(Error::Count { what: "min_weight", expected, got });
        }
        if let Some(least) = config.policy.min_weight.get_mut(..got) {
            least.copy_from_slice(&self.min_weight);
        }
        Ok(config)
    }
}
