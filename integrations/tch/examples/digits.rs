//! Two views of handwritten digits, the upper and the lower half, and a head for each and for both.
//!
//! ```sh
//! LIBTORCH_USE_PYTORCH=1 cargo run --release --example digits [-- FILE]
//! ```
//!
//! FILE has 64 pixels from 0 to 16 and a label in each line; without it, it is that of the candle example.

use std::fs;

use anyhow::{Context, Result, ensure};
use gradblend_tch::{GradBlend, GradBlendConfig};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../candle/examples/data/digits.csv");
const VIEW: i64 = 32;
const HIDDEN: i64 = 32;
const CLASSES: i64 = 10;
const BATCH: i64 = 50;
const EPOCHS: i64 = 30;
/// Few samples, so that heads overfit: training, and held out. The rest are for testing.
const TRAINING: i64 = 300;
const HELD_OUT: i64 = 60;

/// Pixels and labels.
fn read(path: &str) -> Result<(Tensor, Tensor)> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for (at, line) in text.lines().enumerate() {
        let fields = line.split(',').map(|field| field.trim().parse::<f32>());
        let fields: Vec<f32> = fields.collect::<Result<_, _>>().with_context(|| format!("{path}, line {}", at + 1))?;
        ensure!(fields.len() == 65, "{path}, line {}: expected 65 numbers, got {}", at + 1, fields.len());
        pixels.extend(fields[..64].iter().map(|pixel| pixel / 16.0));
        labels.push(fields[64] as i64);
    }
    ensure!(labels.len() as i64 > TRAINING + HELD_OUT, "{path} has {} digits", labels.len());
    Ok((Tensor::from_slice(&pixels).reshape([-1, 2 * VIEW]), Tensor::from_slice(&labels)))
}

struct Network {
    encoders: [nn::Linear; 2],
    heads: [nn::Linear; 3],
}

impl Network {
    fn new(root: &nn::Path<'_>) -> Self {
        let linear = |name: &str, from, to| nn::linear(root / name, from, to, Default::default());
        Network {
            encoders: ["top encoder", "bottom encoder"].map(|name| linear(name, VIEW, HIDDEN)),
            heads: [
                linear("top", HIDDEN, CLASSES),
                linear("bottom", HIDDEN, CLASSES),
                linear("fused", 2 * HIDDEN, CLASSES),
            ],
        }
    }

    /// Logits of the heads of the two views, and of the fused one.
    fn logits(&self, pixels: &Tensor) -> [Tensor; 3] {
        let [top, bottom] =
            [0, 1].map(|view| self.encoders[view].forward(&pixels.narrow(1, VIEW * view as i64, VIEW)).relu());
        let both = Tensor::cat(&[&top, &bottom], 1);
        [self.heads[0].forward(&top), self.heads[1].forward(&bottom), self.heads[2].forward(&both)]
    }

    fn losses(&self, (pixels, labels): (&Tensor, &Tensor)) -> [Tensor; 3] {
        self.logits(pixels).map(|logits| logits.cross_entropy_for_logits(labels))
    }
}

fn main() -> Result<()> {
    tch::manual_seed(0);
    let path = std::env::args().nth(1).unwrap_or_else(|| DIGITS.to_owned());
    let (pixels, labels) = read(&path)?;
    let part = |from, len| (pixels.narrow(0, from, len), labels.narrow(0, from, len));
    let (training, held_out) = (part(0, TRAINING), part(TRAINING, HELD_OUT));
    let test = part(TRAINING + HELD_OUT, labels.size()[0] - TRAINING - HELD_OUT);
    let draw = |(pixels, labels): &(Tensor, Tensor)| {
        let index = Tensor::randint(labels.size()[0], [BATCH], (Kind::Int64, Device::Cpu));
        (pixels.index_select(0, &index), labels.index_select(0, &index))
    };

    let store = nn::VarStore::new(Device::Cpu);
    let network = Network::new(&store.root());
    let mut optimizer = nn::Adam::default().build(&store, 3e-3)?;
    let mut gb = GradBlend::of(&store, GradBlendConfig::new(3).every(2).min_weight(&[0.0, 0.0, 0.3]))?;
    for epoch in 1..=EPOCHS {
        for _ in 0..TRAINING / BATCH {
            let (pixels, labels) = draw(&training);
            optimizer.zero_grad();
            gb.backward(&network.losses((&pixels, &labels)), || {
                let (pixels, labels) = draw(&held_out);
                let [.., fused] = network.losses((&pixels, &labels));
                fused
            })?;
            optimizer.step();
        }
        if epoch % 10 == 0 {
            let accuracy = tch::no_grad(|| network.logits(&test.0).map(|logits| logits.accuracy_for_logits(&test.1)));
            let accuracy = accuracy.map(|share| share.double_value(&[]));
            println!("epoch {epoch}: weights {:.2?}, accuracy of top, bottom, fused {accuracy:.3?}", gb.weights());
        }
    }
    Ok(())
}
