//! The methods that are compared, and the training loop that all of them share.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::Tensor;
use gradblend::{
    Average, Cadence, Config, Estimate, Flags, Losses, MeanLoss, Overfitting, Policy, Report, Schedule, Trainee,
    gb_estimate,
};

use crate::blending::{Blending, Gradients};
use crate::data::{Batch, Batches, Data, Split, random};
use crate::network::{Adam, Network};

/// Where the weights of the losses come from.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Method {
    /// One modality's loss, and its own head's accuracy.
    Alone(usize),
    /// The fused loss.
    Naive,
    /// 1 / K for each loss.
    Uniform,
    /// Estimated from losses, once, before training: each loss is trained on alone for the whole run.
    OfflineLoss,
    /// Estimated from losses at the start of each super-epoch, for its length.
    OnlineLoss,
    /// Estimated from the gradients of a super-epoch, at its end, by a plain mean.
    OnlineGradientEpoch(Overfitting),
    /// Estimated from gradients at each step, by an EMA.
    OnlineGradientStep(Overfitting),
    /// The same at every few steps; between them, one backward pass on the weighted loss.
    OnlineGradientCheap,
}

impl Method {
    pub(crate) fn name(self, modalities: &[String]) -> String {
        let policy = |overfitting| if overfitting == Overfitting::Correlated { ":correlated" } else { "" };
        match self {
            Method::Alone(k) => format!("alone:{}", modalities[k]),
            Method::Naive => "naive".to_owned(),
            Method::Uniform => "uniform".to_owned(),
            Method::OfflineLoss => "offline-loss".to_owned(),
            Method::OnlineLoss => "online-loss".to_owned(),
            Method::OnlineGradientEpoch(overfitting) => format!("online-gradient-epoch{}", policy(overfitting)),
            Method::OnlineGradientStep(overfitting) => format!("online-gradient-step{}", policy(overfitting)),
            Method::OnlineGradientCheap => "online-gradient-cheap".to_owned(),
        }
    }

    /// Whether there are weights to be found.
    pub(crate) fn estimates(self) -> bool {
        !matches!(self, Method::Alone(_) | Method::Naive | Method::Uniform)
    }

    pub(crate) fn uses_gradients(self) -> bool {
        self.estimates() && !matches!(self, Method::OfflineLoss | Method::OnlineLoss)
    }

    fn solves_at_each_observation(self) -> bool {
        matches!(self, Method::OnlineGradientStep(_) | Method::OnlineGradientCheap)
    }

    fn first_weights(self, losses: usize) -> Vec<f64> {
        let only = |k: usize| (0..losses).map(|j| f64::from(u8::from(j == k))).collect();
        match self {
            Method::Alone(k) => only(k),
            Method::Naive => only(losses - 1),
            _ => vec![1.0 / losses as f64; losses],
        }
    }

    /// The super-epochs of the estimate from losses.
    fn loss_schedule(self) -> Result<Option<Schedule>> {
        Ok(match self {
            Method::OfflineLoss => Some(Schedule::offline()),
            Method::OnlineLoss => Some(Schedule::online(WARM_UP, SUPER_EPOCH)?),
            _ => None,
        })
    }

    /// The blender's configuration for the estimate from gradients.
    fn config(self, losses: usize, decay: f64) -> Option<Config> {
        let (average, cadence, overfitting) = match self {
            // A super-epoch's observations count alike: the moments start anew with each.
            Method::OnlineGradientEpoch(overfitting) => (Average::Mean, Cadence::OnRequest, overfitting),
            Method::OnlineGradientStep(overfitting) => (Average::Ema { decay }, Cadence::EveryObservation, overfitting),
            Method::OnlineGradientCheap => {
                (Average::Ema { decay }, Cadence::EveryObservation, Overfitting::Uncorrelated)
            }
            _ => return None,
        };
        let policy = Policy { overfitting, ..Policy::default() };
        // One thread: the parallel work here is that of the seeds.
        Some(Config { average, cadence, policy, threads: 1, ..Config::new(losses as u32) })
    }
}

/// Epochs of the first super-epoch and of each one after it, as in the paper.
pub(crate) const WARM_UP: u64 = 10;
pub(crate) const SUPER_EPOCH: u64 = 5;

/// Where t, the train gradient of the fused loss, comes from.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TrainBatch {
    /// From the batch behind the v_k: no further backward pass, but the noise of v_fused gets into its own d squared
    Same,
    /// From a training batch drawn independently: unbiased, one more forward and backward pass
    Independent,
}

/// What all methods have in common.
pub(crate) struct Settings {
    pub(crate) epochs: u64,
    pub(crate) batch: usize,
    pub(crate) rate: f64,
    pub(crate) hidden: usize,
    pub(crate) decay: f64,
    pub(crate) every: usize,
    pub(crate) train_batch: TrainBatch,
}

/// Overfitting-to-generalisation ratios.
#[derive(Clone)]
pub(crate) struct Ratios {
    /// Of each loss.
    pub(crate) losses: Vec<f64>,
    /// Of the weights in force.
    pub(crate) blend: f64,
    /// Of uniform weights.
    pub(crate) uniform: f64,
}

