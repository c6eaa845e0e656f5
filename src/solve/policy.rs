//! Policy of the solver.

use crate::abi::{self, MAX_MODALITIES};
use crate::error::{Error, Result};

/// Assumption on the overfitting of two different modalities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Overfitting {
    /// E\[d_j d_k\] = 0 for j != k, as in Proposition 1 of the paper: only the diagonal of S counts.
    #[default]
    Uncorrelated = abi::UNCORRELATED,
    /// None: all of S counts.
    Correlated = abi::CORRELATED,
}

/// Whether weights may be negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Negative {
    /// No weight is below its [`Policy::min_weight`], which is 0 by default.
    #[default]
    Clamp = abi::CLAMP,
    /// Weights may be negative, provided that their sum before normalisation is positive.
    Signed = abi::SIGNED,
}

/// Policy of the solver.
///
/// ```
/// use gradblend::{Policy, solve};
/// let mut policy = Policy::default();
/// policy.min_weight[1] = 0.5; // the second of two losses keeps at least half of the weight
/// let solution = solve(&[1.0, 1.0], &[1.0, 0.0, 0.0, 3.0], &policy)?;
/// assert_eq!(solution.weights, Some(vec![0.5, 0.5]));
/// # Ok::<(), gradblend::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Assumption on the overfitting of two different modalities.
    pub overfitting: Overfitting,
    /// Whether weights may be negative.
    pub negative: Negative,
    /// Factor of the mean sigma^2_k that is added to each sigma^2_k; at least 0 and finite.
    pub damping: f64,
    /// Least weight of each modality, by its index: at least 0, the sum below 1, and 0 from K on. All 0 for
    /// [`Negative::Signed`]. It bounds what the solver returns, not weights that are held or set by the caller.
    pub min_weight: [f64; MAX_MODALITIES],
}

impl Default for Policy {
    /// Uncorrelated, clamped, damping 1e-12, no least weights.
    fn default() -> Self {
        let (overfitting, negative) = (Overfitting::default(), Negative::default());
        Policy { overfitting, negative, damping: 1e-12, min_weight: [0.0; MAX_MODALITIES] }
    }
}

impl Policy {
    /// Checks the policy for K modalities.
    ///
    /// # Errors
    /// [`Error::Damping`], [`Error::MinWeight`], [`Error::MinWeightSum`].
    pub(crate) fn check(&self, modalities: usize) -> Result<()> {
        if !(self.damping.is_finite() && self.damping >= 0.0) {
            return Err(Error::Damping { got: self.damping });
        }
        for (modality, &got) in self.min_weight.iter().enumerate() {
            let expected = if !(0.0..1.0).contains(&got) {
                "at least 0 and below 1"
            } else if got > 0.0 && modality >= modalities {
                "0 for a modality that does not exist"
            } else if got > 0.0 && self.negative == Negative::Signed {
                "0 where weights may be negative"
            } else {
                continue;
            };
            return Err(Error::MinWeight { modality, expected, got });
        }
        let got = self.min_weight.iter().sum();
        if got >= 1.0 { Err(Error::MinWeightSum { got }) } else { Ok(()) }
    }
}
