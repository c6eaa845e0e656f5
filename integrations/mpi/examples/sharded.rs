//! Sharded late fusion: two views of handwritten digits, the upper and the lower half, and a head for each and for both.
//!
//! Each rank trains on its part of every batch, and holds its part of every gradient and of the update, as ZeRO does.
//!
//! ```sh
//! cargo build --release --example sharded
//! mpirun -n 4 target/release/examples/sharded [--epochs 30] [--seed 1]
//! ```

use std::fs;
use std::ops::Range;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use gradblend::{Blender, Config, Device, Pass, Stream, TensorGrads};
use gradblend_mpi::Mpi;
use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../candle/examples/data/digits.csv");
const VIEW: usize = 32;
const HIDDEN: usize = 16;
const CLASSES: usize = 10;
const BATCH: usize = 50; // of all ranks together
/// Few samples, so that heads overfit. The rest are for testing.
const TRAINING: usize = 300;
const HELD_OUT: usize = 60;
const LEARNING_RATE: f32 = 0.5;
/// Losses: upper, lower, and both fused.
const K: usize = 3;
const FUSED: usize = K - 1;
/// Tensors: two encoders, then a head for each loss. A row has a weight for each input, and the bias.
const TENSORS: usize = 2 + K;
const SHAPES: [(usize, usize); TENSORS] =
    [(HIDDEN, VIEW), (HIDDEN, VIEW), (CLASSES, HIDDEN), (CLASSES, HIDDEN), (CLASSES, 2 * HIDDEN)];
type Tensors = [Vec<f32>; TENSORS];

/// Does loss `k` reach tensor `p`?
fn reaches(k: usize, p: usize) -> bool {
    p == 2 + k || (p < 2 && (k == FUSED || k == p))
}

#[derive(Parser)]
struct Options {
    #[arg(long, default_value_t = 30)]
    epochs: usize,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

struct Digit {
    views: [Vec<f32>; 2],
    label: usize,
}

fn read() -> Result<Vec<Digit>> {
    let text = fs::read_to_string(DIGITS).with_context(|| format!("cannot read {DIGITS}"))?;
    let digit = |line: &str| {
        let numbers: Vec<usize> = line.split(',').map(str::parse).collect::<Result<_, _>>()?;
        ensure!(numbers.len() == 2 * VIEW + 1 && numbers[2 * VIEW] < CLASSES, "expected 64 pixels and a digit: {line}");
        let view = |pixels: &[usize]| pixels.iter().map(|pixel| *pixel as f32 / 16.0).collect();
        Ok(Digit { views: [view(&numbers[..VIEW]), view(&numbers[VIEW..2 * VIEW])], label: numbers[2 * VIEW] })
    };
    text.lines().map(digit).collect()
}

/// Outputs of a linear layer.
fn linear(weights: &[f32], x: &[f32]) -> Vec<f32> {
    let output = |row: &[f32]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>() + row[x.len()];
    weights.chunks_exact(x.len() + 1).map(output).collect()
}

/// Adds a linear layer's gradient to `gradient`, and returns that of its inputs.
fn linear_backward(weights: &[f32], x: &[f32], of_outputs: &[f32], gradient: &mut [f32]) -> Vec<f32> {
    let mut of_inputs = vec![0.0; x.len()];
    let rows = weights.chunks_exact(x.len() + 1).zip(gradient.chunks_exact_mut(x.len() + 1));
    for ((row, gradient), of_output) in rows.zip(of_outputs) {
        for i in 0..x.len() {
            gradient[i] += of_output * x[i];
            of_inputs[i] += of_output * row[i];
        }
        gradient[x.len()] += of_output;
    }
    of_inputs
}

/// What the head of loss `k` reads: the features of its view, or of both.
fn features(parameters: &Tensors, digit: &Digit, k: usize) -> Vec<f32> {
    let views = (0..2).filter(|&view| reaches(k, view));
    views.flat_map(|view| linear(&parameters[view], &digit.views[view])).map(f32::tanh).collect()
}

/// The gradient of loss `k`, summed over `digits` and divided by `batch`.
fn gradient(parameters: &Tensors, digits: &[&Digit], k: usize, batch: usize) -> Tensors {
    let mut gradient = parameters.each_ref().map(|weights| vec![0.0; weights.len()]);
    for digit in digits {
        let (features, head) = (features(parameters, digit, k), 2 + k);
        let mut of_outputs: Vec<f32> = linear(&parameters[head], &features).into_iter().map(f32::exp).collect();
        let sum: f32 = of_outputs.iter().sum();
        of_outputs.iter_mut().for_each(|output| *output /= sum * batch as f32);
        of_outputs[digit.label] -= 1.0 / batch as f32; // softmax cross-entropy
        let of_features = linear_backward(&parameters[head], &features, &of_outputs, &mut gradient[head]);
        let through_tanh: Vec<f32> = of_features.iter().zip(&features).map(|(g, y)| g * (1.0 - y * y)).collect();
        for (view, of_view) in (0..2).filter(|&view| reaches(k, view)).zip(through_tanh.chunks_exact(HIDDEN)) {
            linear_backward(&parameters[view], &digit.views[view], of_view, &mut gradient[view]);
        }
    }
    gradient
}

fn accuracy(parameters: &Tensors, digits: &[Digit]) -> f64 {
    let right = |digit: &&Digit| {
        let outputs = linear(&parameters[2 + FUSED], &features(parameters, digit, FUSED));
        outputs.iter().all(|output| *output <= outputs[digit.label])
    };
    digits.iter().filter(right).count() as f64 / digits.len() as f64
}

/// Ranks, and the parts of tensors that they hold: as long as each other, but for the last ranks, which may hold nothing.
struct Shards {
    world: SimpleCommunicator,
    count: usize,
    rank: usize,
}

impl Shards {
    fn range(&self, len: usize) -> Range<usize> {
        let each = len.div_ceil(self.count);
        (self.rank * each).min(len)..((self.rank + 1) * each).min(len)
    }

