//! What a framework does for a trainer: backward passes, and memory for gradients.

use crate::device::Device;
use crate::gradient::{Gradient, GradientMut};
use crate::tensor::{DType, StreamRef, TensorGrads};

use super::error::{Loss, Result};

/// The backward passes of one call of a trainer.
pub trait Passes {
    /// A scalar that a backward pass starts from.
    type Loss;
    /// One gradient: a handle that is cheap to drop.
    type Gradient;
    /// Memory for one blended gradient.
    type Memory;
    /// What the framework's optimiser takes.
    type Output;

    /// The device of the parameters.
    fn device(&self) -> Device;

    /// Elements and dtype of a parameter.
    fn shape(&self, parameter: usize) -> (u64, DType);

    /// Loss `k` of the training batch.
    ///
    /// # Errors
    /// Those of the framework and of the checks.
    fn loss(&mut self, k: usize) -> Result<Self::Loss>;

    /// Runs the backward pass of a loss times `scale`, and returns the gradient of each parameter; `None` where the loss does
    /// not reach it. Each has its parameter's length, dtype and device, and its elements in the same order as the others.
    ///
    /// # Errors
    /// Those of the framework and of the checks.
    fn gradients(&mut self, name: Loss, loss: Self::Loss, scale: f32) -> Result<Vec<Option<Self::Gradient>>>;

    /// Runs one backward pass on the sum of the losses `k` times their factors, and returns or stores its gradients.
    ///
    /// # Errors
    /// As [`gradients`](Self::gradients).
    fn weighted(&mut self, terms: &[(usize, f32)]) -> Result<Self::Output>;

    /// A gradient of zeros like this one.
    ///
    /// # Errors
    /// Those of the framework.
    fn zeros(&mut self, like: &Self::Gradient) -> Result<Self::Gradient>;

    /// Memory for the blended gradient of a parameter, which nothing else uses.
    ///
    /// # Errors
    /// Those of the framework.
    fn memory(&mut self, parameter: usize) -> Result<Self::Memory>;

    /// Calls `run` once with the tensors of the rows, in their order, and the stream of the framework's work. An absent
    /// `blended` is not written.
    ///
    /// # Errors
    /// Those of `run`, and of the framework.
    fn bind(
        &mut self,
        rows: &[Row<Self::Gradient>],
        blended: &mut [Option<Self::Memory>],
        run: &mut dyn FnMut(Vec<TensorGrads<'_>>, StreamRef<'_>) -> crate::Result<()>,
    ) -> Result<()>;

    /// Returns or stores the blended gradients; `None` where no loss reaches the parameter.
    ///
    /// # Errors
    /// Those of the framework.
    fn output(&mut self, blended: Vec<Option<Self::Memory>>) -> Result<Self::Output>;
}

/// The gradients of one parameter.
#[derive(Clone, Debug)]
pub struct Row<T> {
    /// Elements and dtype of the parameter.
    pub shape: (u64, DType),
    /// t. Absent where it is the last of `modalities`, or where `valid` is absent.
    pub train: Option<T>,
    /// g. Without it the parameter is only blended.
    pub valid: Option<T>,
    /// v_k; absent where loss k does not reach the parameter.
    pub modalities: Vec<Option<T>>,
}

impl<T> Row<T> {
    /// Puts the gradients of one parameter together. Only one of t and g counts as zeros in the other.
    pub(super) fn new(
        shape: (u64, DType),
        modalities: Vec<Option<T>>,
        train: Option<Option<T>>,
        valid: Option<T>,
        zeros: impl FnOnce(&T) -> Result<T>,
    ) -> Result<Self> {
        let mut row = Row { shape, train: None, valid: None, modalities };
        if row.modalities.iter().any(Option::is_some) {
            let (zero, valid) = match (train.as_ref().map_or(row.last(), Option::as_ref), valid) {
                (Some(train), None) => (None, Some(zeros(train)?)),
                (None, Some(valid)) => (Some(zeros(&valid)?), Some(valid)),
                (_, valid) => (None, valid),
            };
            row.train = train.flatten().or(zero);
            row.valid = valid;
        }
        Ok(row)
    }

    fn last(&self) -> Option<&T> {
        self.modalities.last()?.as_ref()
    }

    /// t, where there is g.
    pub fn train(&self) -> Option<&T> {
        self.valid.as_ref()?;
        self.train.as_ref().or(self.last())
    }

    /// The same row of other handles, for example locked ones.
    ///
    /// # Errors
    /// The first of `handle`.
    pub fn map<'a, U>(&'a self, mut handle: impl FnMut(&'a T) -> Result<U>) -> Result<Row<U>> {
        let mut each = |gradient: &'a Option<T>| gradient.as_ref().map(&mut handle).transpose();
        let (train, valid) = (each(&self.train)?, each(&self.valid)?);
        Ok(Row {
            shape: self.shape,
            train,
            valid,
            modalities: self.modalities.iter().map(each).collect::<Result<_>>()?,
        })
    }

    /// The tensor of this row. A handle without a gradient counts as absent.
    pub fn tensor<'a>(
        &'a self,
        gradient: impl Fn(&'a T) -> Option<Gradient<'a>>,
        blended: Option<GradientMut<'a>>,
    ) -> TensorGrads<'a> {
        let (train, valid) = (self.train().and_then(&gradient), self.valid.as_ref().and_then(&gradient));
        let modalities = self.modalities.iter().map(|v| v.as_ref().and_then(&gradient));
        TensorGrads::from_gradients(self.shape, train, valid, modalities, blended)
    }
}
