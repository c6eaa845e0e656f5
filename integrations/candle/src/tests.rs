//! The adapter against plain recomputation from candle's own gradients.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, IndexOp, Storage, Tensor, Var};
use gradblend::{Average, Blender, Cadence, Config, Policy, Schedule, Stream, TensorGrads, solve};

use gradblend::trainer::Passes;

use super::passes::Locked;
use super::*;

/// Two encoders and three heads: head 0 on modality 0, head 1 on both, and a parameter that no loss reaches.
struct Toy {
    vars: Vec<Var>,
}

impl Toy {
    fn new(dtype: DType) -> Self {
        let var = |shape: (usize, usize), phase: f64| {
            let values = (0..shape.0 * shape.1).map(|i| (i as f64 * 0.7 + phase).sin() as f32).collect::<Vec<_>>();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            Var::from_tensor(&tensor).unwrap()
        };
        Toy {
            vars: [((5, 7), 0.0), ((5, 3), 1.0), ((7, 1), 2.0), ((10, 1), 3.0), ((2, 2), 4.0)]
                .map(|(s, p)| var(s, p))
                .to_vec(),
        }
    }

    /// L_0, L_1 and the fused loss on the batch of this number.
    fn losses(&self, batch: usize) -> [Tensor; 3] {
        let input = |rows: usize, phase: f64| {
            let value = |i: usize| (i as f64 * 1.3 + batch as f64 * 0.9 + phase).cos() as f32;
            let values = (0..rows * 5).map(value).collect::<Vec<_>>();
            Tensor::from_vec(values, (rows, 5), &Device::Cpu).unwrap().to_dtype(self.vars[0].dtype()).unwrap()
        };
        let first = input(4, 0.0).matmul(&self.vars[0]).unwrap().tanh().unwrap();
        let second = input(4, 0.5).matmul(&self.vars[1]).unwrap().tanh().unwrap();
        let both = Tensor::cat(&[&first, &second], 1).unwrap();
        let loss = |x: Tensor, target: f64| x.affine(1.0, -target).unwrap().sqr().unwrap().mean_all().unwrap();
        [
            loss(first.matmul(&self.vars[2]).unwrap(), 0.3),
            loss(second.sum_keepdim(1).unwrap(), -0.2),
            loss(both.matmul(&self.vars[3]).unwrap(), 0.6),
        ]
    }

    fn stores(&self, batch: usize) -> Vec<GradStore> {
        self.losses(batch).iter().map(|loss| loss.backward().unwrap()).collect()
    }

    fn fused(&self, batch: usize) -> GradStore {
        self.losses(batch)[2].backward().unwrap()
    }

    /// A parameter's gradient as f64; zeros where the loss does not reach it.
    fn values(&self, store: &GradStore, i: usize) -> Vec<f64> {
        let zeros = || self.vars[i].zeros_like().unwrap();
        let gradient = store.get(&self.vars[i]).cloned().unwrap_or_else(zeros);
        gradient.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }
}

fn config() -> GradBlendConfig {
    GradBlendConfig::new(3).average(Average::Mean)
}

