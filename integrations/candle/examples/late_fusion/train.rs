//! The methods that are compared, and their common training loop.

use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use gradblend::{
    Average, Cadence, Config, Estimate, Flags, Losses, Overfitting, Policy, Report, Schedule, Trainee, gb_estimate,
};
use gradblend_candle::{GradBlend, weighted_loss};

use crate::data::{Batches, Data, Samples, count, random};
use crate::network::{Adam, Network};

/// Epochs of the first super-epoch and of each one after it, as in the paper.
pub(crate) const WARM_UP: u64 = 10;
pub(crate) const SUPER_EPOCH: u64 = 5;

/// Where the weights of the losses come from.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Method {
    /// The loss of one modality, and the accuracy of its own head.
    Alone(usize),
    /// The fused loss.
    Naive,
    /// 1 / K for each loss.
    Uniform,
    /// Estimated from losses, once, before training: each loss is trained alone for the whole run.
    OfflineLoss,
    /// Estimated from losses at the start of each super-epoch, for its length.
    OnlineLoss,
    /// Estimated from the gradients of a super-epoch, at its end, by a plain mean.
    OnlineGradientEpoch(Overfitting),
    /// Estimated from gradients at each step, by an EMA.
    OnlineGradientStep(Overfitting),
    /// The same at every r-th step; between them, one backward pass on the weighted loss.
    OnlineGradientCheap,
}

impl Method {
    /// All methods. `correlated` adds those that do not take the overfitting of modalities as uncorrelated.
    pub(crate) fn all(modalities: usize, correlated: bool) -> Vec<Method> {
        use Method::*;
        use Overfitting::{Correlated, Uncorrelated};
        let mut methods: Vec<Method> = (0..modalities).map(Alone).collect();
        methods.extend([Naive, Uniform, OfflineLoss, OnlineLoss]);
        methods.extend([OnlineGradientEpoch(Uncorrelated), OnlineGradientStep(Uncorrelated), OnlineGradientCheap]);
        if correlated {
            methods.extend([OnlineGradientEpoch(Correlated), OnlineGradientStep(Correlated)]);
        }
        methods
    }

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

    /// Whether weights are estimated.
    pub(crate) fn estimates(self) -> bool {
        !matches!(self, Method::Alone(_) | Method::Naive | Method::Uniform)
    }

    pub(crate) fn uses_gradients(self) -> bool {
        self.estimates() && !matches!(self, Method::OfflineLoss | Method::OnlineLoss)
    }

    fn initial_weights(self, losses: usize) -> Vec<f64> {
        let only = |k: usize| (0..losses).map(|j| f64::from(u8::from(j == k))).collect();
        match self {
            Method::Alone(k) => only(k),
            Method::Naive => only(losses - 1),
            _ => vec![1.0 / losses as f64; losses],
        }
    }

    /// Super-epochs of an estimate from losses.
    fn loss_schedule(self) -> Result<Option<Schedule>> {
        Ok(match self {
            Method::OfflineLoss => Some(Schedule::offline()),
            Method::OnlineLoss => Some(Schedule::online(WARM_UP, SUPER_EPOCH)?),
            _ => None,
        })
    }

    /// The blender's configuration for an estimate from gradients.
    fn config(self, losses: usize, decay: f64) -> Option<Config> {
        let (average, cadence, overfitting) = match self {
            // All observations of a super-epoch count alike: the moments are reset at its end.
            Method::OnlineGradientEpoch(overfitting) => (Average::Mean, Cadence::OnRequest, overfitting),
            Method::OnlineGradientStep(overfitting) => (Average::Ema { decay }, Cadence::EveryObservation, overfitting),
            Method::OnlineGradientCheap => {
                (Average::Ema { decay }, Cadence::EveryObservation, Overfitting::Uncorrelated)
            }
            _ => return None,
        };
        let policy = Policy { overfitting, ..Policy::default() };
        // One thread: the seeds run in parallel.
        Some(Config { average, cadence, policy, threads: 1, ..Config::new(losses as u32) })
    }
}

/// Where t, the train gradient of the fused loss, comes from.
#[derive(Clone, Copy, PartialEq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TrainBatch {
    /// The batch of the v_k: no further backward pass, but the noise of v_fused enters its own d squared
    Same,
    /// A training batch that is drawn independently: unbiased, one more forward and backward pass
    Independent,
}

/// Settings of all methods.
#[derive(clap::Args)]
pub(crate) struct Settings {
    /// Epochs to train for
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) epochs: u64,
    /// Samples per batch
    #[arg(long, default_value = "50", value_parser = count())]
    pub(crate) batch: usize,
    /// Adam's learning rate
    #[arg(long, default_value_t = 1e-3)]
    pub(crate) learning_rate: f64,
    /// Hidden units of each encoder and of the fused head
    #[arg(long, default_value = "64", value_parser = count())]
    pub(crate) hidden: usize,
    /// Decay of the moving averages of online-gradient-step and -cheap
    #[arg(long, default_value_t = 0.99)]
    pub(crate) decay: f64,
    /// online-gradient-cheap observes at every so many steps
    #[arg(long, value_name = "STEPS", default_value = "10", value_parser = count())]
    pub(crate) every: usize,
    /// Where the train gradient t of the fused loss comes from
    #[arg(long, default_value = "same")]
    pub(crate) train_batch: TrainBatch,
}

