//! `Trainer` with a framework of plain vectors: when it observes, what it runs, and that it equals the raw operations.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::cell::RefCell;
use std::rc::Rc;

use gradblend::trainer::{Error, GradBlendConfig, IntoLoss, Loss, Passes, Result, Row, Trainer};
use gradblend::{
    Average, Blender, Cadence, Config, DType, Device, EngineError, Flags, GradScale, Gradient, GradientMut, Negative,
    Overfitting, Ranks, Schedule, Stream, StreamRef, Sums, TensorGrads,
};

/// Lengths of the parameters. The last is reached by no loss.
const LENGTHS: [usize; 4] = [5, 700, 1, 3];

/// The gradient of a parameter in a pass of a step; `None` where the loss does not reach it.
fn gradient(step: usize, loss: Loss, parameter: usize) -> Option<Vec<f32>> {
    let (seed, reached) = match loss {
        Loss::Given(0) => (1, [true, true, false, false]),
        Loss::Given(1) => (2, [false, true, true, false]),
        // The fused loss does not reach the first parameter, and the held-out one does: as with dropout.
        Loss::Given(_) => (3, [false, true, true, false]),
        Loss::HeldOut => (4, [true, true, false, true]),
        Loss::Train => (5, [true, false, true, true]),
        Loss::Sum => return None,
    };
    let value = |i: usize| ((i * (seed + 3) + step * 7 + parameter) as f32).sin() + 0.3;
    reached[parameter].then(|| (0..LENGTHS[parameter]).map(value).collect())
}

type Gradients = Vec<Option<Vec<f32>>>;

/// A call: what it ran, and what fails.
#[derive(Default)]
struct Call {
    step: usize,
    independent: bool,
    unreached: Option<Loss>,
    fails: Option<Loss>,
    /// Memory that can be had before an allocation fails.
    memory: Option<usize>,
    /// A parameter that no loss of the training batch reaches.
    dropped: Option<usize>,
    passes: Vec<String>,
}

impl Call {
    /// Runs the call on a trainer.
    fn on(&mut self, trainer: &mut Trainer) -> Result<Gradients> {
        let train = self.independent.then_some(|| ());
        trainer.backward(self, || (), train)
    }
}

impl Passes for Call {
    type Loss = ();
    type Gradient = Vec<f32>;
    type Memory = Vec<f32>;
    type Output = Gradients;

    fn device(&self) -> Device {
        Device::cpu()
    }

    fn shape(&self, parameter: usize) -> (u64, DType) {
        (LENGTHS[parameter] as u64, DType::F32)
    }

