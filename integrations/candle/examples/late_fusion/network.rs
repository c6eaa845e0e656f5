//! The late-fusion network and its optimiser.
//!
//! ```text
//! modality 0 -> encoder 0 -+-> head 0 -> L_0
//!                          +-------------.
//! modality 1 -> encoder 1 -+-> head 1 -> L_1
//!                          +-------------+-> fused head -> L_2
//! ```

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Device, Module, Tensor, Var};
use candle_nn::{Linear, loss};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::data::{Batch, CLASSES};

/// One encoder and one head for each modality, and a head on all encoders' features.
pub(crate) struct Network {
    encoders: Vec<Linear>,
    heads: Vec<Linear>,
    fused: Vec<Linear>,
    parameters: Vec<Var>,
}

impl Network {
    /// A network whose weights come from `rng` alone: candle cannot seed its own random numbers on the CPU.
    pub(crate) fn new(widths: &[usize], hidden: usize, rng: &mut ChaCha8Rng) -> Result<Self> {
        let mut parameters = Vec::new();
        let mut linear = |inputs: usize, outputs: usize| -> Result<Linear> {
            // Uniform within 1 / sqrt(inputs), for weights and biases: the usual start of a linear layer.
            let bound = 1.0 / (inputs as f32).sqrt();
            let mut draw = |len: usize| (0..len).map(|_| rng.random_range(-bound..bound)).collect::<Vec<f32>>();
            let weight = Var::from_vec(draw(inputs * outputs), (outputs, inputs), &Device::Cpu)?;
            let bias = Var::from_vec(draw(outputs), outputs, &Device::Cpu)?;
            let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
            parameters.extend([weight, bias]);
            Ok(layer)
        };
        let encoders = widths.iter().map(|width| linear(*width, hidden)).collect::<Result<_>>()?;
        let heads = widths.iter().map(|_| linear(hidden, CLASSES)).collect::<Result<_>>()?;
        let fused = vec![linear(hidden * widths.len(), hidden)?, linear(hidden, CLASSES)?];
        Ok(Network { encoders, heads, fused, parameters })
    }

    pub(crate) fn parameters(&self) -> &[Var] {
        &self.parameters
    }

    /// K: one loss for each modality, and the fused one.
    pub(crate) fn losses_len(&self) -> usize {
        self.heads.len() + 1
    }

    /// The logits of head `k`, the fused one last, for each `k` that is wanted. Only encoders that a wanted head needs
    /// are run.
    fn logits(&self, batch: &Batch, wanted: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let fused = wanted.last().copied().unwrap_or(false);
        let mut features = Vec::with_capacity(self.encoders.len());
        let mut logits = Vec::with_capacity(wanted.len());
        for (k, (encoder, head)) in self.encoders.iter().zip(&self.heads).enumerate() {
            if !wanted[k] && !fused {
                logits.push(None);
                continue;
            }
            let feature = encoder.forward(&batch.inputs[k])?.relu()?;
            logits.push(if wanted[k] { Some(head.forward(&feature)?) } else { None });
            features.push(feature);
        }
        logits.push(if fused {
            let mut x = Tensor::cat(&features, 1)?;
            for (i, layer) in self.fused.iter().enumerate() {
                x = layer.forward(&if i == 0 { x } else { x.relu()? })?;
            }
            Some(x)
        } else {
            None
        });
        Ok(logits)
    }

    /// The mean cross-entropy L_k of each loss that is wanted.
    pub(crate) fn losses(&self, batch: &Batch, wanted: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let of = |logits: Option<Tensor>| match logits {
            Some(logits) => Ok(Some(loss::cross_entropy(&logits, &batch.labels)?)),
            None => Ok(None),
        };
        self.logits(batch, wanted)?.into_iter().map(of).collect()
    }

    /// L_k alone.
    pub(crate) fn loss(&self, batch: &Batch, k: usize) -> Result<Tensor> {
        let mut losses = self.losses(batch, &self.only(k))?;
        losses.swap_remove(k).context("the network has no such head")
    }

    /// How many samples of the batch head `k` classifies rightly.
    pub(crate) fn right(&self, batch: &Batch, k: usize) -> Result<u32> {
        let logits = self.logits(batch, &self.only(k))?.swap_remove(k).context("the network has no such head")?;
        let right = logits.argmax(1)?.eq(&batch.labels)?;
        Ok(right.to_dtype(candle_core::DType::U32)?.sum_all()?.to_scalar()?)
    }

    fn only(&self, k: usize) -> Vec<bool> {
        (0..self.losses_len()).map(|j| j == k).collect()
    }
}

/// Adam. Written here because candle's does not tell its state, and a checkpoint of the loss-based estimator needs it.
#[derive(Clone)]
pub(crate) struct Adam {
    rate: f64,
    steps: i32,
    /// First and second moment of each parameter's gradient. Replaced, never written to, so a clone is a checkpoint.
    moments: Vec<(Tensor, Tensor)>,
}

impl Adam {
    pub(crate) fn new(parameters: &[Var], rate: f64) -> Result<Self> {
        let zeros = |parameter: &Var| Ok((parameter.zeros_like()?, parameter.zeros_like()?));
        Ok(Adam { rate, steps: 0, moments: parameters.iter().map(zeros).collect::<Result<_>>()? })
    }

    /// One step. A parameter without a gradient stays as it is.
    pub(crate) fn step(&mut self, parameters: &[Var], gradients: &GradStore) -> Result<()> {
        const BETA: (f64, f64) = (0.9, 0.999);
        self.steps += 1;
        let (first, second) = (1.0 - BETA.0.powi(self.steps), 1.0 - BETA.1.powi(self.steps));
        for (parameter, moments) in parameters.iter().zip(&mut self.moments) {
            let Some(gradient) = gradients.get(parameter) else { continue };
            let m = ((&moments.0 * BETA.0)? + (gradient * (1.0 - BETA.0))?)?;
            let v = ((&moments.1 * BETA.1)? + (gradient.sqr()? * (1.0 - BETA.1))?)?;
            let update = ((&m * (self.rate / first))? / ((&v / second)?.sqrt()? + 1e-8)?)?;
            parameter.set(&(parameter.as_tensor() - update)?)?;
            *moments = (m, v);
        }
        Ok(())
    }
}
