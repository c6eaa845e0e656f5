//! Errors of trainers. They name the loss and the parameter.

use std::error::Error as StdError;
use std::fmt;

/// Result of a trainer's call.
pub type Result<T> = std::result::Result<T, Error>;

/// A loss of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// A loss of the training batch, counted from 0; the last is the fused one.
    Given(usize),
    /// The weighted sum of these.
    Sum,
    /// The fused loss on the held-out batch.
    HeldOut,
    /// The fused loss on an independent training batch.
    Train,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Given(k) => write!(f, "losses[{k}]"),
            Loss::Sum => write!(f, "the weighted sum of the losses"),
            Loss::HeldOut => write!(f, "the held-out loss"),
            Loss::Train => write!(f, "the train loss"),
        }
    }
}

/// Everything that a trainer rejects. Nothing has changed then, except after a failure of a CUDA driver, and where the framework
/// fails to store the gradients that were blended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// gradblend rejected an option, or the CUDA driver failed.
    #[error(transparent)]
    Blend(#[from] crate::Error),
    /// The number of losses is not K.
    #[error("there are {got} losses, expected {expected}")]
    Losses {
        /// K.
        expected: usize,
        /// The number given.
        got: usize,
    },
    /// A loss is no scalar, or a backward pass cannot start from it.
    #[error("{loss} is {got}, expected {expected}")]
    Loss {
        /// The loss.
        loss: Loss,
        /// What a loss is.
        expected: &'static str,
        /// What this one is.
        got: String,
    },
    /// A loss does not depend on any parameter.
    #[error("{loss} reaches no parameter")]
    Unreached {
        /// The loss.
        loss: Loss,
    },
    /// The latest call has left products pending, or none has.
    #[error("{}", match pending {
        true => "the products of the latest call are pending: call reduce or observe_each first",
        false => "no call has left products pending",
    })]
    PendingSums {
        /// Whether products are pending.
        pending: bool,
    },
    /// There is no parameter.
    #[error("there is no parameter to train")]
    NoParameter,
    /// A parameter cannot be trained: its dtype or its device is not supported, or not that of the others.
    #[error("{parameter} is {got}, expected {expected}")]
    Parameter {
        /// Name of the parameter, or its number.
        parameter: String,
        /// What is expected of it.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A gradient is not like its parameter.
    #[error("{parameter}: the gradient of {loss} is {got}, expected {expected}")]
    Gradient {
        /// Name of the parameter, or its number.
        parameter: String,
        /// The loss.
        loss: Loss,
        /// Dtype, shape and device of the parameter.
        expected: String,
        /// Those of the gradient.
        got: String,
    },
    /// The function that computes a loss failed.
    #[error("{loss}: {error}")]
    Closure {
        /// The loss.
        loss: Loss,
        /// The function's error.
        error: Box<dyn StdError + Send + Sync>,
    },
    /// A backward pass, or another operation of the framework, failed.
    #[error("{loss}: {error}")]
    Framework {
        /// The loss in work.
        loss: Loss,
        /// The framework's error.
        error: Box<dyn StdError + Send + Sync>,
    },
}

impl Error {
    /// For `map_err`: the framework failed in work on a loss.
    pub fn framework<E: Into<Box<dyn StdError + Send + Sync>>>(loss: Loss) -> impl FnOnce(E) -> Self {
        move |error| Error::Framework { loss, error: error.into() }
    }
}

/// What a function that computes a loss may return: the loss, or a result of it with any error.
pub trait IntoLoss<L> {
    /// The loss.
    ///
    /// # Errors
    /// [`Error::Closure`] with the function's error.
    fn into_loss(self, loss: Loss) -> Result<L>;
}

impl<L> IntoLoss<L> for L {
    fn into_loss(self, _: Loss) -> Result<L> {
        Ok(self)
    }
}

impl<L, E: Into<Box<dyn StdError + Send + Sync>>> IntoLoss<L> for std::result::Result<L, E> {
    fn into_loss(self, loss: Loss) -> Result<L> {
        self.map_err(|error| Error::Closure { loss, error: error.into() })
    }
}
