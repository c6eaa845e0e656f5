#![doc = include_str!("../README.md")]

mod passes;
#[cfg(test)]
mod tests;

use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use gradblend::Device;
use gradblend::trainer::IntoLoss;
use tch::Tensor;
use tch::nn::VarStore;

pub use gradblend::trainer::{Error, GradBlendConfig, Loss, Result, Trainer};
pub use gradblend::{Average, Cadence, Flags, Negative, Overfitting, Report, Schedule};

use passes::{Call, Parameter};

/// Weights the K losses of a multi-modal network by how each overfits, and adds the blended gradient to `.grad`.
///
/// Everything but [`backward`](Self::backward) is in [`Trainer`]: weights, reports, super-epochs, states.
#[derive(Debug)]
pub struct GradBlend {
    trainer: Trainer,
    device: Device,
    parameters: Vec<Parameter>,
    /// Those that can only stay frozen.
    frozen: Vec<Parameter>,
    copied: u64,
}

impl GradBlend {
    /// A blender of the gradients of `vars`, which errors name by their position. Frozen ones are left alone as long as they are
    /// frozen. One that is given twice counts once.
    ///
    /// # Errors
    /// [`Error::NoParameter`]; [`Error::Parameter`] for one that is not f32, f16 or bf16, not on the device of the others,
    /// or computed from other tensors; [`Error::Blend`] for an option out of range, and for a CUDA device without the feature
    /// `cuda`.
    pub fn new(vars: &[Tensor], config: GradBlendConfig) -> Result<Self> {
        let name = |(i, var): (usize, &Tensor)| (format!("parameter {i}"), var.shallow_clone());
        Self::named(vars.iter().enumerate().map(name), config)
    }

    /// A blender of the gradients of a store's variables. Errors have their names.
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
        let mut all: Vec<Parameter> = Vec::new();
        for (name, var) in vars {
            let parameter = Parameter::new(name, var);
            if !all.iter().any(|other| parameter.is(other)) {
                all.push(parameter);
            }
        }
        let first = all.iter().find(|parameter| parameter.var.requires_grad()).ok_or(Error::NoParameter)?;
        let (first, name) = (first.var.device(), first.name.clone());
        let (mut parameters, mut frozen) = (Vec::new(), Vec::new());
        for parameter in all {
            match parameter.check(first) {
                Ok(()) => parameters.push(parameter),
                Err(error) if parameter.var.requires_grad() => return Err(error),
                Err(_) => frozen.push(parameter),
            }
        }
        let device = match first {
            tch::Device::Cpu => Device::cpu(),
            tch::Device::Cuda(ordinal) => Device::cuda(ordinal as i32)?,
            other => {
                let expected = "on the CPU or a CUDA device".to_owned();
                return Err(Error::Parameter { parameter: name, expected, got: format!("on {other:?}") });
            }
        };
        let config = config.default_threads(tch::get_num_threads() as u32);
        Ok(GradBlend { trainer: Trainer::new(&device, &config)?, device, parameters, frozen, copied: 0 })
    }

    /// Adds the gradient of sum_k w_k L_k to `.grad` of the parameters, with the weights in force; a missing one is created. A
    /// call that [observes](Trainer::observes) then finds new weights. The fused loss is the last of the K; its graph is freed.
    ///
    /// `held_out` computes the fused loss on a batch that is not trained on. Observing calls alone call it. It returns a
    /// `Tensor`, or a `Result` of one.
    ///
    /// The train gradient t is that of the fused loss in `losses`. Its batch's noise then counts as overfitting of the fused
    /// loss, which lowers its weight: see [`backward_with_train`](Self::backward_with_train).
    ///
    /// # Errors
    /// [`Error::Losses`], [`Error::Loss`], [`Error::Unreached`], [`Error::Gradient`], [`Error::Closure`] and
    /// [`Error::Framework`]. They name the loss and the parameter, and `.grad` and the state have not changed. The graphs that
    /// backward passes have run through are used up: after an error of `held_out`, compute the losses anew.
    pub fn backward<R: IntoLoss<Tensor>>(&mut self, losses: &[Tensor], held_out: impl FnOnce() -> R) -> Result<()> {
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
    ) -> Result<()> {
        self.call(losses, held_out, Some(train))
    }

    /// Gradients that were copied so far: those of one parameter that are not dense, or differ in their strides.
    pub fn copied(&self) -> u64 {
        self.copied
    }

    fn call<R: IntoLoss<Tensor>, T: IntoLoss<Tensor>>(
        &mut self,
        losses: &[Tensor],
        held_out: impl FnOnce() -> R,
        train: Option<impl FnOnce() -> T>,
    ) -> Result<()> {
        let GradBlend { trainer, device, parameters, frozen, copied } = self;
        trainer.check_losses(losses.len())?;
        for (k, loss) in losses.iter().enumerate() {
            passes::check_loss(Loss::Given(k), loss)?;
        }
        if let Some(parameter) = frozen.iter().find(|parameter| parameter.var.requires_grad()) {
            parameter.check(parameters[0].var.device())?;
        }
        let trained = passes::trained(parameters)?;
        let mut call = Call::new(*device, parameters, trained, losses, copied);
        // As `backward` of PyTorch does, also where gradients are switched off. tch does not switch them off again in a panic.
        let ran = tch::with_grad(|| catch_unwind(AssertUnwindSafe(|| trainer.backward(&mut call, held_out, train))));
        ran.unwrap_or_else(|panic| resume_unwind(panic))
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
