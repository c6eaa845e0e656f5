//! The methods that are compared, and their common training loop.

use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::Tensor;
use gradblend::{
    Average, Cadence, Estimate, Flags, Losses, Overfitting, Policy, Report, Schedule, Trainee, gb_estimate,
};
use gradblend_candle::{GradBlend, GradBlendConfig};

use crate::data::{Batches, Data, Samples, count, number, random};
use crate::network::{Adam, Network};

/// Epochs of the first super-epoch and of each one after it, as in the paper.
pub(crate) const WARM_UP: u64 = 10;
pub(crate) const SUPER_EPOCH: u64 = 5;

/// Where the weights of the losses come from.
pub(crate) enum Weights {
    /// One loss is trained alone.
    Only(usize),
    Uniform,
    /// Estimated from losses at the start of each super-epoch, for its length: each loss is trained alone.
    FromLosses(Schedule),
    /// Estimated from gradients, and in force after each observation, or at the end of a super-epoch.
    FromGradients(Box<GradBlendConfig>),
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
        // One thread: the seeds run in parallel.
        let config = || GradBlendConfig::new(fused as u32 + 1).threads(1);
        let super_epochs = Schedule::online(WARM_UP, SUPER_EPOCH)?;
        // All observations of a super-epoch count alike: the moments are reset at its end.
        let per_super_epoch = || config().average(Average::Mean).schedule(super_epochs);
        let per_step = || config().decay(settings.decay);
        let alone = inputs.iter().enumerate().map(|(k, name)| (format!("alone:{name}"), Weights::Only(k), k));
        let mut methods: Vec<_> = alone.map(|(name, weights, head)| Method { name, weights, head }).collect();
        let mut add = |name: &str, weights| methods.push(Method { name: name.to_owned(), weights, head: fused });
        add("naive", Weights::Only(fused));
        add("uniform", Weights::Uniform);
        add("offline-loss", Weights::FromLosses(Schedule::offline()));
        add("online-loss", Weights::FromLosses(super_epochs));
        let mut add = |name: &str, config| add(name, Weights::FromGradients(Box::new(config)));
        add("online-gradient-epoch", per_super_epoch());
        add("online-gradient-step", per_step());
        add("online-gradient-cheap", per_step().every(settings.every));
        if correlated {
            add("online-gradient-epoch:correlated", per_super_epoch().overfitting(Overfitting::Correlated));
            add("online-gradient-step:correlated", per_step().overfitting(Overfitting::Correlated));
        }
        if let Some(least) = settings.min_fused {
            let mut min_weight = vec![0.0; fused + 1];
            min_weight[fused] = least;
            add("online-gradient-step:min-fused", per_step().min_weight(&min_weight));
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
    #[arg(long, value_name = "STEPS", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) every: u64,
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
    /// All of training.
    pub(crate) training: Duration,
    /// The part of it in calls that observe, and in estimates from losses.
    pub(crate) estimating: Duration,
}

impl Run {
    fn solved(&mut self, held: bool) {
        self.solved += 1;
        self.held += u64::from(held);
    }
}

/// Trains a network from the seed's initial parameters and tests it after the last epoch.
pub(crate) fn train(method: &Method, data: &Data, settings: &Settings, seed: u64, on_epoch: impl Fn()) -> Result<Run> {
    let mut trainer = Trainer::new(data, settings, seed)?;
    let losses = trainer.network.losses_len();
    let config = match &method.weights {
        Weights::FromGradients(config) => (**config).clone(),
        // The weights are those that are set.
        _ => GradBlendConfig::new(losses as u32).threads(1).schedule(Schedule::offline()),
    };
    let mut gb = GradBlend::new(&trainer.network.parameters, config)?;
    if let Weights::Only(only) = method.weights {
        gb.set_weights(&(0..losses).map(|k| f64::from(u8::from(k == only))).collect::<Vec<_>>())?;
    }
    let (mut run, mut ogr) = (Run::default(), None);
    let start = Instant::now();
    for epoch in 0..settings.epochs {
        match &method.weights {
            Weights::FromLosses(schedule) if schedule.starts(epoch) => {
                // Offline, the estimate covers the whole training.
                let length = schedule.len(epoch).unwrap_or(settings.epochs).min(settings.epochs);
                let estimating = Instant::now();
                let estimate = gb_estimate(&mut trainer, length, &Policy::default())?;
                run.estimating += estimating.elapsed();
                run.solved(estimate.solution.weights.is_none());
                // Without a loss that generalises, the weights in force are held.
                if let Some(weights) = &estimate.solution.weights {
                    gb.set_weights(weights)?;
                }
                ogr = Some(Ratios::of_losses(&estimate, &gb.report()?.weights));
            }
            _ => {}
        }
        for _ in 0..trainer.batches.per_epoch() {
            match method.weights {
                Weights::Only(loss) => trainer.step_alone(loss)?,
                _ => trainer.step(&mut gb, settings.train_batch, &mut run)?,
            }
        }
        let report = gb.report()?;
        if let Weights::FromGradients(_) = method.weights {
            ogr = Some(Ratios::of_gradients(&report));
            // After the last epoch nothing is left to weight.
            if epoch + 1 < settings.epochs
                && let Some(report) = gb.end_epoch(epoch)?
            {
                run.solved(report.flags.contains(Flags::HELD));
            }
        }
        run.epochs.push(Epoch { weights: report.weights, ogr: ogr.clone() });
        on_epoch();
    }
    run.training = start.elapsed();
    run.accuracy = trainer.network.accuracy(&data.test, method.head)?;
    Ok(run)
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

    /// A step on one loss.
    fn step_alone(&mut self, loss: usize) -> Result<()> {
        let batch = self.batches.next(&self.data.train)?;
        self.adam.step(&self.network.parameters, &self.network.loss(&batch, loss)?.backward()?)
    }

    /// A step on all losses.
    fn step(&mut self, gb: &mut GradBlend, train_batch: TrainBatch, run: &mut Run) -> Result<()> {
        let Trainer { data, network, adam, batches, independent, held_out } = self;
        let losses: Vec<Tensor> =
            network.losses(&batches.next(&data.train)?, |_| true)?.into_iter().flatten().collect();
        let fused = |batches: &mut Batches, samples| network.loss(&batches.next(samples)?, losses.len() - 1);
        let held_out = || fused(held_out, &data.held_out);
        let start = Instant::now();
        let gradients = match train_batch {
            TrainBatch::Same => gb.backward(&losses, held_out)?,
            TrainBatch::Independent => gb.backward_with_train(&losses, held_out, || fused(independent, &data.train))?,
        };
        if gb.observed() {
            run.estimating += start.elapsed();
            if gb.blender().config().cadence == Cadence::EveryObservation {
                run.solved(gb.report()?.flags.contains(Flags::HELD));
            }
        }
        adam.step(&network.parameters, &gradients)
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
        (0..epochs as usize * self.batches.per_epoch()).try_for_each(|_| self.step_alone(modality))
    }

    fn losses(&mut self, modality: usize) -> Result<Losses> {
        let mean = |samples: &Samples| -> Result<f64> {
            Ok(f64::from(self.network.loss(samples, modality)?.to_scalar::<f32>()?))
        };
        Ok(Losses { train: mean(&self.data.train)?, valid: mean(&self.data.held_out)? })
    }
}
