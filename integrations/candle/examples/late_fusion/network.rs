//! The late-fusion network and its optimiser.
//!
//! ```text
//! input 0 -> encoder 0 -+-> head 0 -> L_0
//!                       +-------------.
//! input 1 -> encoder 1 -+-> head 1 -> L_1
//!                       +-------------+-> fused head -> L_2
//! ```

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Device, Module, Tensor, Var};
use candle_nn::{Linear, loss};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::data::{CLASSES, Samples};

/// One encoder and one head per input, and a fused head on the features of all encoders.
pub(crate) struct Network {
    encoders: Vec<Linear>,
    heads: Vec<Linear>,
    fused: [Linear; 2],
    pub(crate) parameters: Vec<Var>,
}

impl Network {
    /// A network with the initial weights of `rng`: candle's own random numbers cannot be seeded on the CPU.
    pub(crate) fn new(widths: &[usize], hidden: usize, rng: &mut ChaCha8Rng) -> Result<Self> {
        let mut parameters = Vec::new();
        let mut linear = |inputs: usize, outputs: usize| -> Result<Linear> {
            // Uniform within 1 / sqrt(inputs), for weights and biases: the usual initialisation of a linear layer.
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
        let fused = [linear(hidden * widths.len(), hidden)?, linear(hidden, CLASSES)?];
        Ok(Network { encoders, heads, fused, parameters })
    }

    /// K: one loss per input, and the fused one.
    pub(crate) fn losses_len(&self) -> usize {
        self.heads.len() + 1
    }

    /// Logits of each wanted head, the fused one last. Runs only the encoders that a wanted head needs.
    fn logits(&self, samples: &Samples, wanted: impl Fn(usize) -> bool) -> Result<Vec<Option<Tensor>>> {
        let fused = wanted(self.heads.len());
        let (mut features, mut logits) = (Vec::new(), Vec::new());
        for (k, (encoder, head)) in self.encoders.iter().zip(&self.heads).enumerate() {
            let mut own = None;
            if wanted(k) || fused {
                let feature = encoder.forward(&samples.inputs[k])?.relu()?;
                own = wanted(k).then(|| head.forward(&feature)).transpose()?;
                features.push(feature);
            }
            logits.push(own);
        }
        let forward = || self.fused[1].forward(&self.fused[0].forward(&Tensor::cat(&features, 1)?)?.relu()?);
        logits.push(fused.then(forward).transpose()?);
        Ok(logits)
    }

    /// The mean cross-entropy L_k of each wanted loss.
    pub(crate) fn losses(&self, samples: &Samples, wanted: impl Fn(usize) -> bool) -> Result<Vec<Option<Tensor>>> {
        let loss = |logits: Option<Tensor>| logits.map(|logits| loss::cross_entropy(&logits, &samples.labels));
        let losses = self.logits(samples, wanted)?.into_iter().map(|logits| loss(logits).transpose());
        Ok(losses.collect::<candle_core::Result<_>>()?)
    }

    /// L_k alone.
    pub(crate) fn loss(&self, samples: &Samples, k: usize) -> Result<Tensor> {
        self.losses(samples, |j| j == k)?.swap_remove(k).context("the network has no such head")
    }

    /// Share of the samples that head `k` classifies correctly.
    pub(crate) fn accuracy(&self, samples: &Samples, k: usize) -> Result<f64> {
        let logits = self.logits(samples, |j| j == k)?.swap_remove(k).context("the network has no such head")?;
        let correct = logits.argmax(1)?.eq(&samples.labels)?.to_dtype(candle_core::DType::U32)?;
        Ok(f64::from(correct.sum_all()?.to_scalar::<u32>()?) / samples.len() as f64)
    }
}

/// Adam. Our own because candle's does not expose its state, which a checkpoint of the loss-based estimator needs.
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

    /// One step. A parameter without a gradient does not change.
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
