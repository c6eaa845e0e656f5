//! The adapter against plain recomputation from burn's own gradients.
#![allow(clippy::unwrap_used, reason = "a test")]

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor, TensorData};
use gradblend::{Average, Blender, Cadence, Config, Policy, Schedule, Stream, TensorGrads, solve};
use gradblend_burn::{Error, GradBlend, GradBlendConfig};

/// Two encoders and three heads: head 0 on modality 0, head 1 on modality 1, and a parameter that no loss reaches.
#[derive(Module, Debug)]
struct Toy {
    first: Param<Tensor<2>>,
    second: Param<Tensor<2>>,
    head: Param<Tensor<2>>,
    fused: Param<Tensor<1>>,
    unused: Param<Tensor<2>>,
}

fn device() -> Device {
    Device::flex().autodiff()
}

impl Toy {
    fn new(dtype: DType, device: &Device) -> Self {
        let values =
            |len: usize, phase: f64| -> Vec<f32> { (0..len).map(|i| (i as f64 * 0.7 + phase).sin() as f32).collect() };
        let matrix = |shape: [usize; 2], phase| {
            let data = TensorData::new(values(shape[0] * shape[1], phase), shape);
            Param::from_tensor(Tensor::<2>::from_data(data, (device, dtype)))
        };
        Toy {
            first: matrix([5, 7], 0.0),
            second: matrix([5, 3], 1.0),
            head: matrix([7, 1], 2.0),
            fused: Param::from_tensor(Tensor::from_data(TensorData::new(values(10, 3.0), [10]), (device, dtype))),
            unused: matrix([2, 2], 4.0),
        }
    }

    /// L_0, L_1 and the fused loss on the batch of this number.
    fn losses(&self, batch: usize) -> [Tensor<1>; 3] {
        let (device, dtype) = (self.first.val().device(), self.first.val().dtype());
        let input = |phase: f64| {
            let value = |i: usize| (i as f64 * 1.3 + batch as f64 * 0.9 + phase).cos() as f32;
            let data = TensorData::new((0..20).map(value).collect::<Vec<_>>(), [4, 5]);
            Tensor::<2>::from_data(data, (&device.clone().inner(), dtype)).to_device(&device)
        };
        let first = input(0.0).matmul(self.first.val()).tanh();
        let second = input(0.5).matmul(self.second.val()).tanh();
        let both = Tensor::cat(vec![first.clone(), second.clone()], 1);
        let loss = |x: Tensor<2>, target: f32| (x - target).powi_scalar(2).mean();
        [
            loss(first.matmul(self.head.val()), 0.3),
            loss(second.sum_dim(1), -0.2),
            loss(both.matmul(self.fused.val().reshape([10, 1])), 0.6),
        ]
    }

    fn fused_loss(&self, batch: usize) -> Tensor<1> {
        let [.., fused] = self.losses(batch);
        fused
    }

    /// burn's gradients of loss `k`, in the order of the parameters.
    fn gradients(&self, batch: usize, k: usize) -> Vec<Option<Vec<f32>>> {
        let loss = self.losses(batch)[k].clone();
        self.flat(&GradientsParams::from_grads(loss.backward(), self))
    }

    fn flat(&self, gradients: &GradientsParams) -> Vec<Option<Vec<f32>>> {
        let mut flat = Flat { gradients, all: Vec::new() };
        self.visit(&mut flat);
        flat.all
    }
}

struct Flat<'a> {
    gradients: &'a GradientsParams,
    all: Vec<Option<Vec<f32>>>,
}

impl ModuleVisitor for Flat<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.get::<D>(param.id);
        self.all.push(gradient.map(|gradient| gradient.into_data_as::<f32>().as_slice::<f32>().unwrap().to_vec()));
    }
}

fn config() -> GradBlendConfig {
    GradBlendConfig::new(3).average(Average::Mean).threads(2)
}