/// Weights and blended gradients equal those recomputed in f64 from the same gradients, at each of several steps.
fn recompute(dtype: DType, epsilon: f64, independent: bool) {
    let toy = Toy::new(dtype);
    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    let (mut m, mut s, mut w) = ([0.0; 3], [0.0; 9], vec![1.0 / 3.0; 3]);
    for step in 0..4 {
        let (stores, valid, train) = (toy.stores(step), toy.fused(step + 100), toy.fused(step + 50));
        let (losses, fused) = (toy.losses(step), |batch: usize| toy.losses(batch)[2].clone());
        let blended = match independent {
            false => gb.backward(&losses, || fused(step + 100)),
            true => gb.backward_with_train(&losses, || fused(step + 100), || fused(step + 50)),
        };
        let blended = blended.unwrap();
        let (mut c, mut d) = ([0.0; 3], [0.0; 3]);
        for i in 0..toy.vars.len() {
            let v: Vec<_> = stores.iter().map(|store| toy.values(store, i)).collect();
            let t = toy.values(if independent { &train } else { &stores[2] }, i);
            let g = toy.values(&valid, i);
            assert_eq!(blended.get(&toy.vars[i]).is_some(), i < 4, "parameter {i}");
            for (e, got) in toy.values(&blended, i).into_iter().enumerate() {
                let terms: [f64; 3] = std::array::from_fn(|k| w[k] * v[k][e]);
                let bound = 4.0 * epsilon * terms.iter().map(|term| term.abs()).sum::<f64>();
                assert!((got - terms.iter().sum::<f64>()).abs() <= bound, "step {step}, parameter {i}, element {e}");
                for k in 0..3 {
                    c[k] += g[e] * v[k][e];
                    d[k] += (t[e] - g[e]) * v[k][e];
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
            assert_eq!(gb.weights()[k], report.weights[k] as f32);
        }
        assert_eq!(report.observed, step as u64 + 1);
    }
}

#[test]
fn weights_and_blended_gradients_equal_a_recomputation() {
    for independent in [false, true] {
        recompute(DType::F32, f64::from(f32::EPSILON), independent);
        recompute(DType::F16, 2.0_f64.powi(-10), independent);
        recompute(DType::BF16, 2.0_f64.powi(-7), independent);
    }
}

#[test]
fn a_run_equals_the_raw_operations_bit_for_bit() {
    let (toy, other) = (Toy::new(DType::F32), Toy::new(DType::F32));
    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    let raw = Config { average: Average::Mean, cadence: Cadence::EveryObservation, ..Config::new(3) };
    let mut blender = Blender::new(&gradblend::Device::cpu(), raw).unwrap();
    for step in 0..6 {
        let gradients = gb.backward(&toy.losses(step), || toy.losses(step + 100)[2].clone()).unwrap();
        let flat = |store: &GradStore, i: usize| -> Option<Vec<f32>> {
            Some(store.get(&other.vars[i])?.flatten_all().unwrap().to_vec1().unwrap())
        };
        let (stores, valid) = (other.stores(step), other.fused(step + 100));
        let rows: Vec<_> = (0..5).map(|i| ([0, 1, 2].map(|k| flat(&stores[k], i)), flat(&valid, i))).collect();
        let mut blended: Vec<Vec<f32>> = other.vars.iter().map(|var| vec![0.0; var.elem_count()]).collect();
        let plan = blender.plan(rows.iter().zip(&mut blended).map(|((v, g), blended)| {
            let slices = [0, 1, 2].map(|k| v[k].as_deref());
            match g {
                Some(g) if slices[2].is_some() => TensorGrads::new(slices[2].unwrap(), g, &slices).blended(blended),
                _ => TensorGrads::blend_only(&slices).blended(blended),
            }
        }));
        blender.step(&plan.unwrap(), Stream::default()).unwrap();
        for (i, (own, others)) in toy.vars.iter().zip(&other.vars).enumerate() {
            let Some(gradient) = gradients.get(own) else { continue };
            let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let got = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(got), bits(blended[i].clone()), "step {step}, parameter {i}");
            own.set(&(own.as_tensor() - (gradient * 0.1).unwrap()).unwrap()).unwrap();
            let gradient = Tensor::from_slice(&blended[i], others.shape(), &Device::Cpu).unwrap();
            others.set(&(others.as_tensor() - (gradient * 0.1).unwrap()).unwrap()).unwrap();
        }
    }
    assert_eq!(gb.report().unwrap(), blender.report(Stream::default()).unwrap());
}

#[test]
fn other_calls_return_the_gradient_of_the_weighted_loss() {
    let toy = Toy::new(DType::F32);
    let mut gb = GradBlend::new(&toy.vars[..3], config().every(3)).unwrap();
    gb.set_grad_scale(8.0).unwrap();
    for step in 0..3 {
        let weights = gb.weights().to_vec();
        let losses = toy.losses(step);
        let mut asked = false;
        let blended = gb
            .backward(&losses, || {
                asked = true;
                toy.losses(100)[2].clone()
            })
            .unwrap();
        assert_eq!((asked, gb.observed()), (step == 0, step == 0));
        let terms = losses.iter().zip(&weights).map(|(loss, w)| (loss * f64::from(8.0 * w)).unwrap());
        let plain = terms.reduce(|a, b| (a + b).unwrap()).unwrap().backward().unwrap();
        for i in 0..3 {
            for (got, expected) in toy.values(&blended, i).into_iter().zip(toy.values(&plain, i)) {
                assert!((got - expected).abs() < 1e-5, "step {step}, parameter {i}: {got}, expected {expected}");
            }
        }
        // Of those that were given: the fused loss reaches another one.
        assert!(plain.get(&toy.vars[3]).is_some() && blended.get(&toy.vars[3]).is_none());
    }
    let mut gb = GradBlend::new(&toy.vars, config().schedule(Schedule::offline())).unwrap();
    gb.set_weights(&[0.0; 3]).unwrap();
    let none = gb.backward(&toy.losses(0), || -> Tensor { unreachable!("no call observes") }).unwrap();
    assert_eq!(none.get_ids().count(), 0);
}

#[test]
fn a_parameter_given_twice_counts_once() {
    let toy = Toy::new(DType::F32);
    let twice: Vec<Var> = toy.vars.iter().chain(&toy.vars).cloned().collect();
    let run = |vars: &[Var]| {
        let mut gb = GradBlend::new(vars, config()).unwrap();
        gb.backward(&toy.losses(0), || toy.losses(100)[2].clone()).unwrap();
        gb.report().unwrap()
    };
    assert_eq!(run(&twice), run(&toy.vars));
}

/// A `VarMap` has another order in each process.
#[test]
fn the_order_of_names_changes_no_bit() {
    let value =
        |i: usize| Tensor::arange(0.0_f32, 9.0, &Device::Cpu).unwrap().affine(0.7, i as f64).unwrap().sin().unwrap();
    let vars: Vec<_> = (0..40).map(|i| (format!("layer {i}"), Var::from_tensor(&value(i)).unwrap())).collect();
    let loss = |scale: f64| {
        // Of different sizes, so that sums of the products are rounded.
        let term = |(i, (_, var)): (usize, &(String, Var))| {
            ((var.as_tensor() * scale).unwrap().tanh().unwrap().sum_all().unwrap() * 1.5_f64.powi(i as i32)).unwrap()
        };
        let terms = vars.iter().enumerate().map(term);
        terms.reduce(|a, b| (a + b).unwrap()).unwrap()
    };
    let run = |vars: Vec<(String, Var)>| {
        let mut gb = GradBlend::named(vars, GradBlendConfig::new(2)).unwrap();
        for step in 1..6 {
            gb.backward(&[loss(1.1), loss(0.3)], || loss(0.2 * f64::from(step))).unwrap();
        }
        gb.save().unwrap()
    };
    assert_eq!(run(vars.clone()), run(vars.iter().rev().cloned().collect()));
}

#[test]
fn gradients_are_read_where_they_are() {
    // A view into the middle of a larger buffer, so that a copy would have another address than the view's.
    let large = Tensor::arange(0.0_f32, 12.0, &Device::Cpu).unwrap().reshape((4, 3)).unwrap();
    let view = large.i(1..3).unwrap();
    let locked = Locked::new(&view).unwrap();
    assert_eq!(locked.elements().unwrap().as_ptr(), address(&large).wrapping_add(3));
    let toy = Toy::new(DType::F32);
    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    gb.backward(&toy.losses(0), || toy.losses(100)[2].clone()).unwrap();
    assert_eq!(gb.copied(), 0);
}

/// The returned gradient is the memory that gradblend wrote to.
#[test]
fn candle_takes_over_the_memory_of_the_blend() {
    let var = Var::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let parameters = [passes::Parameter { name: "x".into(), var: var.clone() }];
    let (device, stream, mut copied) = (gradblend::Device::cpu(), cuda::stream(&Device::Cpu), 0);
    let (stream, copied) = (&stream, &mut copied);
    let mut call = Call { parameters: &parameters, losses: &[], device, stream, copied };
    let memory = call.memory(0).unwrap();
    let Storage::Cpu(storage) = &memory else { panic!("not on the CPU") };
    let before = storage.as_slice::<f32>().unwrap().as_ptr();
    let store = call.output(vec![Some(memory)]).unwrap();
    assert_eq!(address(store.get(&var).unwrap()), before);
}

/// Losses of one call may differ in their dtypes, as those of heads with mixed precision do.
#[test]
fn losses_of_several_dtypes() {
    let toy = Toy::new(DType::F32);
    let mut gb = GradBlend::new(&toy.vars, config().every(2)).unwrap();
    for step in 0..2 {
        let [a, b, fused] = toy.losses(step);
        let plain = toy.losses(step);
        let weights = gb.weights().to_vec();
        let losses = [a.to_dtype(DType::F64).unwrap(), b.to_dtype(DType::BF16).unwrap(), fused];
        let blended = gb.backward(&losses, || toy.losses(100)[2].clone()).unwrap();
        let terms = plain.iter().zip(&weights).map(|(loss, w)| (loss * f64::from(*w)).unwrap());
        let plain = terms.reduce(|a, b| (a + b).unwrap()).unwrap().backward().unwrap();
        for i in 0..toy.vars.len() {
            for (got, expected) in toy.values(&blended, i).into_iter().zip(toy.values(&plain, i)) {
                assert!((got - expected).abs() < 1e-2, "step {step}, parameter {i}: {got}, expected {expected}");
            }
        }
    }
}

fn address(tensor: &Tensor) -> *const f32 {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    storage.as_slice::<f32>().unwrap().as_ptr()
}

#[test]
fn errors_name_the_loss_and_the_parameter_and_change_nothing() {
    let toy = Toy::new(DType::F32);
    let message = |config, vars: &[Var]| GradBlend::new(vars, config).unwrap_err().to_string();
    assert_eq!(message(GradBlendConfig::new(0), &toy.vars), "expected 1 to 32 modalities, got 0");
    assert_eq!(message(config().every(0), &toy.vars), "every is 0, expected at least 1");
    assert_eq!(message(config(), &[]), "there is no parameter to train");
    let wrong = Var::zeros(3, DType::F64, &Device::Cpu).unwrap();
    let expected = "parameter 1 is f64 on Cpu, expected f32, f16 or bf16";
    assert_eq!(message(config(), &[toy.vars[0].clone(), wrong.clone()]), expected);
    let named = GradBlend::named([("audio.weight".to_owned(), wrong)], config()).unwrap_err();
    assert!(named.to_string().starts_with("audio.weight is f64"), "{named}");

    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    gb.backward(&toy.losses(0), || toy.losses(100)[2].clone()).unwrap();
    let before = gb.save().unwrap();
    let losses = toy.losses(1);
    let held_out = || toy.losses(101)[2].clone();
    let [a, b, fused] = losses.clone();
    let vector = toy.vars[0].flatten_all().unwrap();
    let constant = Tensor::zeros((), DType::F32, &Device::Cpu).unwrap();
    for (losses, expected) in [
        (vec![a.clone(), b.clone()], "there are 2 losses, expected 3"),
        (
            vec![a.clone(), vector.clone(), fused.clone()],
            "losses[1] is of shape [35], expected a floating-point scalar",
        ),
        (
            vec![a.clone(), b.clone(), fused.to_dtype(DType::U32).unwrap()],
            "losses[2] is u32, expected a floating-point scalar",
        ),
        (vec![constant.clone(), b.clone(), fused.clone()], "losses[0] reaches no parameter"),
        (vec![a.detach(), b, fused], "losses[0] reaches no parameter"),
    ] {
        assert_eq!(gb.backward(&losses, held_out).unwrap_err().to_string(), expected);
    }
    let unreached = gb.backward(&losses, || constant.clone()).unwrap_err();
    assert_eq!(unreached.to_string(), "the held-out loss reaches no parameter");
    let shape = gb.backward(&losses, || vector.clone()).unwrap_err();
    assert_eq!(shape.to_string(), "the held-out loss is of shape [35], expected a floating-point scalar");
    let failed = gb.backward(&losses, || Err::<Tensor, _>("no batch is left")).unwrap_err();
    assert_eq!(failed.to_string(), "the held-out loss: no batch is left");
    let candle = gb.backward(&losses, || vector.matmul(&vector)).unwrap_err();
    assert!(matches!(candle, Error::Closure { loss: Loss::HeldOut, .. }), "{candle}");
    assert_eq!(gb.save().unwrap(), before);
    gb.backward(&losses, held_out).unwrap();
    assert_eq!(gb.report().unwrap().observed, 2);
}
