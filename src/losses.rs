//! Loss-based estimator: overfitting-to-generalisation ratios from four losses a modality (GB_Estimate of the paper).

use crate::abi::MAX_MODALITIES;
use crate::error::{Error, Result};
use crate::solve::{Policy, Solution, solve};

/// Mean losses of one modality at one point of training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Losses {
    /// T: mean loss over the training samples.
    pub train: f64,
    /// V: mean loss over the held-out samples.
    pub valid: f64,
}

/// Mean loss over samples in batches of any sizes.
///
/// A mean and not a sum, so that loaders of different length compare.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MeanLoss {
    sum: f64,
    samples: u64,
}

impl MeanLoss {
    /// Adds a batch of `samples` with this mean loss.
    pub fn add(&mut self, mean: f64, samples: u64) {
        // An empty batch has no mean and must not make the total NaN.
        if samples > 0 {
            self.sum += mean * samples as f64;
            self.samples = self.samples.saturating_add(samples);
        }
    }

    /// The mean over all samples; NaN without any.
    pub fn mean(&self) -> f64 {
        self.sum / self.samples as f64
    }
}

/// Result of [`ogr`] and [`gb_estimate`], K values each.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimate {
    /// dG_k = V_N - V_{N+n}: decrease of the validation loss; negative if it rose.
    pub delta_g: Vec<f64>,
    /// dO_k = (V_{N+n} - T_{N+n}) - (V_N - T_N): growth of the gap between the two losses.
    pub delta_o: Vec<f64>,
    /// |dO_k / dG_k|; 0 / 0 is NaN.
    pub ogr: Vec<f64>,
    /// The weights, from `solve(dG, diag(dO^2))`.
    pub solution: Solution,
}

/// Weights from the losses of each modality at a checkpoint and after training it alone.
///
/// w_k = dG_k / dO_k^2, normalised, by `policy`. Source: Wang, Tran, Feiszli, CVPR 2020, section 3.
///
/// # Errors
/// [`Error::Modalities`] for no or more than 32 modalities, [`Error::Count`] unless both lists have one entry for each,
/// [`Error::Loss`] for a loss, or a difference of losses, that is not finite, [`Error::Damping`],
/// [`Error::MinWeight`], [`Error::MinWeightSum`].
///
/// ```
/// use gradblend::{Losses, Policy, ogr};
/// let before = [Losses { train: 2.0, valid: 2.0 }; 2];
/// let after = [Losses { train: 1.0, valid: 1.5 }, Losses { train: 0.5, valid: 1.5 }];
/// let estimate = ogr(&before, &after, &Policy::default())?;
/// // Both gain 0.5; their gaps widen by 0.5 and 1.
/// let weights = estimate.solution.weights.unwrap_or_default();
/// assert!((weights[0] - 0.8).abs() < 1e-9 && (weights[1] - 0.2).abs() < 1e-9);
/// # Ok::<(), gradblend::Error>(())
/// ```
pub fn ogr(before: &[Losses], after: &[Losses], policy: &Policy) -> Result<Estimate> {
    let modalities = before.len();
    if modalities == 0 || modalities > MAX_MODALITIES {
        return Err(Error::Modalities { got: modalities as u64 });
    }
    if after.len() != modalities {
        return Err(Error::Count { what: "the losses after training", expected: modalities, got: after.len() });
    }
    policy.check(modalities)?;
    for (when, losses) in [("at the checkpoint", before), ("after training", after)] {
        for (modality, loss) in losses.iter().enumerate() {
            for (which, got) in [("training", loss.train), ("validation", loss.valid)] {
                if !got.is_finite() {
                    return Err(Error::Loss { modality, which, when, got });
                }
            }
        }
    }
    let pairs = || before.iter().zip(after);
    let delta_g: Vec<f64> = pairs().map(|(n, m)| n.valid - m.valid).collect();
    let delta_o: Vec<f64> = pairs().map(|(n, m)| (m.valid - m.train) - (n.valid - n.train)).collect();
    for difference in [&delta_g, &delta_o] {
        if let Some(modality) = difference.iter().position(|got| !got.is_finite()) {
            let (which, when, got) = ("difference of the", "before and after training", difference[modality]);
            return Err(Error::Loss { modality, which, when, got });
        }
    }
    // Scaling all gaps does not change the weights; near 1 their squares neither underflow nor overflow.
    let largest = delta_o.iter().fold(0.0, |max: f64, gap| max.max(gap.abs()));
    let mut second_moment = vec![0.0; modalities * modalities];
    if largest > 0.0 {
        for (k, gap) in delta_o.iter().enumerate() {
            second_moment[k * modalities + k] = (gap / largest) * (gap / largest);
        }
    }
    Ok(Estimate {
        ogr: delta_o.iter().zip(&delta_g).map(|(o, g)| (o / g).abs()).collect(),
        solution: solve(&delta_g, &second_moment, policy)?,
        delta_g,
        delta_o,
    })
}

/// A network that [`gb_estimate`] trains one modality at a time. Modalities are counted from 0, the fused one included.
pub trait Trainee {
    /// Everything that training changes: weights, optimiser state, random state.
    type Checkpoint;
    /// Error of the trainee. The estimator's errors are converted to it.
    type Error: From<Error>;

    /// K.
    fn modalities(&self) -> usize;
    /// Makes a checkpoint.
    ///
    /// # Errors
    /// Those of the trainee.
    fn save(&mut self) -> std::result::Result<Self::Checkpoint, Self::Error>;
    /// Restores a checkpoint.
    ///
    /// # Errors
    /// Those of the trainee.
    fn restore(&mut self, checkpoint: &Self::Checkpoint) -> std::result::Result<(), Self::Error>;
    /// Trains on the loss of one modality alone.
    ///
    /// # Errors
    /// Those of the trainee.
    fn train_modality(&mut self, modality: usize, epochs: u64) -> std::result::Result<(), Self::Error>;
    /// Mean losses of one modality now.
    ///
    /// # Errors
    /// Those of the trainee.
    fn losses(&mut self, modality: usize) -> std::result::Result<Losses, Self::Error>;
}

/// GB_Estimate (algorithm 1 of the paper): trains each modality alone for `epochs` from the current state, measures losses
/// before and after, and returns the weights. Restores the state, after an error too.
///
/// # Errors
/// Those of the trainee, and those of [`ogr`].
pub fn gb_estimate<T: Trainee>(
    trainee: &mut T,
    epochs: u64,
    policy: &Policy,
) -> std::result::Result<Estimate, T::Error> {
    let modalities = trainee.modalities();
    if modalities == 0 || modalities > MAX_MODALITIES {
        return Err(Error::Modalities { got: modalities as u64 }.into());
    }
    policy.check(modalities)?;
    let checkpoint = trainee.save()?;
    let before = (0..modalities).map(|k| trainee.losses(k)).collect::<std::result::Result<Vec<_>, _>>();
    // Measuring can change a trainee too (its random state, say), and each modality must start from the same state.
    trainee.restore(&checkpoint)?;
    let before = before?;
    let mut after = Vec::with_capacity(modalities);
    for k in 0..modalities {
        let losses = trainee.train_modality(k, epochs).and_then(|()| trainee.losses(k));
        trainee.restore(&checkpoint)?;
        after.push(losses?);
    }
    Ok(ogr(&before, &after, policy)?)
}