/// The end of an epoch.
pub(crate) struct Epoch {
    /// The weights that the epoch's last step was made with, or, if they change at each step, that it led to.
    pub(crate) weights: Vec<f64>,
    pub(crate) ogr: Option<Ratios>,
}

/// What came of one method on one seed.
pub(crate) struct Run {
    pub(crate) accuracy: f64,
    pub(crate) epochs: Vec<Epoch>,
    /// How often weights were solved for, and how often there was nothing to go by.
    pub(crate) solved: u64,
    pub(crate) held: u64,
    /// All of training, blending included.
    pub(crate) training: Duration,
    /// What a plain step on the fused loss would not have done.
    pub(crate) blending: Duration,
    /// Of that, the time in gradblend itself; for estimates from losses too small to tell apart.
    pub(crate) library: Duration,
}

/// Trains a network from the seed's first weights and tests it after the last epoch.
pub(crate) fn train(
    method: Method,
    data: &Data,
    settings: &Settings,
    seed: u64,
    mut on_epoch: impl FnMut(),
) -> Result<Run> {
    let mut trainer = Trainer::new(data, settings, seed)?;
    let losses = trainer.network.losses_len();
    let mut weights = method.first_weights(losses);
    let schedule = method.loss_schedule()?;
    let super_epochs = Schedule::online(WARM_UP, SUPER_EPOCH)?;
    let config = method.config(losses, settings.decay);
    let mut blending = config.map(|config| Blending::new(trainer.network.parameters(), config)).transpose()?;
    let every = if method == Method::OnlineGradientCheap { settings.every } else { 1 };

    let (mut epochs, mut ogr, mut solved, mut held) = (Vec::new(), None, 0, 0);
    let (mut spent, mut steps) = (Duration::ZERO, 0_usize);
    let begun = Instant::now();
    for epoch in 0..settings.epochs {
        if let Some(schedule) = schedule.filter(|schedule| schedule.starts(epoch)) {
            let begun = Instant::now();
            // Offline, the estimate looks as far ahead as the training will go.
            let length = schedule.len(epoch).unwrap_or(settings.epochs).min(settings.epochs);
            let estimate = gb_estimate(&mut trainer, length, &Policy::default())?;
            solved += 1;
            match &estimate.solution.weights {
                Some(found) => weights.clone_from(found),
                // Nothing to go by, as when no loss gained on held-out samples: keep the weights in force.
                None => held += 1,
            }
            ogr = Some(ratios_of_losses(&estimate, &weights));
            spent += begun.elapsed();
        }
        for _ in 0..trainer.batches.an_epoch() {
            match &mut blending {
                None => trainer.step(&weights)?,
                Some(blending) if steps.is_multiple_of(every) => {
                    let (gradients, extra) = trainer.gradients(settings.train_batch)?;
                    let blended = blending.step(gradients)?;
                    trainer.adam.step(trainer.network.parameters(), blended)?;
                    spent += extra;
                    if method.solves_at_each_observation() {
                        solved += 1;
                        held += u64::from(blending.report()?.flags.contains(Flags::HELD));
                    }
                }
                Some(blending) => {
                    let weights: Vec<f64> = blending.weights().iter().map(|weight| f64::from(*weight)).collect();
                    trainer.step(&weights)?;
                }
            }
            steps += 1;
        }
        if let Some(blending) = &mut blending {
            let report = blending.report()?;
            weights.clone_from(&report.weights);
            ogr = Some(ratios_of_gradients(&report));
            let last = epoch + 1 == settings.epochs;
            // After the last epoch there is nothing left to weight.
            if !method.solves_at_each_observation() && super_epochs.ends(epoch) && !last {
                let report = blending.end_super_epoch()?;
                solved += 1;
                held += u64::from(report.flags.contains(Flags::HELD));
            }
        }
        epochs.push(Epoch { weights: weights.clone(), ogr: ogr.clone() });
        on_epoch();
    }
    let training = begun.elapsed();
    let library = blending.map_or(Duration::ZERO, |blending| blending.library);
    let head = if let Method::Alone(k) = method { k } else { losses - 1 };
    let right = trainer.network.right(&data.test.all, head)?;
    let accuracy = f64::from(right) / data.test.len as f64;
    Ok(Run { accuracy, epochs, solved, held, training, blending: spent + library, library })
}

fn ratios_of_gradients(report: &Report) -> Ratios {
    Ratios { losses: report.ogr.clone(), blend: report.ogr_blend, uniform: report.ogr_uniform }
}

/// As the blender reports them: sqrt(sum w^2 dO^2) / |sum w dG|, overfitting taken as uncorrelated.
fn ratios_of_losses(estimate: &Estimate, weights: &[f64]) -> Ratios {
    let ratio = |weights: &[f64]| {
        let overfitting: f64 = weights.iter().zip(&estimate.delta_o).map(|(w, o)| (w * o).powi(2)).sum();
        let generalisation: f64 = weights.iter().zip(&estimate.delta_g).map(|(w, g)| w * g).sum();
        overfitting.sqrt() / generalisation.abs()
    };
    let uniform = vec![1.0 / weights.len() as f64; weights.len()];
    Ratios { losses: estimate.ogr.clone(), blend: ratio(weights), uniform: ratio(&uniform) }
}

