//! The training loop of all methods.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use gradblend::{Cadence, Estimate, Flags, Losses, Policy, Report, Schedule, Trainee, gb_estimate};
use gradblend_candle::GradBlend;
use rand_chacha::ChaCha8Rng;
use serde::Serializer;

use super::adam::Adam;
use super::peers::{GradNorm, mm_pareto};
use super::random::{Batches, random};
use super::weights::{SUPER_EPOCH, WARM_UP, Weights, uniform};

/// A set of samples.
#[derive(Clone, Copy)]
pub(crate) enum Set {
    Train,
    HeldOut,
}

/// The samples of one seed, which are disjoint.
pub(crate) struct Split<S> {
    pub(crate) train: S,
    pub(crate) held_out: S,
    pub(crate) test: S,
}

impl<S> Split<S> {
    pub(crate) fn set(&self, set: Set) -> &S {
        match set {
            Set::Train => &self.train,
            Set::HeldOut => &self.held_out,
        }
    }
}

/// A network and its samples. The last loss is the fused one; each other loss trains one encoder and its own head.
pub(crate) trait Task {
    type Batch;

    fn parameters(&self) -> &[Var];

    /// The parameters of each encoder, one per loss but the last.
    fn encoders(&self) -> &[Vec<Var>];

    /// The number of samples of a set.
    fn samples(&self, set: Set) -> usize;

    /// The samples of a set with these indices.
    fn batch(&self, set: Set, indices: &[u32], rng: &mut ChaCha8Rng) -> Result<Self::Batch>;

    /// Each wanted loss of a batch.
    fn losses(&self, batch: &Self::Batch, wanted: impl Fn(usize) -> bool) -> Result<Vec<Option<Tensor>>>;

    /// The mean of a loss over a set.
    fn mean_loss(&self, set: Set, loss: usize) -> Result<f64>;

    /// K: the number of losses.
    fn k(&self) -> usize {
        self.encoders().len() + 1
    }

    /// One loss of a batch.
    fn loss(&self, batch: &Self::Batch, loss: usize) -> Result<Tensor> {
        self.losses(batch, |k| k == loss)?.swap_remove(loss).context("the network has no such loss")
    }
}

/// Where t, the train gradient of the fused loss, comes from.
#[derive(Clone, Copy, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TrainBatch {
    /// The batch of the v_k: no further backward pass, but the noise of v_fused enters its own d squared
    Same,
    /// A training batch that is drawn independently: unbiased, one more forward and backward pass
    Independent,
}

/// Settings of all methods.
#[derive(Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) epochs: u64,
    pub(crate) batch: usize,
    pub(crate) learning_rate: f64,
    pub(crate) train_batch: TrainBatch,
}

/// Overfitting-to-generalisation ratios.
#[derive(Clone, serde::Serialize)]
pub(crate) struct Ratios {
    /// Of each loss.
    #[serde(serialize_with = "four_digits")]
    pub(crate) losses: Vec<f64>,
    /// Of the weights in force.
    pub(crate) blend: f64,
    /// Of uniform weights.
    pub(crate) uniform: f64,
    /// m_k over its standard error, of each loss; from losses there is none.
    pub(crate) signal: Option<Vec<f64>>,
}

/// Files of many runs are five times as large with all digits.
fn four_digits<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(|value| format!("{value:.3e}").parse().unwrap_or(*value)))
}

impl Ratios {
    fn of_gradients(report: &Report) -> Self {
        let (losses, signal) = (report.ogr.clone(), Some(report.signal_to_noise()));
        Ratios { losses, blend: report.ogr_blend, uniform: report.ogr_uniform, signal }
    }

    /// As the blender reports them: sqrt(sum w^2 dO^2) / |sum w dG|, overfitting taken as uncorrelated.
    fn of_losses(estimate: &Estimate, weights: &[f64]) -> Self {
        let ratio = |weights: &[f64]| {
            let overfitting: f64 = weights.iter().zip(&estimate.delta_o).map(|(w, o)| (w * o).powi(2)).sum();
            let generalisation: f64 = weights.iter().zip(&estimate.delta_g).map(|(w, g)| w * g).sum();
            overfitting.sqrt() / generalisation.abs()
        };
        let (blend, uniform) = (ratio(weights), ratio(&uniform(weights.len())));
        Ratios { losses: estimate.ogr.clone(), blend, uniform, signal: None }
    }
}