    fn loss(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn gradients(&mut self, loss: Loss, (): (), scale: f32) -> Result<Gradients> {
        self.passes.push(loss.to_string());
        if self.fails == Some(loss) {
            return Err(Error::framework(loss)("no memory"));
        }
        let scaled = |gradient: Vec<f32>| gradient.into_iter().map(|x| x * scale).collect();
        let reached = self.unreached != Some(loss);
        let kept = |i| self.dropped != Some(i) && reached;
        Ok((0..LENGTHS.len()).map(|i| gradient(self.step, loss, i).filter(|_| kept(i)).map(scaled)).collect())
    }

    fn weighted(&mut self, terms: &[(usize, f32)]) -> Result<Gradients> {
        self.passes.push(format!("{terms:?}"));
        let mut sum: Gradients = vec![None; LENGTHS.len()];
        for (k, factor) in terms {
            for (i, sum) in sum.iter_mut().enumerate() {
                let Some(v) = gradient(self.step, Loss::Given(*k), i) else { continue };
                let old = sum.take().unwrap_or_else(|| vec![0.0; v.len()]);
                *sum = Some(old.iter().zip(v).map(|(old, v)| old + factor * v).collect());
            }
        }
        Ok(sum)
    }

    fn zeros(&mut self, like: &Vec<f32>) -> Result<Vec<f32>> {
        Ok(vec![0.0; like.len()])
    }

    fn memory(&mut self, parameter: usize) -> Result<Vec<f32>> {
        if let Some(memory) = &mut self.memory {
            *memory = memory.checked_sub(1).ok_or_else(|| Error::framework(Loss::Sum)("no memory"))?;
        }
        Ok(vec![f32::NAN; LENGTHS[parameter]])
    }

    fn bind(
        &mut self,
        rows: &[Row<Vec<f32>>],
        blended: &mut [Option<Vec<f32>>],
        run: &mut dyn FnMut(Vec<TensorGrads<'_>>, StreamRef<'_>) -> gradblend::Result<()>,
    ) -> Result<()> {
        let mut tensors = Vec::new();
        for (row, blended) in rows.iter().zip(blended) {
            let blended = blended.as_mut().map(|blended| GradientMut::from(&mut blended[..]));
            tensors.push(row.tensor(|gradient| Some(Gradient::from(&gradient[..])), blended));
        }
        Ok(run(tensors, Stream::default())?)
    }

    fn output(&mut self, blended: Gradients) -> Result<Gradients> {
        Ok(blended)
    }
}

/// Moments that are a mean, so that a few steps change the weights much.
fn config() -> GradBlendConfig {
    GradBlendConfig::new(3).average(Average::Mean).threads(1)
}

fn trainer(config: GradBlendConfig) -> Trainer {
    Trainer::new(&Device::cpu(), &config).unwrap()
}

/// The same step by the raw operations, on a blender of the same configuration.
fn raw_step(blender: &mut Blender, step: usize, independent: bool, scale: f32) -> Gradients {
    let scaled = |loss, i| -> Option<Vec<f32>> { Some(gradient(step, loss, i)?.iter().map(|x| x * scale).collect()) };
    let mut blended: Gradients = vec![None; LENGTHS.len()];
    let mut tensors = Vec::new();
    for i in 0..LENGTHS.len() {
        let v = [0, 1, 2].map(|k| scaled(Loss::Given(k), i));
        let t = if independent { scaled(Loss::Train, i) } else { v[2].clone() };
        tensors.push((t, scaled(Loss::HeldOut, i), v));
    }
    let plan = blender.plan(tensors.iter().zip(&mut blended).map(|((t, g, v), blended)| {
        let zeros: &[f32] = &[0.0; 700][..t.as_ref().or(g.as_ref()).map_or(0, Vec::len)];
        let slices = [0, 1, 2].map(|k| v[k].as_deref());
        let reached = slices.iter().any(Option::is_some);
        if !reached {
            return TensorGrads::blend_only::<f32>(&[None; 3]);
        }
        let out = blended.insert(vec![0.0; slices.iter().flatten().next().unwrap().len()]);
        let tensor = match (t, g) {
            (None, None) => TensorGrads::blend_only(&slices),
            (t, g) => TensorGrads::new(t.as_deref().unwrap_or(zeros), g.as_deref().unwrap_or(zeros), &slices),
        };
        tensor.blended(out)
    }));
    blender.step(&plan.unwrap(), Stream::default()).unwrap();
    blended
}

#[test]
fn observing_calls_equal_the_raw_operations_bit_for_bit() {
    for (independent, scale) in [(false, 1.0), (true, 1.0), (false, 512.0), (true, 0.25)] {
        let mut trainer = trainer(config());
        let blender_config =
            Config { average: Average::Mean, cadence: Cadence::EveryObservation, threads: 1, ..Config::new(3) };
        let mut blender = Blender::new(&Device::cpu(), blender_config).unwrap();
        trainer.set_grad_scale(scale).unwrap();
        blender.set_grad_scale(GradScale::value(scale)).unwrap();
        for step in 0..5 {
            let mut call = Call { step, independent, ..Call::default() };
            let got = call.on(&mut trainer).unwrap();
            let want = raw_step(&mut blender, step, independent, scale);
            let bits = |gradients: &Gradients| -> Vec<Option<Vec<u32>>> {
                gradients.iter().map(|g| g.as_ref().map(|g| g.iter().map(|x| x.to_bits()).collect())).collect()
            };
            assert_eq!(bits(&got), bits(&want), "step {step}, independent {independent}");
            assert!(got[3].is_none() && got[2].is_some());
            let mut passes = vec!["losses[0]", "losses[1]", "losses[2]", "the held-out loss"];
            if independent {
                passes.push("the train loss");
            }
            assert_eq!(call.passes, passes);
            assert!(trainer.observed());
        }
        assert_eq!(trainer.report().unwrap(), blender.report(Stream::default()).unwrap());
        assert!(trainer.weights().iter().any(|w| (w - 1.0 / 3.0).abs() > 1e-3), "{:?}", trainer.weights());
    }
}

/// Which parameters are reached may change from call to call, in both directions.
#[test]
fn a_parameter_may_be_reached_in_some_calls_only() {
    for first in [None, Some(2)] {
        let mut trainer = trainer(config());
        for (step, dropped) in [first, Some(0), None, Some(1), Some(2), None].into_iter().enumerate() {
            let got = (Call { step, dropped, ..Call::default() }).on(&mut trainer).unwrap();
            for (i, got) in got.iter().enumerate() {
                assert_eq!(got.is_some(), i < 3 && dropped != Some(i), "step {step}, parameter {i}");
            }
        }
        assert_eq!(trainer.report().unwrap().observed, 6);
    }
}

#[test]
fn every_says_which_calls_observe() {
    let mut trainer = trainer(config().every(3));
    let mut observed = Vec::new();
    for step in 0..7 {
        let expected = trainer.observes();
        let weights = trainer.weights().to_vec();
        let mut call = Call { step, ..Call::default() };
        let got = call.on(&mut trainer).unwrap();
        assert_eq!(trainer.observed(), expected);
        observed.push(expected);
        if !expected {
            // One pass, without the losses of weight 0.
            let terms: Vec<_> = weights.iter().copied().enumerate().filter(|(_, w)| *w != 0.0).collect();
            assert_eq!(call.passes, [format!("{terms:?}")]);
            assert_eq!(trainer.weights(), weights);
            let sum: f32 = terms.iter().map(|(k, w)| w * gradient(step, Loss::Given(*k), 1).unwrap()[9]).sum();
            assert!((got[1].as_ref().unwrap()[9] - sum).abs() < 1e-6);
        }
    }
    assert_eq!(observed, [true, false, false, true, false, false, true]);
    assert_eq!(trainer.observations(), 3);
}

#[test]
fn offline_no_call_observes() {
    let mut trainer = trainer(config().schedule(Schedule::offline()));
    trainer.set_weights(&[0.0, 2.0, -0.5]).unwrap();
    trainer.set_grad_scale(4.0).unwrap();
    let mut call = Call::default();
    call.on(&mut trainer).unwrap();
    assert_eq!(call.passes, ["[(1, 8.0), (2, -2.0)]"]);
    assert!(!trainer.observed() && trainer.end_epoch(9).unwrap().is_none());
}

#[test]
fn a_super_epoch_ends_with_new_weights_and_no_observation() {
    let mut trainer = trainer(config().schedule(Schedule::online(2, 1).unwrap()));
    for epoch in 0..2 {
        (Call { step: epoch, ..Call::default() }).on(&mut trainer).unwrap();
        assert_eq!(trainer.weights(), [1.0 / 3.0; 3]);
        let report = trainer.end_epoch(epoch as u64).unwrap();
        assert_eq!(report.is_some(), epoch == 1);
        if let Some(report) = report {
            assert_eq!((report.observed, report.flags.contains(Flags::HELD)), (2, false));
            assert_eq!(trainer.weights(), report.weights.iter().map(|w| *w as f32).collect::<Vec<_>>());
        }
    }
    assert_ne!(trainer.weights(), [1.0 / 3.0; 3]);
    assert_eq!(trainer.report().unwrap().observed, 0);
}

#[test]
fn on_request_and_reports() {
    let mut trainer = trainer(config().cadence(Cadence::OnRequest));
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = seen.clone();
    trainer.on_observation(move |report| log.lock().unwrap().push(report.observed));
    for step in 0..3 {
        Call { step, ..Call::default() }.on(&mut trainer).unwrap();
    }
    assert_eq!(*seen.lock().unwrap(), [1, 2, 3]);
    assert_eq!(trainer.weights(), [1.0 / 3.0; 3]);
    trainer.reweight().unwrap();
    assert_ne!(trainer.weights(), [1.0 / 3.0; 3]);
    // A panic of the function comes after the call.
    trainer.on_observation(|_| panic!("in the function"));
    let call = std::panic::AssertUnwindSafe(|| Call::default().on(&mut trainer).map(drop));
    assert!(std::panic::catch_unwind(call).is_err());
    assert_eq!((trainer.observations(), trainer.report().unwrap().observed), (4, 4));
}

#[test]
fn a_saved_state_continues_bit_for_bit() {
    let run = |trainer: &mut Trainer, steps: std::ops::Range<usize>| -> Vec<Gradients> {
        steps.map(|step| Call { step, ..Call::default() }.on(trainer).unwrap()).collect()
    };
    let (mut one, mut other) = (trainer(config().every(2)), trainer(config().every(2)));
    run(&mut one, 0..3);
    let saved = one.save().unwrap();
    other.load(&saved).unwrap();
    assert_eq!(run(&mut one, 3..8), run(&mut other, 3..8));
    assert_eq!(one.save().unwrap(), other.save().unwrap());
    // Every damage is an error, and nothing changes.
    for at in 0..saved.len() {
        let mut damaged = saved.clone();
        damaged[at] ^= 4;
        assert!(other.load(&damaged).is_err() && other.load(&saved[..at]).is_err(), "byte {at}");
    }
    let raw = one.blender().config().modalities;
    assert_eq!((raw, one.save().unwrap()), (3, other.save().unwrap()));
    assert!(trainer(GradBlendConfig::new(2)).load(&saved).is_err());
}

#[test]
fn options_have_the_names_of_the_blender() {
    let min_weight = [0.1, 0.0, 0.5];
    let made = GradBlendConfig::new(3)
        .min_weight(&min_weight)
        .overfitting(Overfitting::Correlated)
        .negative(Negative::Clamp)
        .damping(0.25)
        .decay(0.5)
        .threads(2);
    let config = *trainer(made.clone()).blender().config();
    assert_eq!(config.average, Average::Ema { decay: 0.5 });
    assert_eq!((config.cadence, config.threads), (Cadence::EveryObservation, 2));
    assert_eq!((config.policy.overfitting, config.policy.damping), (Overfitting::Correlated, 0.25));
    assert_eq!(config.policy.min_weight[..3], min_weight);
    let scheduled = trainer(made.schedule(Schedule::offline()));
    assert_eq!(scheduled.blender().config().cadence, Cadence::OnRequest);
    assert_eq!(*trainer(GradBlendConfig::new(3)).blender().config(), {
        Config { cadence: Cadence::EveryObservation, ..Config::new(3) }
    });
}

#[test]
fn bad_input_is_named_and_changes_nothing() {
    let rejected = |config: GradBlendConfig| match Trainer::new(&Device::cpu(), &config) {
        Err(Error::Blend(error)) => error,
        other => panic!("{other:?}"),
    };
    use gradblend::Error as Blend;
    assert_eq!(rejected(config().every(0)), gradblend::Error::Every);
    for got in [2, 4, 33] {
        let count = Blend::Count { what: "min_weight", expected: 3, got };
        assert_eq!(rejected(config().min_weight(&vec![0.0; got])), count);
    }
    assert_eq!(rejected(GradBlendConfig::new(0)), Blend::Modalities { got: 0 });
    assert_eq!(rejected(GradBlendConfig::new(33).min_weight(&[0.0; 33])), Blend::Modalities { got: 33 });
    assert_eq!(rejected(config().decay(1.0)), Blend::Decay { got: 1.0 });

    let mut trainer = trainer(config());
    Call::default().on(&mut trainer).unwrap();
    let before = trainer.save().unwrap();
    let every = [Loss::Given(0), Loss::Given(1), Loss::Given(2), Loss::HeldOut, Loss::Train];
    for loss in every {
        let independent = loss == Loss::Train;
        let call = || Call { independent, step: 3, ..Call::default() };
        let unreached = (Call { unreached: Some(loss), ..call() }).on(&mut trainer).unwrap_err();
        assert_eq!(unreached.to_string(), format!("{loss} reaches no parameter"));
        let failed = (Call { fails: Some(loss), ..call() }).on(&mut trainer).unwrap_err();
        assert_eq!(failed.to_string(), format!("{loss}: no memory"));
    }
    for independent in [false, true] {
        let mut call = Call { independent, memory: Some(2), ..Call::default() };
        let failed = call.on(&mut trainer).unwrap_err();
        assert_eq!(failed.to_string(), "the weighted sum of the losses: no memory");
    }
    assert_eq!(trainer.check_losses(2).unwrap_err().to_string(), "there are 2 losses, expected 3");
    assert!(trainer.set_grad_scale(0.0).is_err() && trainer.set_weights(&[1.0]).is_err());
    assert_eq!(trainer.save().unwrap(), before);
    assert_eq!((trainer.observations(), trainer.observes()), (1, true));
}

/// A group of one, of which the sum is the rank's own.
struct Alone {
    fails: bool,
}

impl Ranks for Alone {
    fn count(&self) -> usize {
        1
    }

