//! The methods that are compared, and their common training loop.

use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use gradblend::{
    Average, Cadence, Config, Estimate, Flags, Losses, Overfitting, Policy, Report, Schedule, Trainee, gb_estimate,
};
use gradblend_candle::{GradBlend, weighted_loss};

use crate::data::{Batches, Data, Samples, count, number, random};
use crate::network::{Adam, Network};

/// Epochs of the first super-epoch and of each one after it, as in the paper.
pub(crate) const WARM_UP: u64 = 10;
pub(crate) const SUPER_EPOCH: u64 = 5;

/// Where the weights of the losses come from.
pub(crate) enum Weights {
    Fixed(Vec<f64>),
    /// Estimated from losses at the start of each super-epoch, for its length: each loss is trained alone.
    FromLosses(Schedule),
    /// Estimated from gradients, observed at every `every`-th step; in force at each observation, or at the end of a
    /// super-epoch, by the configuration's cadence.
    FromGradients {
        config: Box<Config>,
        every: usize,
    },
}

/// A method to weight the losses.
pub(crate) struct Method {
    pub(crate) name: String,
    pub(crate) weights: Weights,
    /// The head whose accuracy counts.
    head: usize,
}

impl Method {
    /// All methods. `correlated` adds those that do not take the overfitting of modalities as uncorrelated.
    pub(crate) fn all(inputs: &[String], correlated: bool, settings: &Settings) -> Result<Vec<Method>> {
        let fused = inputs.len();
        let only = |k: usize| Weights::Fixed((0..=fused).map(|j| f64::from(u8::from(j == k))).collect());
        let gradients = |average, cadence, overfitting, every| {
            let policy = Policy { overfitting, ..Policy::default() };
            // One thread: the seeds run in parallel.
            (Config { average, cadence, policy, threads: 1, ..Config::new(fused as u32 + 1) }, every)
        };
        // All observations of a super-epoch count alike: the moments are reset at its end.
        let per_super_epoch = |overfitting| gradients(Average::Mean, Cadence::OnRequest, overfitting, 1);
        let ema = Average::Ema { decay: settings.decay };
        let per_step = |overfitting, every| gradients(ema, Cadence::EveryObservation, overfitting, every);
        let fixed = inputs.iter().enumerate().map(|(k, name)| (format!("alone:{name}"), only(k), k));
        let mut methods: Vec<_> = fixed.map(|(name, weights, head)| Method { name, weights, head }).collect();
        let mut add = |name: &str, weights| methods.push(Method { name: name.to_owned(), weights, head: fused });
        add("naive", only(fused));
        add("uniform", Weights::Fixed(vec![1.0 / (fused + 1) as f64; fused + 1]));
        add("offline-loss", Weights::FromLosses(Schedule::offline()));
        add("online-loss", Weights::FromLosses(Schedule::online(WARM_UP, SUPER_EPOCH)?));
        let mut add = |name: &str, (config, every)| {
            add(name, Weights::FromGradients { config: Box::new(config), every });
        };
        add("online-gradient-epoch", per_super_epoch(Overfitting::Uncorrelated));
        add("online-gradient-step", per_step(Overfitting::Uncorrelated, 1));
        add("online-gradient-cheap", per_step(Overfitting::Uncorrelated, settings.every));
        if correlated {
            add("online-gradient-epoch:correlated", per_super_epoch(Overfitting::Correlated));
            add("online-gradient-step:correlated", per_step(Overfitting::Correlated, 1));
        }
        if let Some(least) = settings.min_fused {
            let (mut config, every) = per_step(Overfitting::Uncorrelated, 1);
            config.policy.min_weight[fused] = least;
            add("online-gradient-step:min-fused", (config, every));
        }
        Ok(methods)
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

fn is_part(value: f64) -> bool {
    (0.0..1.0).contains(&value)
}

/// Settings of all methods.
#[derive(clap::Args)]
pub(crate) struct Settings {
    /// Epochs to train for
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) epochs: u64,
    /// Samples per batch
    #[arg(long, default_value = "50", value_parser = count(1_000_000))]
    pub(crate) batch: usize,
    /// Adam's learning rate
    #[arg(long, default_value = "0.001", value_parser = number(|rate| rate > 0.0 && rate <= 1000.0, "more than 0, at most 1000"))]
    pub(crate) learning_rate: f64,
    /// Hidden units of each encoder and of the fused head
    #[arg(long, default_value = "64", value_parser = count(4096))]
    pub(crate) hidden: usize,
    /// Decay of the moving averages of online-gradient-step and -cheap
    #[arg(long, default_value = "0.99", value_parser = number(is_part, "at least 0, less than 1"))]
    pub(crate) decay: f64,
    /// online-gradient-cheap observes at every so many steps
    #[arg(long, value_name = "STEPS", default_value = "10", value_parser = count(1_000_000))]
    pub(crate) every: usize,
    /// Also runs online-gradient-step with this least weight of the fused loss
    #[arg(long, value_name = "WEIGHT", value_parser = number(is_part, "at least 0, less than 1"))]
    pub(crate) min_fused: Option<f64>,
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
    /// m_k over its standard error, of each loss; from losses there is none.
    pub(crate) signal: Option<Vec<f64>>,
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
        let uniform = vec![1.0 / weights.len() as f64; weights.len()];
        Ratios { losses: estimate.ogr.clone(), blend: ratio(weights), uniform: ratio(&uniform), signal: None }
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

/// Trains a network from the seed's initial parameters and tests it after the last epoch.
pub(crate) fn train(method: &Method, data: &Data, settings: &Settings, seed: u64, on_epoch: impl Fn()) -> Result<Run> {
    let mut trainer = Trainer::new(data, settings, seed)?;
    let losses = trainer.network.losses_len();
    let mut weights = vec![1.0 / losses as f64; losses];
    let (mut schedule, mut blend) = (None, None);
    match &method.weights {
        Weights::Fixed(fixed) => weights.clone_from(fixed),
        Weights::FromLosses(super_epochs) => schedule = Some(*super_epochs),
        Weights::FromGradients { config, every } => {
            let at_each_observation = config.cadence == Cadence::EveryObservation;
            blend = Some((GradBlend::new(&trainer.network.parameters, **config)?, at_each_observation, *every));
        }
    }
    let super_epochs = Schedule::online(WARM_UP, SUPER_EPOCH)?;
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
                Some((blend, at_each_observation, every)) if steps.is_multiple_of(*every) => {
                    let gradients = trainer.gradients(settings.train_batch, &mut run.blending)?;
                    let Gradients { losses, train, valid } = &gradients;
                    let blended = timed(&mut run.library, || blend.step(losses, train.as_ref(), valid))?;
                    trainer.adam.step(&trainer.network.parameters, &blended)?;
                    if *at_each_observation {
                        run.solved(blend.report()?.flags.contains(Flags::HELD));
                    }
                }
                Some((blend, ..)) => trainer.step(blend.weights())?,
                None => trainer.step(&weights.iter().map(|weight| *weight as f32).collect::<Vec<_>>())?,
            }
            steps += 1;
        }
        if let Some((blend, at_each_observation, _)) = &mut blend {
            let report = blend.report()?;
            weights.clone_from(&report.weights);
            ogr = Some(Ratios::of_gradients(&report));
            // After the last epoch nothing is left to weight.
            if !*at_each_observation && super_epochs.ends(epoch) && epoch + 1 < settings.epochs {
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
    run.accuracy = trainer.network.accuracy(&data.test, method.head)?;
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
