#![doc = include_str!("../README.md")]

mod passes;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::ops::{Deref, DerefMut};

use gradblend::Device;
use gradblend::trainer::{IntoLoss, Loss, Trainer};
use tch::nn::VarStore;
use tch::{Kind, Tensor};

pub use gradblend::trainer::{Error, GradBlendConfig, Result};

use passes::{Call, Parameter};

/// Weights the K losses of a multi-modal network by how each overfits, and adds the blended gradient to `.grad`.
///
/// Everything but [`backward`](Self::backward) is in [`Trainer`]: weights, reports, super-epochs, states.
#[derive(Debug)]
pub struct GradBlend {
    trainer: Trainer,
    parameters: Vec<Parameter>,
    copied: u64,
}

impl GradBlend {
    /// A blender of the gradients of `vars`, which errors name by their position. Those that do not require a gradient are
    /// left out, and those that share their memory count once.
    ///
    /// # Errors
    /// [`Error::NoParameter`]; [`Error::Parameter`] for one that is not f32, f16 or bf16, not on the device of the others,
    /// or computed from other tensors; [`Error::Blend`] for an option out of range, and for a CUDA device without the feature
    /// `cuda`.
    pub fn new(vars: &[Tensor], config: GradBlendConfig) -> Result<Self> {
        let name = |(i, var): (usize, &Tensor)| (format!("parameter {i}"), var.shallow_clone());
        Self::named(vars.iter().enumerate().map(name), config)
    }

    /// A blender of the gradients of a store's trainable variables. Errors have their names.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn of(store: &VarStore, config: GradBlendConfig) -> Result<Self> {
        let mut variables: Vec<_> = store.variables().into_iter().collect();
        // The order of a hash map would change the rounding of the sums from run to run.
        variables.sort_by(|(one, _), (other, _)| one.cmp(other));
        Self::named(variables, config)
    }

    /// A blender of the gradients of tensors with names.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn named(vars: impl IntoIterator<Item = (String, Tensor)>, config: GradBlendConfig) -> Result<Self> {
        let mut seen = HashSet::new();
        let mut parameters = Vec::new();
        for (name, var) in vars.into_iter().filter(|(_, var)| var.requires_grad()) {
            let parameter = Parameter::new(name, var)?;
            if parameter.is_empty() || seen.insert(parameter.memory()) {
                parameters.push(parameter);
            }
        }
        let first = &parameters.first().ok_or(Error::NoParameter)?.var;
        for Parameter { name, var, .. } in &parameters {
            let expected = if !matches!(var.kind(), Kind::Float | Kind::Half | Kind::BFloat16) {
                "f32, f16 or bf16".to_owned()
            } else if var.device() != first.device() {
                format!("on {:?}, as the first one", first.device())
            } else if !var.is_leaf() {
                "a leaf, which is not computed from other tensors".to_owned()
            } else {
                continue;
            };
            let got = format!("{:?} on {:?}{}", var.kind(), var.device(), if var.is_leaf() { "" } else { ", no leaf" });
            return Err(Error::Parameter { parameter: name.clone(), expected, got });
        }
        let device = match first.device() {
            tch::Device::Cpu => Device::cpu(),
            tch::Device::Cuda(ordinal) => Device::cuda(ordinal as i32)?,
            other => {
                let (parameter, expected) = (parameters[0].name.clone(), "on the CPU or a CUDA device".to_owned());
                return Err(Error::Parameter { parameter, expected, got: format!("on {other:?}") });
            }
        };
        Ok(GradBlend { trainer: Trainer::new(&device, &config)?, parameters, copied: 0 })
    }

    /// Adds the gradient of sum_k w_k L_k to `.grad` of the parameters, with the weights in force; a missing one is created. A
    /// call that [observes](Trainer::observes) then finds new weights. The fused loss is the last of the K; its graph is freed.
    ///
    /// `held_out` computes the fused loss on a batch that is not trained on. Observing calls alone call it. It returns a
    /// `Tensor`, or a `Result` of one.
    ///
    /// The train gradient t is that of the fused loss in `losses`. Its batch's noise then counts as overfitting of the fused
    /// loss, which lowers its weight: see [`backward_independent`](Self::backward_independent).
    ///
    /// # Errors
    /// [`Error::Losses`], [`Error::Loss`], [`Error::Unreached`], [`Error::Gradient`], [`Error::Closure`] and
    /// [`Error::Framework`]. They name the loss and the parameter, and `.grad` and the state have not changed.
    pub fn backward<R: IntoLoss<Tensor>>(&mut self, losses: &[Tensor], held_out: impl FnOnce() -> R) -> Result<()> {
        self.call(losses, Box::new(|| held_out().into_loss(Loss::HeldOut)), None)
    }

    /// As [`backward`](Self::backward), with t from `independent`, which computes the fused loss on a training batch drawn
    /// independently of that of `losses`: unbiased, for one more forward and backward pass in observing calls.
    ///
    /// # Errors
    /// Those of [`backward`](Self::backward).
    pub fn backward_independent<R: IntoLoss<Tensor>, I: IntoLoss<Tensor>>(
        &mut self,
        losses: &[Tensor],
        held_out: impl FnOnce() -> R,
        independent: impl FnOnce() -> I,
    ) -> Result<()> {
        let independent = || independent().into_loss(Loss::Independent);
        self.call(losses, Box::new(|| held_out().into_loss(Loss::HeldOut)), Some(Box::new(independent)))
    }

    /// Gradients that were copied so far: those of one parameter that are not dense, or differ in their strides.
    pub fn copied(&self) -> u64 {
        self.copied
    }

    fn call<'a>(
        &'a mut self,
        losses: &'a [Tensor],
        held_out: passes::Closure<'a>,
        independent: Option<passes::Closure<'a>>,
    ) -> Result<()> {
        let GradBlend { trainer, parameters, copied } = self;
        trainer.check_losses(losses.len())?;
        for (k, loss) in losses.iter().enumerate() {
            passes::check_loss(Loss::Train(k), loss)?;
        }
        let trained = passes::trained(parameters)?;
        let mut call = Call::new(parameters, trained, losses, held_out, independent, copied);
        // As `backward` of PyTorch does, also where gradients are switched off.
        tch::with_grad(|| trainer.backward(&mut call))
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