/// Overfitting-to-generalisation ratios.
#[derive(Clone, serde::Serialize)]
pub(crate) struct Ratios {
    /// Of each loss.
    pub(crate) losses: Vec<f64>,
    /// Of the weights in force.
    pub(crate) blend: f64,
    /// Of uniform weights.
    pub(crate) uniform: f64,
}

impl Ratios {
    fn of_gradients(report: &Report) -> Self {
        Ratios { losses: report.ogr.clone(), blend: report.ogr_blend, uniform: report.ogr_uniform }
    }

    /// As the blender reports them: sqrt(sum w^2 dO^2) / |sum w dG|, overfitting taken as uncorrelated.
    fn of_losses(estimate: &Estimate, weights: &[f64]) -> Self {
        let ratio = |weights: &[f64]| {
            let overfitting: f64 = weights.iter().zip(&estimate.delta_o).map(|(w, o)| (w * o).powi(2)).sum();
            let generalisation: f64 = weights.iter().zip(&estimate.delta_g).map(|(w, g)| w * g).sum();
            overfitting.sqrt() / generalisation.abs()
        };
        let uniform = vec![1.0 / weights.len() as f64; weights.len()];
        Ratios { losses: estimate.ogr.clone(), blend: ratio(weights), uniform: ratio(&uniform) }
    }
}

/// The state at the end of an epoch.
pub(crate) struct Epoch {
    /// The weights of the epoch's last step, or, if they change at each step, those after it.
    pub(crate) weights: Vec<f64>,
    pub(crate) ogr: Option<Ratios>,
}

/// Result of one method on one seed.
#[derive(Default)]
pub(crate) struct Run {
    pub(crate) accuracy: f64,
    pub(crate) epochs: Vec<Epoch>,
    /// How often weights were solved for, and how often the weights in force were held.
    pub(crate) solved: u64,
    pub(crate) held: u64,
    /// All of training, blending included.
    pub(crate) training: Duration,
    /// What a plain step on the fused loss does not need.
    pub(crate) blending: Duration,
    /// The part of it in gradblend itself; for estimates from losses too short to measure.
    pub(crate) library: Duration,
}

impl Run {
    fn solved(&mut self, held: bool) {
        self.solved += 1;
        self.held += u64::from(held);
    }
}

/// Adds the time of `work` to `total`.
fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed();
    result
}

/// Trains a network from the seed's initial weights and tests it after the last epoch.
pub(crate) fn train(method: Method, data: &Data, settings: &Settings, seed: u64, on_epoch: impl Fn()) -> Result<Run> {
    let mut trainer = Trainer::new(data, settings, seed)?;
    let losses = trainer.network.losses_len();
    let mut weights = method.initial_weights(losses);
    let schedule = method.loss_schedule()?;
    let super_epochs = Schedule::online(WARM_UP, SUPER_EPOCH)?;
    let config = method.config(losses, settings.decay);
    let at_each_observation = config.is_some_and(|config| config.cadence == Cadence::EveryObservation);
    let mut blend = config.map(|config| GradBlend::new(&trainer.network.parameters, config)).transpose()?;
    let every = if method == Method::OnlineGradientCheap { settings.every } else { 1 };

    let (mut run, mut ogr, mut steps) = (Run::default(), None, 0_usize);
    let start = Instant::now();
    for epoch in 0..settings.epochs {
        if let Some(schedule) = schedule.filter(|schedule| schedule.starts(epoch)) {
            // Offline, the estimate covers the whole training.
            let length = schedule.len(epoch).unwrap_or(settings.epochs).min(settings.epochs);
            let estimate = timed(&mut run.blending, || gb_estimate(&mut trainer, length, &Policy::default()))?;
            run.solved(estimate.solution.weights.is_none());
            // Without a loss that generalises, the weights in force are held.
            weights = estimate.solution.weights.clone().unwrap_or(weights);
            ogr = Some(Ratios::of_losses(&estimate, &weights));
        }
        for _ in 0..trainer.batches.per_epoch() {
            match &mut blend {
                Some(blend) if steps.is_multiple_of(every) => {
                    let gradients = trainer.gradients(settings.train_batch, &mut run.blending)?;
                    let Gradients { losses, train, valid } = &gradients;
                    let blended = timed(&mut run.library, || blend.step(losses, train.as_ref(), valid))?;
                    trainer.adam.step(&trainer.network.parameters, &blended)?;
                    if at_each_observation {
                        run.solved(blend.report()?.flags.contains(Flags::HELD));
                    }
                }
                Some(blend) => trainer.step(blend.weights())?,
                None => trainer.step(&weights.iter().map(|weight| *weight as f32).collect::<Vec<_>>())?,
            }
            steps += 1;
        }
        if let Some(blend) = &mut blend {
            let report = blend.report()?;
            weights.clone_from(&report.weights);
            ogr = Some(Ratios::of_gradients(&report));
            // After the last epoch nothing is left to weight.
            if !at_each_observation && super_epochs.ends(epoch) && epoch + 1 < settings.epochs {
                timed(&mut run.library, || blend.reweight())?;
                run.solved(blend.report()?.flags.contains(Flags::HELD));
                blend.reset()?;
            }
        }
        run.epochs.push(Epoch { weights: weights.clone(), ogr: ogr.clone() });
        on_epoch();
    }
    run.training = start.elapsed();
    run.blending += run.library;
    run.accuracy = trainer.network.accuracy(&data.test, if let Method::Alone(k) = method { k } else { losses - 1 })?;
    Ok(run)
}