/// Weights and blended gradients equal those recomputed in f64 from the same gradients, at each of several steps.
fn recompute(dtype: DType, device: &Device, epsilon: f64, independent: bool) {
    let toy = Toy::new(dtype, device);
    let mut gb = GradBlend::new(&toy, config()).unwrap();
    let (mut m, mut s, mut w) = ([0.0; 3], [0.0; 9], vec![1.0 / 3.0; 3]);
    for step in 0..4 {
        let all = [0, 1, 2].map(|k| toy.gradients(step, k));
        let (valid, other) = (toy.gradients(step + 100, 2), toy.gradients(step + 50, 2));
        let (losses, held_out) = (|| toy.losses(step), || toy.fused_loss(step + 100));
        let blended = match independent {
            false => gb.backward(&toy, losses, held_out),
            true => gb.backward_with_train(&toy, losses, held_out, || toy.fused_loss(step + 50)),
        };
        let blended = toy.flat(&blended.unwrap());
        let (mut c, mut d) = ([0.0; 3], [0.0; 3]);
        for i in 0..5 {
            assert_eq!(blended[i].is_some(), i < 4, "parameter {i}");
            let Some(got) = &blended[i] else { continue };
            let value = |gradient: &Option<Vec<f32>>, e: usize| gradient.as_ref().map_or(0.0, |g| f64::from(g[e]));
            for (e, got) in got.iter().enumerate() {
                let v = [0, 1, 2].map(|k: usize| value(&all[k][i], e));
                let (t, g) = (if independent { value(&other[i], e) } else { v[2] }, value(&valid[i], e));
                let terms: [f64; 3] = std::array::from_fn(|k| w[k] * v[k]);
                let bound = 4.0 * epsilon * terms.iter().map(|term| term.abs()).sum::<f64>() + 6e-8;
                assert!((f64::from(*got) - terms.iter().sum::<f64>()).abs() <= bound, "step {step}, {i}, element {e}");
                for k in 0..3 {
                    c[k] += g * v[k];
                    d[k] += (t - g) * v[k];
                }
            }
        }
        let n = step as f64 + 1.0;
        for j in 0..3 {
            m[j] += (c[j] - m[j]) / n;
            for k in 0..3 {
                s[3 * j + k] += (d[j] * d[k] - s[3 * j + k]) / n;
            }
        }
        w = solve(&m, &s, &Policy::default()).unwrap().weights.unwrap_or(w);
        let report = gb.report().unwrap();
        for k in 0..3 {
            assert!((report.weights[k] - w[k]).abs() < 1e-4, "step {step}: {:?}, expected {w:?}", report.weights);
        }
        assert_eq!((report.observed, gb.observed()), (step as u64 + 1, true));
    }
}

#[test]
fn weights_and_blended_gradients_equal_a_recomputation() {
    for independent in [false, true] {
        recompute(DType::F32, &device(), f64::from(f32::EPSILON), independent);
        recompute(DType::F16, &device(), 2.0_f64.powi(-10), independent);
        recompute(DType::BF16, &device(), 2.0_f64.powi(-7), independent);
    }
}

#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated, reason = "as long as burn has it")]
fn ndarray() {
    recompute(DType::F32, &Device::ndarray().autodiff(), f64::from(f32::EPSILON), false);
}

#[test]
fn a_call_equals_the_raw_operations_bit_for_bit() {
    let toy = Toy::new(DType::F32, &device());
    let mut gb = GradBlend::new(&toy, config()).unwrap();
    let raw = Config { average: Average::Mean, cadence: Cadence::EveryObservation, ..Config::new(3) };
    let mut blender = Blender::new(&gradblend::Device::cpu(), raw).unwrap();
    for step in 0..6 {
        let gradients = gb.backward(&toy, || toy.losses(step), || toy.fused_loss(step + 100)).unwrap();
        let got = toy.flat(&gradients);
        let (all, valid) = ([0, 1, 2].map(|k| toy.gradients(step, k)), toy.gradients(step + 100, 2));
        let mut blended: Vec<Vec<f32>> = got.iter().map(|got| vec![0.0; got.as_ref().map_or(0, Vec::len)]).collect();
        let plan = blender.plan(blended.iter_mut().enumerate().map(|(i, blended)| {
            let slices = [0, 1, 2].map(|k: usize| all[k][i].as_deref());
            match (&valid[i], slices[2]) {
                (Some(g), Some(t)) => TensorGrads::new(t, g, &slices).blended(blended),
                _ => TensorGrads::blend_only(&slices).blended(blended),
            }
        }));
        blender.step(&plan.unwrap(), Stream::default()).unwrap();
        for (got, blended) in got.into_iter().zip(blended) {
            let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(got.unwrap_or_default()), bits(blended), "step {step}");
        }
    }
    assert_eq!(gb.report().unwrap(), blender.report(Stream::default()).unwrap());
}