/// The state at the end of a super-epoch, whether or not the method has any, and of training.
#[derive(serde::Serialize)]
pub(crate) struct State {
    /// The epochs that are done.
    pub(crate) epochs: u64,
    /// The weights of the last step, or, if they change at each step, those after it.
    #[serde(serialize_with = "four_digits")]
    pub(crate) weights: Vec<f64>,
    pub(crate) ogr: Option<Ratios>,
}

/// How a training went.
#[derive(Default, serde::Serialize)]
pub(crate) struct Run {
    /// How often weights were solved for, and how often the weights in force were held.
    pub(crate) solved: u64,
    pub(crate) held: u64,
    /// All of training.
    pub(crate) train_seconds: f64,
    /// The part of it in calls that observe, and in estimates from losses.
    pub(crate) blend_seconds: f64,
    pub(crate) states: Vec<State>,
}

impl Run {
    fn solved(&mut self, held: bool) {
        self.solved += 1;
        self.held += u64::from(held);
    }
}

/// Trains a task from its initial parameters. `on_epoch` may end it by an error.
pub(crate) fn train<T: Task>(
    task: &T,
    method: &Weights,
    settings: &Settings,
    seed: u64,
    mut on_epoch: impl FnMut() -> Result<()>,
) -> Result<Run> {
    let start = Instant::now();
    let mut trainer = Trainer::new(task, settings, seed)?;
    let mut source = Source::new(method, task)?;
    let super_epochs = Schedule::online(WARM_UP, SUPER_EPOCH)?;
    let (mut run, mut ogr) = (Run::default(), None);
    for epoch in 0..settings.epochs {
        if let Source::Weights(weights) = &mut source
            && let Weights::FromLosses(schedule) = method
            && schedule.starts(epoch)
        {
            // Offline, the estimate covers the whole training.
            let length = schedule.len(epoch).unwrap_or(settings.epochs).min(settings.epochs);
            let start = Instant::now();
            let estimate = gb_estimate(&mut trainer, length, &Policy::default())?;
            run.blend_seconds += start.elapsed().as_secs_f64();
            run.solved(estimate.solution.weights.is_none());
            // Without a loss that generalises, the weights in force are held.
            if let Some(solved) = &estimate.solution.weights {
                weights.clone_from(solved);
            }
            ogr = Some(Ratios::of_losses(&estimate, weights));
        }
        for _ in 0..trainer.batches.per_epoch() {
            trainer.step(&mut source, &mut run)?;
        }
        let weights = match &mut source {
            Source::Weights(weights) => weights.clone(),
            Source::GradNorm(grad_norm) => grad_norm.shares(),
            Source::MmPareto => uniform(task.k()),
            Source::GradBlend(gb) => {
                let report = gb.report()?;
                ogr = Some(Ratios::of_gradients(&report));
                // After the last epoch nothing is left to weight.
                if epoch + 1 < settings.epochs
                    && let Some(report) = gb.end_epoch(epoch)?
                {
                    run.solved(report.flags.contains(Flags::HELD));
                }
                report.weights
            }
        };
        if super_epochs.ends(epoch) || epoch + 1 == settings.epochs {
            run.states.push(State { epochs: epoch + 1, weights, ogr: ogr.clone() });
        }
        on_epoch()?;
    }
    run.train_seconds = start.elapsed().as_secs_f64();
    Ok(run)
}

/// What a step takes its weights from.
enum Source {
    Weights(Vec<f64>),
    GradBlend(Box<GradBlend>),
    GradNorm(GradNorm),
    MmPareto,
}

impl Source {
    fn new<T: Task>(method: &Weights, task: &T) -> Result<Self> {
        Ok(match method {
            Weights::Fixed(weights) => Source::Weights(weights.clone()),
            Weights::FromLosses(_) => Source::Weights(uniform(task.k())),
            Weights::FromGradients(config) => {
                Source::GradBlend(Box::new(GradBlend::new(task.parameters(), (**config).clone())?))
            }
            Weights::GradNorm => Source::GradNorm(GradNorm::new(task.k())),
            Weights::MmPareto => Source::MmPareto,
        })
    }
}

/// A network in training.
struct Trainer<'a, T> {
    task: &'a T,
    adam: Adam,
    train_batch: TrainBatch,
    /// Batches of training samples: for the v_k, and for t where it has batches of its own.
    batches: Batches,
    independent: Batches,
    /// Batches of held-out samples, for g.
    held_out: Batches,
}