    /// This rank's part of the sum over ranks.
    fn reduce_scatter(&self, mut whole: Vec<f32>) -> Vec<f32> {
        let (each, len) = (whole.len().div_ceil(self.count), self.range(whole.len()).len());
        whole.resize(each * self.count, 0.0);
        let mut part = vec![0.0; each];
        self.world.reduce_scatter_block_into(&whole[..], &mut part[..], SystemOperation::sum());
        part.truncate(len);
        part
    }

    /// Replaces a tensor by the parts of all ranks.
    fn all_gather(&self, tensor: &mut Vec<f32>) {
        let (each, len) = (tensor.len().div_ceil(self.count), tensor.len());
        let mut part = tensor[self.range(len)].to_vec();
        part.resize(each, 0.0);
        tensor.resize(each * self.count, 0.0);
        self.world.all_gather_into(&part[..], &mut tensor[..]);
        tensor.truncate(len);
    }
}

/// This rank's parts as a plan takes them. t is the gradient of the fused loss on the training batch.
fn lists<'a>(v: &'a [Tensors; K], g: &'a Tensors, blended: &'a mut Tensors) -> Vec<TensorGrads<'a>> {
    let tensor = |(p, blended): (usize, &'a mut Vec<f32>)| {
        let modalities: [_; K] = std::array::from_fn(|k| reaches(k, p).then_some(&v[k][p][..]));
        TensorGrads::new(&v[FUSED][p], &g[p], &modalities).blended(blended)
    };
    blended.iter_mut().enumerate().map(tensor).collect()
}

struct Trainer {
    shards: Shards,
    mpi: Mpi,
    blender: Blender,
    parameters: Tensors,
}