#[test]
fn other_calls_return_the_gradient_of_the_weighted_loss() {
    let toy = Toy::new(DType::F32, &device());
    let mut gb = GradBlend::new(&toy, config().every(3)).unwrap();
    gb.set_grad_scale(8.0).unwrap();
    for step in 0..3 {
        let weights = gb.weights().to_vec();
        let (mut computed, mut asked) = (0, 0);
        let losses = || {
            computed += 1;
            toy.losses(step)
        };
        let held_out = || {
            asked += 1;
            toy.fused_loss(100)
        };
        let blended = toy.flat(&gb.backward(&toy, losses, held_out).unwrap());
        assert_eq!((computed, asked), if step == 0 { (3, 1) } else { (1, 0) });
        let terms = toy.losses(step).into_iter().zip(weights).map(|(loss, w)| loss * (8.0 * w));
        let total = terms.reduce(|a, b| a + b).unwrap();
        let plain = toy.flat(&GradientsParams::from_grads(total.backward(), &toy));
        for (got, expected) in blended.iter().zip(plain) {
            for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
                assert!((got - expected).abs() < 1e-5, "step {step}: {got}, expected {expected}");
            }
        }
    }
    let mut gb = GradBlend::new(&toy, config().schedule(Schedule::offline())).unwrap();
    gb.set_weights(&[0.0; 3]).unwrap();
    let none = gb.backward(&toy, || toy.losses(0), || -> Tensor<1> { unreachable!("no call observes") }).unwrap();
    assert!(none.is_empty());
}

#[test]
fn errors_name_the_loss_and_the_parameter_and_change_nothing() {
    let toy = Toy::new(DType::F32, &device());
    let message = |config, toy: &Toy| GradBlend::new(toy, config).unwrap_err().to_string();
    assert_eq!(message(GradBlendConfig::new(0), &toy), "expected 1 to 32 modalities, got 0");
    assert_eq!(message(config().every(0), &toy), "every is 0, expected at least 1");
    assert_eq!(message(config(), &Toy::new(DType::F32, &Device::flex())), "there is no parameter to train");
    let wide = message(config(), &Toy::new(DType::F64, &device()));
    assert!(wide.starts_with("first is F64 on ") && wide.ends_with("expected F32, F16 or BF16"), "{wide}");

    let mut gb = GradBlend::new(&toy, config()).unwrap();
    gb.backward(&toy, || toy.losses(0), || toy.fused_loss(100)).unwrap();
    let before = gb.save().unwrap();
    let held_out = || toy.fused_loss(101);
    let constant = || (Tensor::<1>::ones([1], &device()).require_grad() * 2.0).sum();
    let vector = || toy.first.val().reshape([35]);
    let mut rejected = |change: &dyn Fn(&mut Vec<Tensor<1>>), expected: &str| {
        let losses = || {
            let mut losses = Vec::from(toy.losses(1));
            change(&mut losses);
            losses
        };
        assert_eq!(gb.backward(&toy, losses, held_out).unwrap_err().to_string(), expected);
    };
    rejected(&|losses| losses.truncate(2), "there are 2 losses, expected 3");
    rejected(
        &|losses| losses[1] = vector(),
        "losses[1] is of shape [35], expected a tensor of one element with a graph",
    );
    rejected(
        &|losses| losses[2] = losses[2].clone().detach(),
        "losses[2] is without a graph, expected a tensor of one element with a graph",
    );
    rejected(&|losses| losses[0] = constant(), "losses[0] reaches no parameter");
    let losses = || toy.losses(1);
    let unreached = gb.backward(&toy, losses, constant).unwrap_err();
    assert_eq!(unreached.to_string(), "the held-out loss reaches no parameter");
    let failed = gb.backward(&toy, losses, || Err::<Tensor<1>, _>("no batch is left")).unwrap_err();
    assert_eq!(failed.to_string(), "the held-out loss: no batch is left");
    let other = Toy::new(DType::F32, &device());
    let error = gb.backward(&other, || other.losses(1), || other.fused_loss(1)).unwrap_err();
    assert!(matches!(error, Error::Parameter { .. }), "{error}");
    let mut changed = toy.clone();
    changed.head = Param::initialized(toy.head.id, Tensor::<2>::ones([2, 2], &device()).require_grad());
    let error = gb.backward(&changed, losses, held_out).unwrap_err();
    assert_eq!(error.to_string(), "head is F32 [2, 2], expected F32 [7, 1]");
    assert_eq!(gb.save().unwrap(), before);
    gb.backward(&toy, losses, held_out).unwrap();
    assert_eq!(gb.report().unwrap().observed, 2);
}
