//! Observations of several ranks, each with a trainer.

use crate::ranks::Ranks;
use crate::state::Flags;
use crate::tensor::Stream;

use super::{Error, Result, Trainer};

impl Trainer {
    /// Adds the products of the latest call up over ranks that hold parts of each gradient, observes the sums, and finds new
    /// weights. For trainers with [`GradBlendConfig::leave_sums`](super::GradBlendConfig::leave_sums); all ranks call it after
    /// each call that observed.
    ///
    /// On a CUDA device the exchange is in the default stream, which the engine's must be. Returns the ranks whose products
    /// were not finite, where all ranks skip the observation.
    ///
    /// # Errors
    /// [`Error::PendingSums`] if no call has left products; [`Error::Blend`] as
    /// [`Blender::reduce`](crate::Blender::reduce), after which they are still pending.
    pub fn reduce(&mut self, ranks: &mut dyn Ranks) -> Result<Vec<usize>> {
        self.expect_pending(true)?;
        self.blender.reduce(ranks, Stream::default())?;
        self.blender.observe(Stream::default())?;
        self.pending = false;
        let report = self.read_weights()?;
        let nonfinite = report.flags.contains(Flags::NONFINITE);
        let found = if nonfinite { self.blender.nonfinite_ranks(ranks, Stream::default())? } else { Vec::new() };
        self.tell(Some(&report));
        Ok(found)
    }

    /// Observes the products of each rank's own gradients, in the order of the ranks, and finds new weights: for copies of a
    /// model with batches of their own, whose blended gradients the caller averages. Otherwise as [`reduce`](Self::reduce).
    ///
    /// # Errors
    /// [`Error::PendingSums`] if no call has left products; [`Error::Blend`] as
    /// [`Blender::observe_each`](crate::Blender::observe_each), after which they are still pending.
    pub fn observe_each(&mut self, ranks: &mut dyn Ranks) -> Result<Vec<usize>> {
        self.expect_pending(true)?;
        let found = self.blender.observe_each(ranks, Stream::default())?;
        self.pending = false;
        let report = self.read_weights()?;
        self.tell(Some(&report));
        Ok(found)
    }

    pub(super) fn expect_pending(&self, pending: bool) -> Result<()> {
        if self.pending == pending { Ok(()) } else { Err(Error::PendingSums { pending: self.pending }) }
    }
}