impl<'a, T: Task> Trainer<'a, T> {
    fn new(task: &'a T, settings: &Settings, seed: u64) -> Result<Self> {
        let batches = |set, purpose| Batches::new(task.samples(set), settings.batch, random(seed, purpose));
        Ok(Trainer {
            task,
            adam: Adam::new(task.parameters(), settings.learning_rate)?,
            train_batch: settings.train_batch,
            batches: batches(Set::Train, "batches"),
            independent: batches(Set::Train, "other"),
            held_out: batches(Set::HeldOut, "held-out"),
        })
    }

    /// A step on the next batch.
    fn step(&mut self, source: &mut Source, run: &mut Run) -> Result<()> {
        let batch = next(self.task, Set::Train, &mut self.batches)?;
        let wanted = |k: usize| !matches!(&*source, Source::Weights(weights) if weights[k] == 0.0);
        let losses = self.task.losses(&batch, wanted)?;
        let losses = losses.into_iter().enumerate().filter_map(|(k, loss)| Some((k, loss?)));
        let (wanted, losses): (Vec<usize>, Vec<Tensor>) = losses.unzip();
        let gradients = match source {
            Source::Weights(weights) => {
                let weighted = losses.iter().zip(wanted).map(|(loss, k)| loss * weights[k]);
                let weighted = weighted.collect::<candle_core::Result<Vec<_>>>()?;
                Tensor::stack(&weighted, 0)?.sum_all()?.backward()?
            }
            Source::GradBlend(gb) => self.blend(gb, &losses, run)?,
            Source::GradNorm(grad_norm) => grad_norm.backward(self.task, &losses)?,
            Source::MmPareto => mm_pareto(self.task, &losses)?,
        };
        self.adam.step(self.task.parameters(), &gradients)
    }

    /// The gradients of one call of `GradBlend`.
    fn blend(&mut self, gb: &mut GradBlend, losses: &[Tensor], run: &mut Run) -> Result<GradStore> {
        let Trainer { task, independent, held_out, .. } = self;
        let fused = |set, batches: &mut Batches| task.loss(&next(*task, set, batches)?, losses.len() - 1);
        let held_out = || fused(Set::HeldOut, held_out);
        let start = Instant::now();
        let gradients = match self.train_batch {
            TrainBatch::Same => gb.backward(losses, held_out)?,
            TrainBatch::Independent => gb.backward_with_train(losses, held_out, || fused(Set::Train, independent))?,
        };
        if gb.observed() {
            run.blend_seconds += start.elapsed().as_secs_f64();
            if gb.blender().config().cadence == Cadence::EveryObservation {
                run.solved(gb.report()?.flags.contains(Flags::HELD));
            }
        }
        Ok(gradients)
    }
}

/// The next batch of a set.
fn next<T: Task>(task: &T, set: Set, batches: &mut Batches) -> Result<T::Batch> {
    let indices = batches.next();
    task.batch(set, &indices, &mut batches.rng)
}

/// Parameters, optimiser, and the next batches.
struct Checkpoint {
    parameters: Vec<Tensor>,
    adam: Adam,
    batches: Batches,
}

impl<T: Task> Trainee for Trainer<'_, T> {
    type Checkpoint = Checkpoint;
    type Error = anyhow::Error;

    fn modalities(&self) -> usize {
        self.task.k()
    }

    fn save(&mut self) -> Result<Checkpoint> {
        // A clone shares the parameters' memory, which is written to in place.
        let parameters = self.task.parameters().iter().map(|parameter| Ok(parameter.copy()?));
        let parameters = parameters.collect::<Result<_>>()?;
        Ok(Checkpoint { parameters, adam: self.adam.clone(), batches: self.batches.clone() })
    }

    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        for (parameter, saved) in self.task.parameters().iter().zip(&checkpoint.parameters) {
            parameter.set(saved)?;
        }
        self.adam = checkpoint.adam.clone();
        self.batches = checkpoint.batches.clone();
        Ok(())
    }

    fn train_modality(&mut self, modality: usize, epochs: u64) -> Result<()> {
        for _ in 0..epochs as usize * self.batches.per_epoch() {
            let batch = next(self.task, Set::Train, &mut self.batches)?;
            self.adam.step(self.task.parameters(), &self.task.loss(&batch, modality)?.backward()?)?;
        }
        Ok(())
    }

    fn losses(&mut self, modality: usize) -> Result<Losses> {
        Ok(Losses {
            train: self.task.mean_loss(Set::Train, modality)?,
            valid: self.task.mean_loss(Set::HeldOut, modality)?,
        })
    }
}