/// The gradients of one observing step.
struct Gradients {
    losses: Vec<GradStore>,
    /// t, if it has a batch of its own.
    train: Option<GradStore>,
    valid: GradStore,
}

/// A network in training.
struct Trainer<'a> {
    data: &'a Data,
    network: Network,
    adam: Adam,
    /// Batches of training samples: for the v_k, and for t where it has batches of its own.
    batches: Batches,
    independent: Batches,
    /// Batches of held-out samples, for g.
    held_out: Batches,
}

impl<'a> Trainer<'a> {
    fn new(data: &'a Data, settings: &Settings, seed: u64) -> Result<Self> {
        let network = Network::new(&data.widths, settings.hidden, &mut random(seed, "weights"))?;
        let batches = |samples: &Samples, purpose| Batches::new(samples, settings.batch, random(seed, purpose));
        Ok(Trainer {
            data,
            adam: Adam::new(&network.parameters, settings.learning_rate)?,
            network,
            batches: batches(&data.train, "batches"),
            independent: batches(&data.train, "other"),
            held_out: batches(&data.held_out, "held-out"),
        })
    }

    /// A plain step: one backward pass on the weighted loss. Losses of weight 0 are not computed.
    fn step(&mut self, weights: &[f32]) -> Result<()> {
        let batch = self.batches.next(&self.data.train)?;
        let losses = self.network.losses(&batch, |k| weights[k] != 0.0)?;
        self.adam.step(&self.network.parameters, &weighted_loss(&losses, weights)?.backward()?)
    }

    /// The gradients of an observing step. Adds to `further` the time of what a plain step on the fused loss does not need:
    /// all but one forward pass and the backward pass of the fused loss.
    fn gradients(&mut self, train_batch: TrainBatch, further: &mut Duration) -> Result<Gradients> {
        let batch = self.batches.next(&self.data.train)?;
        let losses: Vec<Tensor> = self.network.losses(&batch, |_| true)?.into_iter().flatten().collect();
        let (fused, others) = (losses.len() - 1, &losses[..losses.len() - 1]);
        let of_fused = losses[fused].backward()?;
        timed(further, || {
            let mut losses = others.iter().map(|loss| Ok(loss.backward()?)).collect::<Result<Vec<_>>>()?;
            losses.push(of_fused);
            let mut train = None;
            if train_batch == TrainBatch::Independent {
                let batch = self.independent.next(&self.data.train)?;
                train = Some(self.network.loss(&batch, fused)?.backward()?);
            }
            let batch = self.held_out.next(&self.data.held_out)?;
            let valid = self.network.loss(&batch, fused)?.backward()?;
            Ok(Gradients { losses, train, valid })
        })
    }
}

/// Parameters, optimiser, and the next batches.
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
        // A clone shares the parameters' memory, which is written to in place.
        let parameters = self.network.parameters.iter().map(|parameter| Ok(parameter.copy()?));
        let parameters = parameters.collect::<Result<_>>()?;
        Ok(Checkpoint { parameters, adam: self.adam.clone(), batches: self.batches.clone() })
    }

    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        for (parameter, saved) in self.network.parameters.iter().zip(&checkpoint.parameters) {
            parameter.set(saved)?;
        }
        self.adam = checkpoint.adam.clone();
        self.batches = checkpoint.batches.clone();
        Ok(())
    }

    fn train_modality(&mut self, modality: usize, epochs: u64) -> Result<()> {
        let weights: Vec<f32> = (0..self.modalities()).map(|k| f32::from(u8::from(k == modality))).collect();
        (0..epochs as usize * self.batches.per_epoch()).try_for_each(|_| self.step(&weights))
    }

    fn losses(&mut self, modality: usize) -> Result<Losses> {
        let mean = |samples: &Samples| -> Result<f64> {
            Ok(f64::from(self.network.loss(samples, modality)?.to_scalar::<f32>()?))
        };
        Ok(Losses { train: mean(&self.data.train)?, valid: mean(&self.data.held_out)? })
    }
}
