//! The library against plain recomputation from candle's own gradients.

use candle_core::{DType, Device, IndexOp};
use gradblend::{Average, Cadence, Policy, solve};

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

fn config() -> Config {
    Config { average: Average::Mean, cadence: Cadence::EveryObservation, ..Config::new(3) }
}

/// Weights and blended gradients equal those recomputed in f64 from the same gradients, at each of several steps.
fn recompute(dtype: DType, epsilon: f64, independent: bool) {
    let toy = Toy::new(dtype);
    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    let (mut m, mut s, mut w) = ([0.0; 3], [0.0; 9], vec![1.0 / 3.0; 3]);
    for step in 0..4 {
        let (losses, valid) = (toy.stores(step), toy.fused(step + 100));
        let train = independent.then(|| toy.fused(step + 50));
        let blended = gb.step(&losses, train.as_ref(), &valid).unwrap();
        let (mut c, mut d) = ([0.0; 3], [0.0; 3]);
        for i in 0..toy.vars.len() {
            let v: Vec<_> = losses.iter().map(|store| toy.values(store, i)).collect();
            let (t, g) = (toy.values(train.as_ref().unwrap_or(&losses[2]), i), toy.values(&valid, i));
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
fn the_weighted_loss_has_the_blended_gradient() {
    let toy = Toy::new(DType::F32);
    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    gb.step(&toy.stores(0), None, &toy.fused(100)).unwrap();
    let losses = toy.losses(1);
    let plain = weighted_loss(&losses.map(Some), gb.weights()).unwrap().backward().unwrap();
    let blended = gb.step(&toy.stores(1), None, &toy.fused(101)).unwrap();
    for i in 0..toy.vars.len() {
        for (got, expected) in toy.values(&blended, i).into_iter().zip(toy.values(&plain, i)) {
            assert!((got - expected).abs() < 1e-6, "parameter {i}: {got}, expected {expected}");
        }
    }
}

#[test]
fn gradients_are_read_where_they_are() {
    // A view into the middle of a larger buffer, so that a copy would have another address than the view's.
    let var = Var::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let large = Tensor::arange(0.0_f32, 12.0, &Device::Cpu).unwrap().reshape((4, 3)).unwrap();
    let view = large.i(1..3).unwrap();
    let mut store = GradStore::default();
    store.insert(&var, view);
    let gradient = Gradient::find(&store, &var, 0, Role::Train).unwrap().unwrap();
    assert_eq!(gradient.elements::<f32>().unwrap().as_ptr(), address(&large).wrapping_add(3));
    // The blended gradient is the buffer that gradblend wrote to.
    let blended = zeros(&var);
    let before = blended.as_slice::<f32>().unwrap().as_ptr();
    assert_eq!(address(&to_tensor(blended, var.shape()).unwrap()), before);
}

fn address(tensor: &Tensor) -> *const f32 {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    storage.as_slice::<f32>().unwrap().as_ptr()
}

#[test]
fn a_super_epoch_ends_with_a_reset() {
    let toy = Toy::new(DType::F32);
    let mut gb = GradBlend::new(&toy.vars, Config::new(3)).unwrap();
    gb.step(&toy.stores(0), None, &toy.fused(100)).unwrap();
    assert_eq!(gb.weights(), [1.0 / 3.0; 3]);
    gb.reweight().unwrap();
    let weights = gb.weights().to_vec();
    assert_ne!(weights, [1.0 / 3.0; 3]);
    gb.reset().unwrap();
    assert_eq!(gb.report().unwrap().observed, 0);
    assert_eq!(gb.weights(), weights);
}

#[test]
fn errors_name_the_parameter_and_change_nothing() {
    let toy = Toy::new(DType::F32);
    let message = |config, vars: &[Var]| GradBlend::new(vars, config).unwrap_err().to_string();
    assert_eq!(message(Config::new(0), &toy.vars), "expected 1 to 32 modalities, got 0");
    let wrong = Var::zeros(3, DType::F64, &Device::Cpu).unwrap();
    let expected = "parameter 1 is f64, expected f32, f16 or bf16";
    assert_eq!(message(Config::new(3), &[toy.vars[0].clone(), wrong]), expected);

    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    let valid = toy.fused(100);
    let strided = Tensor::zeros((7, 5), DType::F32, &Device::Cpu).unwrap().t().unwrap();
    let cases = [
        (strided, "parameter 0: gradient of modality 0 is not contiguous"),
        (toy.vars[0].flatten_all().unwrap(), "parameter 0: gradient of modality 0 has shape [35], expected [5, 7]"),
        (toy.vars[0].to_dtype(DType::F16).unwrap(), "parameter 0: gradient of modality 0 is f16, expected f32"),
    ];
    for (gradient, expected) in cases {
        let mut losses = toy.stores(0);
        losses[0].insert(&toy.vars[0], gradient);
        assert_eq!(gb.step(&losses, None, &valid).unwrap_err().to_string(), expected);
    }
    let short = gb.step(&toy.stores(0)[1..], None, &valid).unwrap_err();
    assert_eq!(short.to_string(), "expected 3 losses, got 2");
    let unpaired = gb.step(&toy.stores(0), None, &GradStore::default()).unwrap_err();
    assert!(matches!(unpaired, Error::Blend(gradblend::Error::Unpaired { tensor: 0, .. })), "{unpaired}");
    assert_eq!(gb.report().unwrap().observed, 0);
    gb.step(&toy.stores(0), None, &valid).unwrap();
    assert_eq!(gb.report().unwrap().observed, 1);
}

#[test]
fn a_weighted_loss_needs_the_losses_with_weight() {
    let losses = Toy::new(DType::F32).losses(0).map(Some);
    let message = |losses: &[Option<Tensor>], weights: &[f32]| weighted_loss(losses, weights).unwrap_err().to_string();
    assert_eq!(message(&losses, &[1.0]), "expected 1 losses, got 3");
    assert_eq!(message(&losses, &[0.0; 3]), "all weights are 0");
    assert_eq!(message(&[None], &[0.5]), "loss 0 has the weight 0.5 and is absent");
    assert!(weighted_loss(&[None, losses[1].clone()], &[0.0, 1.0]).is_ok());
}