impl Trainer {
    fn new(world: &SimpleCommunicator, random: &mut ChaCha8Rng) -> Result<Self> {
        let parameters = SHAPES.map(|(outputs, inputs)| {
            let bound = 1.0 / (inputs as f32).sqrt();
            (0..outputs * (inputs + 1)).map(|_| random.random_range(-bound..bound)).collect()
        });
        let shards = Shards { world: world.duplicate(), count: world.size() as usize, rank: world.rank() as usize };
        // On one thread: each core has a process.
        let blender = Blender::new(&Device::cpu(), Config { threads: 1, ..Config::new(K as u32) })?;
        Ok(Trainer { shards, mpi: Mpi::new(world)?, blender, parameters })
    }

    /// This rank's part of the gradient of loss `k` on a batch of all ranks.
    fn gradient(&self, batch: &[&Digit], k: usize) -> Tensors {
        let own: Vec<&Digit> = batch.iter().skip(self.shards.rank).step_by(self.shards.count).copied().collect();
        gradient(&self.parameters, &own, k, batch.len()).map(|whole| self.shards.reduce_scatter(whole))
    }

    fn step(&mut self, batch: &[&Digit], held_out: &[&Digit]) -> Result<()> {
        let stream = Stream::default();
        let v: [Tensors; K] = std::array::from_fn(|k| self.gradient(batch, k));
        let g = self.gradient(held_out, FUSED);
        let mut blended = g.each_ref().map(|part| vec![0.0; part.len()]);
        let plan = self.blender.plan(lists(&v, &g, &mut blended))?;
        self.blender.pass(&plan, Pass::DOT | Pass::BLEND, stream)?;
        drop(plan);
        self.blender.reduce(&mut self.mpi, stream)?; // 2K numbers of each rank
        self.blender.observe(stream)?;
        for (tensor, blended) in self.parameters.iter_mut().zip(&blended) {
            let range = self.shards.range(tensor.len());
            tensor[range].iter_mut().zip(blended).for_each(|(x, gradient)| *x -= LEARNING_RATE * gradient);
            self.shards.all_gather(tensor);
        }
        Ok(())
    }

    /// Fails unless all ranks have the same state, bit for bit.
    fn check(&mut self) -> Result<()> {
        let state = self.blender.save(Stream::default())?;
        let mut states = vec![0; state.len() * self.shards.count];
        self.shards.world.all_gather_into(&state[..], &mut states[..]);
        ensure!(states.chunks_exact(state.len()).all(|other| other == state), "the states of the ranks differ");
        Ok(())
    }
}

fn train(world: &SimpleCommunicator, options: &Options) -> Result<()> {
    let mut random = ChaCha8Rng::seed_from_u64(options.seed); // the same numbers on all ranks
    let mut digits = read()?;
    digits.shuffle(&mut random);
    let (known, test) = digits.split_at(TRAINING + HELD_OUT);
    let mut known: Vec<&Digit> = known.iter().collect();
    let (training, held_out) = known.split_at_mut(TRAINING);
    let mut trainer = Trainer::new(world, &mut random)?;
    for epoch in 1..=options.epochs {
        training.shuffle(&mut random);
        for batch in training.chunks(BATCH) {
            trainer.step(batch, held_out)?;
        }
        trainer.blender.reweight(Stream::default())?;
        if trainer.shards.rank == 0 {
            let (accuracy, report) = (accuracy(&trainer.parameters, test), trainer.blender.report(Stream::default())?);
            println!("epoch {epoch}: test accuracy {accuracy:.3}, upper, lower, fused {:.4?}", report.weights);
        }
    }
    trainer.check()
}

fn main() -> Result<()> {
    let options = Options::parse();
    let universe = mpi::initialize().context("MPI is initialized already")?;
    let world = universe.world();
    if let Err(error) = train(&world, &options) {
        eprintln!("rank {}: {error:#}", world.rank());
        world.abort(1); // ends the ranks that wait for this one, too
    }
    Ok(())
}
