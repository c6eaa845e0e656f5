//! The methods that are compared, and the data that each is compared on.

use anyhow::Result;
use gradblend::Overfitting;

use crate::common::arguments::{count, is_part, number};
use crate::common::train::{Run, Settings, TrainBatch, train};
use crate::common::weights::Weights;
use crate::data::{Data, NUISANCES, Nuisance, Source};
use crate::network::Network;

/// Settings of all methods.
#[derive(clap::Args)]
pub(crate) struct Training {
    /// Epochs to train for
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) epochs: u64,
    /// Samples per batch; an epoch leaves out what does not fill a batch
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
    /// The least weight of the fused loss in online-gradient-step:min-fused
    #[arg(long, value_name = "WEIGHT", default_value = "0.2", value_parser = number(is_part, "at least 0, less than 1"))]
    pub(crate) min_fused: f64,
    /// Where the train gradient t of the fused loss comes from
    #[arg(long, default_value = "same")]
    pub(crate) train_batch: TrainBatch,
}

/// A method to weight the losses.
pub(crate) struct Method {
    pub(crate) name: String,
    pub(crate) weights: Weights,
    /// The head whose accuracy counts.
    head: usize,
}

impl Method {
    /// Each input alone.
    fn alone(inputs: &[&str]) -> impl Iterator<Item = Method> {
        let k = inputs.len() + 1;
        let alone = move |(head, name)| Method { name: format!("alone:{name}"), weights: Weights::only(head, k), head };
        inputs.iter().enumerate().map(alone)
    }

    /// All methods.
    fn all(inputs: &[&str], training: &Training) -> Result<Vec<Method>> {
        let (fused, k) = (inputs.len(), inputs.len() + 1);
        let mut methods: Vec<Method> = Method::alone(inputs).collect();
        let mut add = |name: &str, weights| methods.push(Method { name: name.to_owned(), weights, head: fused });
        let per_step = || Weights::per_step(k, training.decay);
        let correlated = Overfitting::Correlated;
        add("naive", Weights::only(fused, k));
        add("uniform", Weights::uniform(k));
        add("gradnorm", Weights::GradNorm);
        add("mmpareto", Weights::MmPareto);
        add("offline-loss", Weights::offline_loss());
        add("online-loss", Weights::online_loss()?);
        add("online-gradient-epoch", Weights::per_super_epoch(k)?.into());
        add("online-gradient-step", per_step().into());
        add("online-gradient-cheap", per_step().every(training.every).into());
        add("online-gradient-epoch:correlated", Weights::per_super_epoch(k)?.overfitting(correlated).into());
        add("online-gradient-step:correlated", per_step().overfitting(correlated).into());
        let mut min_weight = vec![0.0; k];
        min_weight[fused] = training.min_fused;
        add("online-gradient-step:min-fused", per_step().min_weight(&min_weight).into());
        Ok(methods)
    }
}

/// The methods that mixtures of inputs are compared by, besides each input alone.
pub(crate) const OF_MIXTURES: [&str; 4] = ["naive", "uniform", "online-gradient-epoch", "online-gradient-step"];

/// Some inputs, the samples of each seed, and the methods to train on them.
pub(crate) struct Case {
    pub(crate) name: String,
    /// Names of the losses: of the inputs, and the fused one.
    pub(crate) modalities: Vec<String>,
    pub(crate) methods: Vec<Method>,
    pub(crate) samples: Vec<Data>,
}

impl Case {
    fn new(name: &str, inputs: &[&str], methods: Vec<Method>, samples: Vec<Data>) -> Self {
        let modalities = inputs.iter().chain(&["fused"]).map(|name| (*name).to_owned()).collect();
        Case { name: name.to_owned(), modalities, methods, samples }
    }

    /// All methods on these inputs of the source, for each nuisance.
    pub(crate) fn of_nuisances(
        source: &Source,
        samples: &[Data],
        inputs: &[usize],
        nuisances: &[Nuisance],
        training: &Training,
    ) -> Result<Vec<Self>> {
        let known = source.inputs();
        let case = |nuisance: &Nuisance| {
            let mut columns = inputs.to_vec();
            let further = NUISANCES.iter().position(|other| other == nuisance);
            columns.extend(further.map(|position| known.len() + position));
            let names: Vec<&str> = inputs.iter().map(|k| known[*k]).chain(nuisance.input()).collect();
            let samples = samples.iter().map(|data| data.with(&columns)).collect();
            Ok(Case::new(nuisance.input().unwrap_or("clean"), &names, Method::all(&names, training)?, samples))
        };
        nuisances.iter().map(case).collect()
    }

    /// Each of these inputs alone, then each mixture of them, the smaller ones first.
    pub(crate) fn of_mixtures(
        source: &Source,
        samples: &[Data],
        inputs: &[usize],
        training: &Training,
    ) -> Result<Vec<Self>> {
        let known = source.inputs();
        let of_bits = |bits: usize| inputs.iter().enumerate().filter(move |(i, _)| bits >> i & 1 == 1).map(|(_, k)| *k);
        let mut mixtures: Vec<Vec<usize>> = (1..1 << inputs.len()).map(|bits| of_bits(bits).collect()).collect();
        mixtures.sort_by_key(Vec::len);
        let case = |mixture: &Vec<usize>| {
            let names: Vec<&str> = mixture.iter().map(|k| known[*k]).collect();
            let methods = if names.len() == 1 {
                Method::alone(&names).collect()
            } else {
                let mut methods = Method::all(&names, training)?;
                methods.retain(|method| OF_MIXTURES.contains(&&method.name[..]));
                methods
            };
            let samples = samples.iter().map(|data| data.with(mixture)).collect();
            Ok(Case::new(&names.join("+"), &names, methods, samples))
        };
        mixtures.iter().map(case).collect()
    }

    /// Trains a network by a method on the samples of the n-th seed. Returns how it went and the test accuracy.
    pub(crate) fn run(
        &self,
        method: &Method,
        nth: usize,
        seed: u64,
        training: &Training,
        on_epoch: &dyn Fn() -> Result<()>,
    ) -> Result<(Run, f64)> {
        let Training { epochs, batch, learning_rate, train_batch, .. } = *training;
        let settings = Settings { epochs, batch, learning_rate, train_batch };
        let network = Network::new(&self.samples[nth], &self.modalities, training.hidden, seed)?;
        let run = train(&network, &method.weights, &settings, seed, on_epoch)?;
        Ok((run, network.accuracy(method.head)?))
    }
}