/// A network in training.
struct Trainer<'a> {
    data: &'a Data,
    network: Network,
    adam: Adam,
    /// Of training samples: for the v_k, and for t where it has batches of its own.
    batches: Batches,
    independent: Batches,
    /// Of held-out samples, for g.
    held_out: Batches,
}

impl<'a> Trainer<'a> {
    fn new(data: &'a Data, settings: &Settings, seed: u64) -> Result<Self> {
        let network = Network::new(&data.widths, settings.hidden, &mut random(seed, "weights"))?;
        let batches = |split: &Split, purpose| Batches::new(split.len, settings.batch, random(seed, purpose));
        Ok(Trainer {
            data,
            adam: Adam::new(network.parameters(), settings.rate)?,
            network,
            batches: batches(&data.train, "batches"),
            independent: batches(&data.train, "other"),
            held_out: batches(&data.held_out, "held-out"),
        })
    }

    /// A plain step: one backward pass on the weighted loss. Losses of weight 0 are not even computed.
    fn step(&mut self, weights: &[f64]) -> Result<()> {
        let batch = self.batches.next(&self.data.train)?;
        let wanted: Vec<bool> = weights.iter().map(|weight| *weight != 0.0).collect();
        let mut total: Option<Tensor> = None;
        for (loss, weight) in self.network.losses(&batch, &wanted)?.into_iter().zip(weights) {
            if let Some(loss) = loss {
                let loss = (loss * *weight)?;
                total = Some(match total {
                    None => loss,
                    Some(total) => (total + loss)?,
                });
            }
        }
        let gradients = total.context("all weights are 0")?.backward()?;
        self.adam.step(self.network.parameters(), &gradients)
    }

    /// The gradients that blending needs, and how long those took that a plain step on the fused loss has no use for:
    /// all but one forward pass and the backward pass of the fused loss.
    fn gradients(&mut self, train_batch: TrainBatch) -> Result<(Gradients, Duration)> {
        let batch = self.batches.next(&self.data.train)?;
        let wanted = vec![true; self.network.losses_len()];
        let mut losses: Vec<Tensor> = self.network.losses(&batch, &wanted)?.into_iter().flatten().collect();
        let fused = losses.pop().context("the network has no loss")?.backward()?;

        let begun = Instant::now();
        let fused_loss = losses.len();
        let mut stores = losses.iter().map(|loss| Ok(loss.backward()?)).collect::<Result<Vec<_>>>()?;
        stores.push(fused);
        let train = match train_batch {
            TrainBatch::Same => None,
            TrainBatch::Independent => {
                let batch = self.independent.next(&self.data.train)?;
                Some(self.network.loss(&batch, fused_loss)?.backward()?)
            }
        };
        let batch = self.held_out.next(&self.data.held_out)?;
        let valid = self.network.loss(&batch, fused_loss)?.backward()?;
        Ok((Gradients { losses: stores, train, valid }, begun.elapsed()))
    }

    fn mean_loss(&self, split: &Split, k: usize) -> Result<f64> {
        let mut mean = MeanLoss::default();
        let batch: &Batch = &split.all;
        mean.add(f64::from(self.network.loss(batch, k)?.to_scalar::<f32>()?), split.len as u64);
        Ok(mean.mean())
    }
}

/// Parameters, optimiser, and which batch comes next.
struct Checkpoint {
    parameters: Vec<Tensor>,
    adam: Adam,
    batches: Batches,
}

impl Trainee for Trainer<'_> {
    type Checkpoint = Checkpoint;
    type Error = anyhow::Error;

    fn modalities(&self) -> usize {
        self.network.losses_len()
    }

    fn save(&mut self) -> Result<Checkpoint> {
        // Parameters are written to in place, so a clone, which shares their memory, would be no checkpoint.
        let parameters = self.network.parameters().iter().map(|parameter| Ok(parameter.copy()?));
        let parameters = parameters.collect::<Result<_>>()?;
        Ok(Checkpoint { parameters, adam: self.adam.clone(), batches: self.batches.clone() })
    }

    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        for (parameter, saved) in self.network.parameters().iter().zip(&checkpoint.parameters) {
            parameter.set(saved)?;
        }
        self.adam = checkpoint.adam.clone();
        self.batches = checkpoint.batches.clone();
        Ok(())
    }

    fn train_modality(&mut self, modality: usize, epochs: u64) -> Result<()> {
        let alone = Method::Alone(modality).first_weights(self.modalities());
        for _ in 0..epochs as usize * self.batches.an_epoch() {
            self.step(&alone)?;
        }
        Ok(())
    }

    fn losses(&mut self, modality: usize) -> Result<Losses> {
        let train = self.mean_loss(&self.data.train, modality)?;
        Ok(Losses { train, valid: self.mean_loss(&self.data.held_out, modality)? })
    }
}
