//! Random numbers of a seed: all methods get the same samples, initial weights and batches, so that they can be compared
//! seed by seed.

use anyhow::Result;
use candle_core::{Device, Var};
use candle_nn::Linear;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random numbers of a seed for one purpose.
pub(crate) fn random(seed: u64, purpose: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // FNV-1a, so that all of the name counts.
    let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    rng.set_stream(purpose.bytes().fold(0xcbf2_9ce4_8422_2325, hash));
    rng
}

/// A linear layer whose weights and biases are uniform within 1 / sqrt(inputs), the usual initialisation, and its two
/// parameters. candle's own random numbers cannot be seeded on the CPU.
pub(crate) fn linear(inputs: usize, outputs: usize, rng: &mut ChaCha8Rng) -> Result<(Linear, [Var; 2])> {
    let bound = 1.0 / (inputs as f32).sqrt();
    let mut draw = |len: usize| (0..len).map(|_| rng.random_range(-bound..bound)).collect::<Vec<f32>>();
    let weight = Var::from_vec(draw(inputs * outputs), (outputs, inputs), &Device::Cpu)?;
    let bias = Var::from_vec(draw(outputs), outputs, &Device::Cpu)?;
    let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
    Ok((layer, [weight, bias]))
}

/// Batches of indices of a set in random order, epoch after epoch. A clone continues as the original does.
#[derive(Clone)]
pub(crate) struct Batches {
    /// Also for what a task draws per batch.
    pub(crate) rng: ChaCha8Rng,
    order: Vec<u32>,
    at: usize,
    size: usize,
}

impl Batches {
    /// Batches of `size` of the indices below `len`, of all if there are fewer. Each epoch leaves out what does not fill a
    /// batch: a contrastive loss depends on the size, and the gradients of one size are to be compared.
    pub(crate) fn new(len: usize, size: usize, rng: ChaCha8Rng) -> Self {
        Batches { rng, order: (0..len as u32).collect(), at: len, size: size.min(len) }
    }

    pub(crate) fn per_epoch(&self) -> usize {
        self.order.len() / self.size
    }

    /// The indices of the next batch.
    pub(crate) fn next(&mut self) -> Vec<u32> {
        if self.at + self.size > self.order.len() {
            self.order.shuffle(&mut self.rng);
            self.at = 0;
        }
        let batch = self.order[self.at..self.at + self.size].to_vec();
        self.at += self.size;
        batch
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn an_epoch_has_an_order_of_its_own_and_full_batches_only() {
        let mut batches = Batches::new(25, 10, random(1, "batches"));
        assert_eq!(batches.per_epoch(), 2);
        let mut epoch = || [batches.next(), batches.next()];
        let epochs: Vec<_> = (0..20).map(|_| epoch()).collect();
        assert!(epochs.iter().flatten().all(|batch| batch.len() == 10));
        assert!(epochs[0] != epochs[1] && !epochs[0].concat().is_sorted());
        let distinct = |epoch: &[Vec<u32>; 2]| epoch.concat().into_iter().collect::<BTreeSet<_>>();
        assert!(epochs.iter().all(|epoch| distinct(epoch).len() == 20));
        // What one epoch leaves out is in another.
        assert_eq!(epochs.iter().flat_map(distinct).collect::<BTreeSet<_>>(), (0..25).collect());
        let mut clone = batches.clone();
        assert_eq!((clone.next(), clone.next()), (batches.next(), batches.next()));

        let mut few = Batches::new(3, 10, random(1, "batches"));
        assert_eq!((few.per_epoch(), few.next().len()), (1, 3));
    }
}
