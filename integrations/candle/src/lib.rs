#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
mod cuda;
mod passes;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::ops::{Deref, DerefMut};

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use gradblend::Device;
use gradblend::trainer::IntoLoss;

pub use gradblend::trainer::{Error, GradBlendConfig, Loss, Result, Trainer};
pub use gradblend::{Average, Cadence, Flags, Negative, Overfitting, Report, Schedule};

use passes::{Call, Parameter};

/// Weights the K losses of a multi-modal network by how each overfits, and returns the blended gradient for the optimiser.
///
/// Everything but [`backward`](Self::backward) is in [`Trainer`]: weights, reports, super-epochs, states.
#[derive(Debug)]
pub struct GradBlend {
    trainer: Trainer,
    parameters: Vec<Parameter>,
    device: Device,
    stream: cuda::Stream,
    copied: u64,
}

impl GradBlend {
    /// A blender of the gradients of `vars`, which errors name by their position. One that is given twice counts once.
    ///
    /// # Errors
    /// [`Error::NoParameter`]; [`Error::Parameter`] for one that is not f32, f16 or bf16, or not on the device of the
    /// others; [`Error::Blend`] for an option out of range, and for a CUDA device without the feature `cuda`.
    pub fn new(vars: &[Var], config: GradBlendConfig) -> Result<Self> {
        let name = |(i, var): (usize, &Var)| (format!("parameter {i}"), var.clone());
        Self::of(vars.iter().enumerate().map(name), &config)
    }

    /// A blender of the gradients of variables with names, in the order of these, as a candle_nn `VarMap` has them. Errors have
    /// the names.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn named(vars: impl IntoIterator<Item = (String, Var)>, config: GradBlendConfig) -> Result<Self> {
        let mut vars: Vec<_> = vars.into_iter().collect();
        // The order of a hash map would change the rounding of the sums from run to run.
        vars.sort_by(|(one, _), (other, _)| one.cmp(other));
        Self::of(vars, &config)
    }

    fn of(vars: impl IntoIterator<Item = (String, Var)>, config: &GradBlendConfig) -> Result<Self> {
        let mut seen = HashSet::new();
        let parameters = vars.into_iter().filter(|(_, var)| seen.insert(var.id()));
        let parameters: Vec<_> = parameters.map(|(name, var)| Parameter { name, var }).collect();
        let first = &parameters.first().ok_or(Error::NoParameter)?.var;
        for Parameter { name, var } in &parameters {
            let expected = if !matches!(var.dtype(), DType::F32 | DType::F16 | DType::BF16) {
                "f32, f16 or bf16".to_owned()
            } else if !var.device().same_device(first.device()) {
                format!("on {:?}, as the first one", first.device().location())
            } else {
                continue;
            };
            let got = format!("{} on {:?}", var.dtype().as_str(), var.device().location());
            return Err(Error::Parameter { parameter: name.clone(), expected, got });
        }
        let device = match first.device() {
            candle_core::Device::Cpu => Device::cpu(),
            candle_core::Device::Cuda(device) => Device::cuda(cuda::ordinal(device))?,
            candle_core::Device::Metal(_) => {
                let expected = "on the CPU or a CUDA device".to_owned();
                return Err(Error::Parameter {
                    parameter: parameters[0].name.clone(),
                    expected,
                    got: "on Metal".into(),
                });
            }
        };
        let (trainer, stream) = (Trainer::new(&device, config)?, cuda::stream(first.device()));
        Ok(GradBlend { trainer, parameters, device, stream, copied: 0 })
    }

    /// Returns the gradient of sum_k w_k L_k for the parameters, with the weights in force. A call that
    /// [observes](Trainer::observes) then finds new ones. The fused loss is the last of the K.
    ///
    /// `held_out` computes the fused loss on a batch that is not trained on. Observing calls alone call it. It returns a
    /// `Tensor`, or a `Result` of one.
    ///
    /// The train gradient t is that of the fused loss in `losses`. Its batch's noise then counts as overfitting of the fused
    /// loss, which lowers its weight: see [`backward_with_train`](Self::backward_with_train).
    ///
    /// # Errors
    /// [`Error::Losses`], [`Error::Loss`], [`Error::Unreached`], [`Error::Gradient`], [`Error::Closure`] and
    /// [`Error::Framework`]. They name the loss and the parameter, and nothing has changed.
    pub fn backward<R: IntoLoss<Tensor>>(
        &mut self,
        losses: &[Tensor],
        held_out: impl FnOnce() -> R,
    ) -> Result<GradStore> {
        self.call(losses, held_out, None::<fn() -> Tensor>)
    }

    /// As [`backward`](Self::backward), with t from `train`, which computes the fused loss on a training batch drawn
    /// independently of that of `losses`: unbiased, for one more forward and backward pass in observing calls.
    ///
    /// # Errors
    /// Those of [`backward`](Self::backward).
    pub fn backward_with_train<R: IntoLoss<Tensor>, T: IntoLoss<Tensor>>(
        &mut self,
        losses: &[Tensor],
        held_out: impl FnOnce() -> R,
        train: impl FnOnce() -> T,
    ) -> Result<GradStore> {
        self.call(losses, held_out, Some(train))
    }

    /// Gradients that were copied so far because they were not contiguous.
    pub fn copied(&self) -> u64 {
        self.copied
    }

    fn call<R: IntoLoss<Tensor>, T: IntoLoss<Tensor>>(
        &mut self,
        losses: &[Tensor],
        held_out: impl FnOnce() -> R,
        train: Option<impl FnOnce() -> T>,
    ) -> Result<GradStore> {
        let GradBlend { trainer, parameters, device, stream, copied } = self;
        trainer.check_losses(losses.len())?;
        for (k, loss) in losses.iter().enumerate() {
            passes::check_loss(Loss::Given(k), loss)?;
        }
        trainer.backward(&mut Call { parameters, losses, device: *device, stream, copied }, held_out, train)
    }
}

impl Deref for GradBlend {
    type Target = Trainer;

    fn deref(&self) -> &Trainer {
        &self.trainer
    }
}

impl DerefMut for GradBlend {
    fn deref_mut(&mut self) -> &mut Trainer {
        &mut self.trainer
    }
}
