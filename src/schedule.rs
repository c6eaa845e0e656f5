//! Schedules: estimate once, or at each super-epoch.

use crate::error::{Error, Result};

/// Super-epochs of a training run. Epochs are counted from 0.
///
/// ```
/// use gradblend::Schedule;
/// let schedule = Schedule::online(10, 5)?;                   // the paper's
/// assert!(schedule.starts(0) && schedule.starts(10) && schedule.starts(15));
/// assert!(schedule.ends(9) && schedule.ends(14) && !schedule.ends(10));
/// assert_eq!(schedule.len(0), Some(10));
/// # Ok::<(), gradblend::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule(Option<(u64, u64)>);

impl Schedule {
    /// A single super-epoch without end: estimate once, at the start, and keep the weights.
    pub fn offline() -> Self {
        Schedule(None)
    }

    /// A first super-epoch of `warm_up` epochs, then super-epochs of `super_epoch` epochs. The paper uses 10 and 5.
    ///
    /// # Errors
    /// [`Error::Schedule`] if either is 0.
    pub fn online(warm_up: u64, super_epoch: u64) -> Result<Self> {
        match (warm_up, super_epoch) {
            (0, _) => Err(Error::Schedule { what: "warm-up" }),
            (_, 0) => Err(Error::Schedule { what: "super-epoch" }),
            lengths => Ok(Schedule(Some(lengths))),
        }
    }

    /// Whether a super-epoch starts with this epoch: estimate from losses before it. True for epoch 0.
    pub fn starts(&self, epoch: u64) -> bool {
        match self.0 {
            None => epoch == 0,
            Some((warm_up, super_epoch)) => {
                epoch == 0 || (epoch >= warm_up && (epoch - warm_up).is_multiple_of(super_epoch))
            }
        }
    }

    /// Whether a super-epoch ends with this epoch: reweight from gradients after it, then reset. Never true offline.
    pub fn ends(&self, epoch: u64) -> bool {
        self.0.is_some() && epoch.checked_add(1).is_some_and(|next| self.starts(next))
    }

    /// Epochs of the super-epoch that contains this epoch: how long the loss-based estimator trains each modality. `None`
    /// offline, where a super-epoch is the whole run.
    pub fn len(&self, epoch: u64) -> Option<u64> {
        self.0.map(|(warm_up, super_epoch)| if epoch < warm_up { warm_up } else { super_epoch })
    }
}
