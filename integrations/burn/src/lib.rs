#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod passes;
mod visitors;

use std::ops::{Deref, DerefMut};

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use gradblend::Device;
use gradblend::trainer::IntoLoss;

pub use gradblend::trainer::{Error, GradBlendConfig, Loss, Result, Trainer};
pub use gradblend::{Average, Cadence, Flags, Negative, Overfitting, Report, Schedule};

use passes::Call;
use visitors::Parameter;

/// Weights the K losses of a multi-modal network by how each overfits, and returns the blended gradient for the optimiser.
///
/// Everything but [`backward`](Self::backward) is in [`Trainer`]: weights, reports, super-epochs, states.
#[derive(Debug)]
pub struct GradBlend {
    trainer: Trainer,
    parameters: Vec<Parameter>,
}

impl GradBlend {
    /// A blender of the gradients of a module's parameters, frozen ones included. Errors have their paths in the module.
    ///
    /// # Errors
    /// [`Error::NoParameter`], also for a module on a device without autodiff; [`Error::Parameter`] for one that is not f32,
    /// f16 or bf16, or not on a CPU device of burn; [`Error::Blend`] for an option out of range.
    pub fn new<M: Module>(module: &M, config: GradBlendConfig) -> Result<Self> {
        let parameters = visitors::parameters(module)?;
        Ok(GradBlend { trainer: Trainer::new(&Device::cpu(), &config)?, parameters })
    }

    /// Returns the gradient of sum_k w_k L_k for the parameters of `module`, with the weights in force. A call that
    /// [observes](Trainer::observes) then finds new ones.
    ///
    /// `losses` computes the K losses of a training batch, of which the fused one comes last. A backward pass of burn uses up
    /// the graph, of which the losses share parts, so an observing call calls this function K times, and other calls call it
    /// once. It must return the same losses each time: draw the batch before.
    ///
    /// `held_out` computes the fused loss on a batch that is not trained on. Observing calls alone call it. It returns a
    /// `Tensor<1>`, or a `Result` of one.
    ///
    /// The train gradient t is that of the fused loss in `losses`. Its batch's noise then counts as overfitting of the fused
    /// loss, which lowers its weight: see [`backward_with_train`](Self::backward_with_train).
    ///
    /// # Errors
    /// [`Error::Losses`], [`Error::Loss`], [`Error::Unreached`], [`Error::Gradient`], [`Error::Closure`] and
    /// [`Error::Framework`]; [`Error::Parameter`] for a module with other parameters than that of [`new`](Self::new). They
    /// name the loss and the parameter, and nothing has changed.
    ///
    /// # Panics
    /// burn's, for a loss whose graph is used up.
    pub fn backward<M: Module, L: IntoIterator<Item = Tensor<1>>, R: IntoLoss<Tensor<1>>>(
        &mut self,
        module: &M,
        losses: impl FnMut() -> L,
        held_out: impl FnOnce() -> R,
    ) -> Result<GradientsParams> {
        self.call(module, losses, held_out, None::<fn() -> Tensor<1>>)
    }

    /// As [`backward`](Self::backward), with t from `train`, which computes the fused loss on a training batch drawn
    /// independently of that of `losses`: unbiased, for one more forward and backward pass in observing calls.
    ///
    /// # Errors
    /// Those of [`backward`](Self::backward).
    ///
    /// # Panics
    /// As [`backward`](Self::backward).
    pub fn backward_with_train<M, L, R, T>(
        &mut self,
        module: &M,
        losses: impl FnMut() -> L,
        held_out: impl FnOnce() -> R,
        train: impl FnOnce() -> T,
    ) -> Result<GradientsParams>
    where
        M: Module,
        L: IntoIterator<Item = Tensor<1>>,
        R: IntoLoss<Tensor<1>>,
        T: IntoLoss<Tensor<1>>,
    {
        self.call(module, losses, held_out, Some(train))
    }

    fn call<M, L, R, T>(
        &mut self,
        module: &M,
        mut losses: impl FnMut() -> L,
        held_out: impl FnOnce() -> R,
        train: Option<impl FnOnce() -> T>,
    ) -> Result<GradientsParams>
    where
        M: Module,
        L: IntoIterator<Item = Tensor<1>>,
        R: IntoLoss<Tensor<1>>,
        T: IntoLoss<Tensor<1>>,
    {
        let GradBlend { trainer, parameters } = self;
        visitors::check(module, parameters)?;
        let expected = trainer.weights().len();
        let mut losses = || -> Result<Vec<Tensor<1>>> {
            let losses: Vec<_> = losses().into_iter().collect();
            if losses.len() != expected {
                return Err(Error::Losses { expected, got: losses.len() });
            }
            for (k, loss) in losses.iter().enumerate() {
                passes::check_loss(Loss::Given(k), loss)?;
            }
            Ok(losses)
        };
        trainer.backward(&mut Call { module, parameters, losses: &mut losses }, held_out, train)
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