    fn rank(&self) -> usize {
        0
    }

    fn sum(&mut self, _: Sums<'_>) -> std::result::Result<(), EngineError> {
        if self.fails { Err("gone".into()) } else { Ok(()) }
    }
}

/// On one rank, a call that leaves its products and the call that observes them are the call that does both.
#[test]
fn products_that_are_left() {
    for independent in [false, true] {
        let (mut one, mut two) = (trainer(config().every(2)), trainer(config().every(2).leave_sums(true)));
        for step in 0..6 {
            let call = || Call { step, independent, ..Call::default() };
            assert_eq!(call().on(&mut one).unwrap(), call().on(&mut two).unwrap());
            let mut ranks = Alone { fails: false };
            if !two.observed() {
                let none = two.reduce(&mut ranks).unwrap_err();
                assert_eq!(none.to_string(), "no call has left products pending");
                continue;
            }
            for error in [call().on(&mut two).unwrap_err(), two.save().unwrap_err()] {
                assert!(matches!(error, Error::PendingSums { pending: true }), "{error}");
            }
            let gone = two.reduce(&mut Alone { fails: true }).unwrap_err();
            assert_eq!(gone.to_string(), "the exchange between ranks failed: gone");
            let reduced = if step == 0 { two.reduce(&mut ranks) } else { two.observe_each(&mut ranks) };
            assert_eq!(reduced.unwrap(), Vec::<usize>::new());
            assert_eq!((one.save().unwrap(), one.weights()), (two.save().unwrap(), two.weights()));
        }
        assert_eq!(two.observations(), 3);
    }
}

/// A function may return a loss, or any result of one.
#[test]
fn functions_of_losses() {
    let plain: Result<Rc<RefCell<u8>>> = Rc::new(RefCell::new(1)).into_loss(Loss::HeldOut);
    assert_eq!(*plain.unwrap().borrow(), 1);
    let ok: std::result::Result<u8, String> = Ok(7);
    let ok: Result<u8> = ok.into_loss(Loss::HeldOut);
    assert_eq!(ok.unwrap(), 7);
    let failed: Result<u8> = Err::<u8, _>(std::io::Error::other("no batch")).into_loss(Loss::HeldOut);
    assert_eq!(failed.unwrap_err().to_string(), "the held-out loss: no batch");
}
