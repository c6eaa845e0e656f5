//! Two views of handwritten digits, the upper and the lower half, and a head for each and for both.
//!
//! ```sh
//! cargo run --release --example digits [-- FILE]
//! ```
//!
//! FILE has 64 pixels from 0 to 16 and a label in each line; without it, it is that of the candle example.

use std::fs;

use anyhow::{Context, Result, ensure};
use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::optim::AdamConfig;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use gradblend_burn::{GradBlend, GradBlendConfig};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../candle/examples/data/digits.csv");
const VIEW: usize = 32;
const HIDDEN: usize = 32;
const CLASSES: usize = 10;
const BATCH: usize = 50;
const EPOCHS: usize = 30;
/// Few samples, so that heads overfit: training, and held out. The rest are for testing.
const TRAINING: usize = 300;
const HELD_OUT: usize = 60;

/// Pixels and label.
type Digit = (Vec<f32>, i32);

fn read(path: &str) -> Result<Vec<Digit>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let mut digits = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let fields = line.split(',').map(|field| field.trim().parse::<f32>());
        let fields: Vec<f32> = fields.collect::<Result<_, _>>().with_context(|| format!("{path}, line {}", at + 1))?;
        ensure!(fields.len() == 65, "{path}, line {}: expected 65 numbers, got {}", at + 1, fields.len());
        digits.push((fields[..64].iter().map(|pixel| pixel / 16.0).collect(), fields[64] as i32));
    }
    ensure!(digits.len() > TRAINING + HELD_OUT, "{path} has {} digits", digits.len());
    Ok(digits)
}

/// A batch of samples as tensors.
#[derive(Clone)]
struct Samples {
    views: [Tensor<2>; 2],
    labels: Tensor<1, Int>,
}

impl Samples {
    fn new<'a>(digits: impl IntoIterator<Item = &'a Digit>, device: &Device) -> Self {
        let (pixels, labels): (Vec<_>, Vec<_>) =
            digits.into_iter().map(|(pixels, label)| (&pixels[..], *label)).unzip();
        let view = |from| {
            let values: Vec<f32> =
                pixels.iter().flat_map(|pixels: &&[f32]| pixels[from..from + VIEW].to_vec()).collect();
            Tensor::from_data(TensorData::new(values, [labels.len(), VIEW]), device)
        };
        Samples { views: [view(0), view(VIEW)], labels: Tensor::from_data(&labels[..], device) }
    }

    /// Drawn at random.
    fn draw(digits: &[Digit], random: &mut StdRng, device: &Device) -> Self {
        Self::new((0..BATCH).map(|_| &digits[random.random_range(0..digits.len())]), device)
    }
}

#[derive(Module, Debug)]
struct Network {
    encoders: [Linear; 2],
    heads: [Linear; 3],
}

impl Network {
    fn new(device: &Device) -> Self {
        let linear = |from, to| LinearConfig::new(from, to).init(device);
        Network {
            encoders: [linear(VIEW, HIDDEN), linear(VIEW, HIDDEN)],
            heads: [linear(HIDDEN, CLASSES), linear(HIDDEN, CLASSES), linear(2 * HIDDEN, CLASSES)],
        }
    }

    /// Logits of the heads of the two views, and of the fused one.
    fn logits(&self, samples: &Samples) -> [Tensor<2>; 3] {
        let [top, bottom] = [0, 1].map(|i| relu(self.encoders[i].forward(samples.views[i].clone())));
        let both = Tensor::cat(vec![top.clone(), bottom.clone()], 1);
        [self.heads[0].forward(top), self.heads[1].forward(bottom), self.heads[2].forward(both)]
    }

    fn losses(&self, samples: &Samples) -> [Tensor<1>; 3] {
        let loss = CrossEntropyLossConfig::new().init(&samples.labels.device());
        self.logits(samples).map(|logits| loss.forward(logits, samples.labels.clone()))
    }
}

fn main() -> Result<()> {
    let device = Device::flex().autodiff();
    device.seed(0);
    let mut random = StdRng::seed_from_u64(0);
    let path = std::env::args().nth(1).unwrap_or_else(|| DIGITS.to_owned());
    let digits = read(&path)?;
    let (training, rest) = digits.split_at(TRAINING);
    let (held_out, test) = rest.split_at(HELD_OUT);
    let test = Samples::new(test, &device.clone().inner());

    let mut network = Network::new(&device);
    let mut optimizer = AdamConfig::new().init();
    let mut gb = GradBlend::new(&network, GradBlendConfig::new(3).every(2).min_weight(&[0.0, 0.0, 0.3]))?;
    for epoch in 1..=EPOCHS {
        for _ in 0..TRAINING / BATCH {
            let batch = Samples::draw(training, &mut random, &device);
            let gradients = gb.backward(
                &network,
                || network.losses(&batch),
                || {
                    let [.., fused] = network.losses(&Samples::draw(held_out, &mut random, &device));
                    fused
                },
            )?;
            network = optimizer.step(3e-3, network, gradients);
        }
        if epoch % 10 == 0 {
            let accuracy = network.valid().logits(&test).map(|logits| {
                let right = logits.argmax(1).squeeze_dim::<1>(1).equal(test.labels.clone());
                right.float().mean().into_scalar::<f32>()
            });
            println!("epoch {epoch}: weights {:.2?}, accuracy of top, bottom, fused {accuracy:.3?}", gb.weights());
        }
    }
    Ok(())
}
