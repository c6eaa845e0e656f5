//! The late-fusion network.
//!
//! ```text
//! input 0 -> encoder 0 -+-> head 0 -> L_0
//!                       +-------------.
//! input 1 -> encoder 1 -+-> head 1 -> L_1
//!                       +-------------+-> fused head -> L_2
//! ```

use anyhow::{Context, Result};
use candle_core::{Module, Tensor, Var};
use candle_nn::{Linear, loss};
use rand_chacha::ChaCha8Rng;

use crate::common::random::{linear, random};
use crate::common::train::{Set, Task};
use crate::data::{CLASSES, Data, Samples};

/// One encoder and one head per input, and a fused head on the features of all encoders.
pub(crate) struct Network<'a> {
    data: &'a Data,
    encoders: Vec<Linear>,
    heads: Vec<Linear>,
    fused: [Linear; 2],
    parameters: Vec<Var>,
    of_encoders: Vec<Vec<Var>>,
}

impl<'a> Network<'a> {
    /// A network with the initial weights of a seed. `modalities` are the inputs and the fused one. What an input's encoder
    /// and head start from depends on its name only, so it is the same whatever the other inputs.
    pub(crate) fn new(data: &'a Data, modalities: &[String], hidden: usize, seed: u64) -> Result<Self> {
        let (widths, mut parameters) = (data.widths()?, Vec::new());
        let inputs = &modalities[..widths.len()];
        let mut layer = |purpose: &str, inputs: usize, outputs: usize| -> Result<Linear> {
            let (layer, both) = linear(inputs, outputs, &mut random(seed, purpose))?;
            parameters.extend(both);
            Ok(layer)
        };
        let encoders = inputs.iter().zip(&widths);
        let encoders = encoders.map(|(name, width)| layer(&format!("encoder of {name}"), *width, hidden));
        let encoders = encoders.collect::<Result<_>>()?;
        let heads = inputs.iter().map(|name| layer(&format!("head of {name}"), hidden, CLASSES));
        let heads = heads.collect::<Result<_>>()?;
        let fused = [layer("fused", hidden * widths.len(), hidden)?, layer("fused head", hidden, CLASSES)?];
        let of_encoders = parameters.chunks(2).take(widths.len()).map(<[Var]>::to_vec).collect();
        Ok(Network { data, encoders, heads, fused, parameters, of_encoders })
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

    /// Share of the test samples that head `k` classifies correctly.
    pub(crate) fn accuracy(&self, k: usize) -> Result<f64> {
        let samples = &self.data.test;
        let logits = self.logits(samples, |j| j == k)?.swap_remove(k).context("the network has no such head")?;
        let correct = logits.argmax(1)?.eq(&samples.labels)?.to_dtype(candle_core::DType::U32)?;
        Ok(f64::from(correct.sum_all()?.to_scalar::<u32>()?) / samples.len() as f64)
    }
}

impl Task for Network<'_> {
    type Batch = Samples;

    fn parameters(&self) -> &[Var] {
        &self.parameters
    }

    fn encoders(&self) -> &[Vec<Var>] {
        &self.of_encoders
    }

    fn samples(&self, set: Set) -> usize {
        self.data.set(set).len()
    }

    fn batch(&self, set: Set, indices: &[u32], _: &mut ChaCha8Rng) -> Result<Samples> {
        self.data.set(set).at(indices)
    }

    fn losses(&self, batch: &Samples, wanted: impl Fn(usize) -> bool) -> Result<Vec<Option<Tensor>>> {
        let loss = |logits: Option<Tensor>| logits.map(|logits| loss::cross_entropy(&logits, &batch.labels));
        let losses = self.logits(batch, wanted)?.into_iter().map(|logits| loss(logits).transpose());
        Ok(losses.collect::<candle_core::Result<_>>()?)
    }

    fn mean_loss(&self, set: Set, loss: usize) -> Result<f64> {
        Ok(f64::from(self.loss(self.data.set(set), loss)?.to_scalar::<f32>()?))
    }
}
