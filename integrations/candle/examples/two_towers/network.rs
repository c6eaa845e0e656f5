//! Two towers, matched by a contrastive loss.
//!
//! ```text
//! picture -> image tower -+-> head: style x category -> L_0
//!                         +--------------.
//! text ----> text tower --+-> head: subcategory -> L_1
//!                         +--------------+-> cosines -> L_2
//! ```

use anyhow::Result;
use candle_core::{D, Device, Module, Tensor, Var};
use candle_nn::{Linear, loss};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::common::random::{linear, random};
use crate::common::train::{Set, Task};
use crate::data::{Data, PATCH_VALUES, PATCHES, STYLES, Source};

/// Length of an embedding.
const EMBEDDING: usize = 64;
/// The position of the matching loss.
pub(crate) const MATCHING: usize = 2;
/// What cosines are multiplied by at first.
const SCALE: f32 = 10.0;

/// Both towers and their heads.
pub(crate) struct Network<'a> {
    data: &'a Data,
    /// On patches, on four merged patches, on all.
    image: [Linear; 3],
    text: [Linear; 2],
    heads: [Linear; 2],
    /// The logarithm of what cosines are multiplied by: the inverse of a temperature.
    scale: Var,
    parameters: Vec<Var>,
    towers: Vec<Vec<Var>>,
    batch: usize,
}

/// Pairs of a picture and a text, of different emoji.
pub(crate) struct Batch {
    pictures: Tensor,
    texts: Tensor,
    /// Style and category in one.
    kinds: Tensor,
    subcategories: Tensor,
}

impl<'a> Network<'a> {
    /// A network with the initial weights of a seed. `batch` is the number of pairs in a batch of `mean_loss`.
    pub(crate) fn new(source: &Source, data: &'a Data, batch: usize, seed: u64) -> Result<Self> {
        let mut parameters = Vec::new();
        let mut layer = |purpose: &str, inputs: usize, outputs: usize| -> Result<Linear> {
            let (layer, both) = linear(inputs, outputs, &mut random(seed, purpose))?;
            parameters.extend(both);
            Ok(layer)
        };
        let words = data.train.texts.dim(1)?;
        let image = [
            layer("patches", PATCH_VALUES, 32)?,
            layer("merged patches", 4 * 32, 64)?,
            layer("picture", PATCHES * PATCHES / 4 * 64, EMBEDDING)?,
        ];
        let text = [layer("words", words, 128)?, layer("text", 128, EMBEDDING)?];
        let heads = [
            layer("head of pictures", EMBEDDING, STYLES.len() * source.categories)?,
            layer("head of texts", EMBEDDING, source.subcategories)?,
        ];
        let towers = vec![parameters[..6].to_vec(), parameters[6..10].to_vec()];
        let scale = Var::new(&[SCALE.ln()], &Device::Cpu)?;
        parameters.push(scale.clone());
        Ok(Network { data, image, text, heads, scale, parameters, towers, batch })
    }

    /// The embeddings of pictures.
    pub(crate) fn embed_pictures(&self, pictures: &Tensor) -> Result<Tensor> {
        let len = pictures.dim(0)?;
        let patches = self.image[0].forward(&pictures.reshape((len * PATCHES * PATCHES, PATCH_VALUES))?)?.relu()?;
        let merged = self.image[1].forward(&patches.reshape((len * PATCHES * PATCHES / 4, ()))?)?.relu()?;
        Ok(self.image[2].forward(&merged.reshape((len, ()))?)?)
    }

    /// The embeddings of texts.
    pub(crate) fn embed_texts(&self, texts: &Tensor) -> Result<Tensor> {
        Ok(self.text[1].forward(&self.text[0].forward(texts)?.relu()?)?)
    }

    /// The pairs of these emoji, in these styles.
    fn pairs(&self, set: Set, emoji: &[u32], styles: &[u32]) -> Result<Batch> {
        let samples = self.data.set(set);
        let tensor = |values: Vec<u32>| Tensor::new(values, &Device::Cpu);
        let pairs = || emoji.iter().zip(styles);
        let pictures = tensor(pairs().map(|(i, style)| i * STYLES.len() as u32 + style).collect())?;
        let kinds = pairs().map(|(i, style)| samples.categories[*i as usize] * STYLES.len() as u32 + style).collect();
        Ok(Batch {
            pictures: samples.pictures.index_select(&pictures, 0)?,
            texts: samples.texts.index_select(&tensor(emoji.to_vec())?, 0)?,
            kinds: tensor(kinds)?,
            subcategories: tensor(emoji.iter().map(|i| samples.subcategories[*i as usize]).collect())?,
        })
    }
}

/// Vectors of length 1 in their directions.
pub(crate) fn directions(vectors: &Tensor) -> Result<Tensor> {
    let lengths = (vectors.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
    Ok(vectors.broadcast_div(&lengths)?)
}

impl Task for Network<'_> {
    type Batch = Batch;

    fn parameters(&self) -> &[Var] {
        &self.parameters
    }

    fn encoders(&self) -> &[Vec<Var>] {
        &self.towers
    }

    fn samples(&self, set: Set) -> usize {
        self.data.set(set).len()
    }

    fn batch(&self, set: Set, indices: &[u32], rng: &mut ChaCha8Rng) -> Result<Batch> {
        let styles: Vec<u32> = indices.iter().map(|_| rng.random_range(0..STYLES.len() as u32)).collect();
        self.pairs(set, indices, &styles)
    }

    fn losses(&self, batch: &Batch, wanted: impl Fn(usize) -> bool) -> Result<Vec<Option<Tensor>>> {
        let matching = wanted(MATCHING);
        let pictures = (wanted(0) || matching).then(|| self.embed_pictures(&batch.pictures)).transpose()?;
        let texts = (wanted(1) || matching).then(|| self.embed_texts(&batch.texts)).transpose()?;
        let mut losses = Vec::new();
        for (k, (embedded, labels)) in
            [(&pictures, &batch.kinds), (&texts, &batch.subcategories)].into_iter().enumerate()
        {
            let embedded = embedded.as_ref().filter(|_| wanted(k));
            let loss = embedded.map(|embedded| loss::cross_entropy(&self.heads[k].forward(&embedded.relu()?)?, labels));
            losses.push(loss.transpose()?);
        }
        let matched = pictures.zip(texts).filter(|_| matching).map(|(pictures, texts)| -> Result<Tensor> {
            let cosines = directions(&pictures)?.matmul(&directions(&texts)?.t()?)?;
            let logits = cosines.broadcast_mul(&self.scale.as_tensor().exp()?)?;
            let own = Tensor::arange(0, logits.dim(0)? as u32, &Device::Cpu)?;
            let both = (loss::cross_entropy(&logits, &own)? + loss::cross_entropy(&logits.t()?.contiguous()?, &own)?)?;
            Ok((both / 2.0)?)
        });
        losses.push(matched.transpose()?);
        Ok(losses)
    }

    /// Over the batches of the size of training that the set fills: the matching loss depends on the size. Each emoji in one
    /// style.
    fn mean_loss(&self, set: Set, loss: usize) -> Result<f64> {
        let indices: Vec<u32> = (0..self.data.set(set).len() as u32).collect();
        let (mut sum, mut count) = (0.0, 0.0);
        for chunk in indices.chunks_exact(self.batch) {
            let styles: Vec<u32> = chunk.iter().map(|i| i % STYLES.len() as u32).collect();
            sum += f64::from(self.loss(&self.pairs(set, chunk, &styles)?, loss)?.to_scalar::<f32>()?);
            count += 1.0;
        }
        Ok(sum / count)
    }
}
