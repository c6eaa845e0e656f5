//! The adapter against plain recomputation from PyTorch's own gradients.

use gradblend::{Average, Blender, Cadence, Config, Policy, Schedule, Stream, TensorGrads, solve};
use tch::{Device, Kind};

use super::*;

/// Two encoders and three heads: head 0 on modality 0, head 1 on both, and a parameter that no loss reaches.
struct Toy {
    vars: Vec<Tensor>,
}

impl Toy {
    fn new(kind: Kind) -> Self {
        let var = |shape: [i64; 2], phase: f64| {
            let values = (Tensor::arange(shape[0] * shape[1], (Kind::Double, Device::Cpu)) * 0.7 + phase).sin();
            values.reshape(shape).to_kind(kind).set_requires_grad(true)
        };
        // The first is used transposed, so its gradient is too.
        let vars = [([7, 5], 0.0), ([5, 3], 1.0), ([7, 1], 2.0), ([10, 1], 3.0), ([2, 2], 4.0)];
        Toy { vars: vars.map(|(shape, phase)| var(shape, phase)).into() }
    }

    /// L_0, L_1 and the fused loss on the batch of this number.
    fn losses(&self, batch: usize) -> [Tensor; 3] {
        let input = |phase: f64| {
            let values = Tensor::arange(20, (Kind::Double, Device::Cpu)) * 1.3 + batch as f64 * 0.9 + phase;
            values.cos().reshape([4, 5]).to_kind(self.vars[0].kind())
        };
        let first = input(0.0).matmul(&self.vars[0].tr()).tanh();
        let second = input(0.5).matmul(&self.vars[1]).tanh();
        let both = Tensor::cat(&[&first, &second], 1);
        let loss = |x: Tensor, target: f64| (x - target).square().mean(self.vars[0].kind());
        [
            loss(first.matmul(&self.vars[2]), 0.3),
            loss(second.sum_dim_intlist(1, true, None::<Kind>), -0.2),
            loss(both.matmul(&self.vars[3]), 0.6),
        ]
    }

    fn fused(&self, batch: usize) -> Tensor {
        let [.., fused] = self.losses(batch);
        fused
    }

    /// PyTorch's gradients of a loss; undefined where it does not reach a parameter.
    fn gradients(&self, loss: &Tensor) -> Vec<Tensor> {
        Tensor::run_backward(&[loss], &self.vars, true, false)
    }

    fn all(&self, batch: usize) -> Vec<Vec<Tensor>> {
        self.losses(batch).iter().map(|loss| self.gradients(loss)).collect()
    }

    /// A gradient as f64; zeros where there is none.
    fn values(&self, gradient: &Tensor, i: usize) -> Vec<f64> {
        let gradient = if gradient.defined() { gradient.shallow_clone() } else { self.vars[i].zeros_like() };
        Vec::try_from(gradient.to_kind(Kind::Double).reshape(-1)).unwrap()
    }

    fn clear(&self) {
        tch::no_grad(|| self.vars.iter().for_each(|var| var.shallow_clone().zero_grad()));
    }
}

fn config() -> GradBlendConfig {
    GradBlendConfig::new(3).average(Average::Mean).threads(2)
}

/// Weights and blended gradients equal those recomputed in f64 from the same gradients, at each of several steps.
fn recompute(kind: Kind, epsilon: f64, independent: bool) {
    let toy = Toy::new(kind);
    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    let (mut m, mut s, mut w) = ([0.0; 3], [0.0; 9], vec![1.0 / 3.0; 3]);
    for step in 0..4 {
        let (all, valid, train) =
            (toy.all(step), toy.gradients(&toy.fused(step + 100)), toy.gradients(&toy.fused(step + 50)));
        toy.clear();
        let losses = toy.losses(step);
        match independent {
            false => gb.backward(&losses, || toy.fused(step + 100)),
            true => gb.backward_with_train(&losses, || toy.fused(step + 100), || toy.fused(step + 50)),
        }
        .unwrap();
        let (mut c, mut d) = ([0.0; 3], [0.0; 3]);
        for i in 0..toy.vars.len() {
            let v: Vec<_> = all.iter().map(|gradients| toy.values(&gradients[i], i)).collect();
            let t = toy.values(if independent { &train[i] } else { &all[2][i] }, i);
            let g = toy.values(&valid[i], i);
            assert_eq!(toy.vars[i].grad().defined(), i < 4, "parameter {i}");
            for (e, got) in toy.values(&toy.vars[i].grad(), i).into_iter().enumerate() {
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
        }
        assert_eq!((report.observed, gb.observed()), (step as u64 + 1, true));
    }
    // Transposed, and the same in all passes.
    assert_eq!(gb.copied(), 0);
}

#[test]
fn weights_and_blended_gradients_equal_a_recomputation() {
    for independent in [false, true] {
        recompute(Kind::Float, f64::from(f32::EPSILON), independent);
        recompute(Kind::Half, 2.0_f64.powi(-10), independent);
        recompute(Kind::BFloat16, 2.0_f64.powi(-7), independent);
    }
}

/// Losses of elementwise operations alone: the bits of a matrix product can depend on where its operands are.
fn elementwise(vars: &[Tensor], batch: usize) -> [Tensor; 3] {
    let x = (Tensor::arange(35, (Kind::Float, Device::Cpu)) * 1.3 + batch as f64).cos().reshape([7, 5]);
    let (first, second) = ((&vars[0] * &x).tanh(), (vars[1].tr() * &x).tanh());
    [(&first - 0.3) * &vars[2], &second + 0.2, &first * &second - 0.6].map(|x| x.square().mean(Kind::Float))
}

#[test]
fn a_run_equals_the_raw_operations_bit_for_bit() {
    let vars = || {
        let var = |size: [i64; 2]| (Tensor::arange(35, (Kind::Float, Device::Cpu)) * 0.7).sin().reshape(size);
        [[7, 5], [5, 7], [7, 5]].map(|size| var(size).set_requires_grad(true))
    };
    let (own, other) = (vars(), vars());
    let mut gb = GradBlend::new(&own, config()).unwrap();
    let raw = Config { average: Average::Mean, cadence: Cadence::EveryObservation, ..Config::new(3) };
    let mut blender = Blender::new(&gradblend::Device::cpu(), raw).unwrap();
    // In the order of memory: the second parameter is used transposed, so its gradients are too.
    let flat = |gradient: &Tensor, i: usize| -> Option<Vec<f32>> {
        let gradient = gradient.defined().then(|| if i == 1 { gradient.tr() } else { gradient.shallow_clone() })?;
        Some(Vec::try_from(gradient.reshape(-1)).unwrap())
    };
    let gradients = |loss: &Tensor| Tensor::run_backward(&[loss], &other, true, false);
    for step in 0..6 {
        own.iter().for_each(|var| tch::no_grad(|| var.shallow_clone().zero_grad()));
        let [.., held_out] = elementwise(&own, step + 100);
        gb.backward(&elementwise(&own, step), || held_out).unwrap();
        let all = elementwise(&other, step).map(|loss| gradients(&loss));
        let valid = gradients(&elementwise(&other, step + 100)[2]);
        let rows = [0, 1, 2].map(|i| ([0, 1, 2].map(|k: usize| flat(&all[k][i], i)), flat(&valid[i], i)));
        let mut blended = [vec![0.0; 35], vec![0.0; 35], vec![0.0; 35]];
        let plan = blender.plan(rows.iter().zip(&mut blended).map(|((v, g), blended)| {
            let slices = [0, 1, 2].map(|k| v[k].as_deref());
            match (g, slices[2]) {
                (Some(g), Some(t)) => TensorGrads::new(t, g, &slices).blended(blended),
                _ => TensorGrads::blend_only(&slices).blended(blended),
            }
        }));
        blender.step(&plan.unwrap(), Stream::default()).unwrap();
        for i in 0..3 {
            let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let got = flat(&own[i].grad(), i).unwrap();
            assert_eq!(bits(got), bits(blended[i].clone()), "step {step}, parameter {i}");
            let gradient = Tensor::from_slice(&blended[i]).reshape([7, 5]);
            let gradient = if i == 1 { gradient.tr() } else { gradient };
            tch::no_grad(|| {
                let _ = own[i].shallow_clone().f_sub_(&(own[i].grad() * 0.1)).unwrap();
                let _ = other[i].shallow_clone().f_sub_(&(gradient * 0.1)).unwrap();
            });
        }
    }
    assert_eq!((gb.report().unwrap(), gb.copied()), (blender.report(Stream::default()).unwrap(), 0));
}

#[test]
fn other_calls_add_the_gradient_of_the_weighted_loss() {
    let toy = Toy::new(Kind::Float);
    let mut gb = GradBlend::new(&toy.vars[..3], config().every(3)).unwrap();
    gb.set_grad_scale(8.0).unwrap();
    let mut sums = vec![Vec::new(); 3];
    // Micro-batches: `.grad` is not cleared.
    for step in 0..3 {
        let weights = gb.weights().to_vec();
        let losses = toy.losses(step);
        let terms = losses.iter().zip(&weights).map(|(loss, w)| loss * f64::from(8.0 * w));
        let plain = toy.gradients(&terms.reduce(|a, b| a + b).unwrap());
        let mut asked = false;
        gb.backward(&losses, || {
            asked = true;
            toy.fused(100)
        })
        .unwrap();
        assert_eq!((asked, gb.observed()), (step == 0, step == 0));
        for (i, sum) in sums.iter_mut().enumerate() {
            sum.resize(toy.vars[i].numel(), 0.0);
            sum.iter_mut().zip(toy.values(&plain[i], i)).for_each(|(sum, x)| *sum += x);
            for (got, expected) in toy.values(&toy.vars[i].grad(), i).into_iter().zip(sum) {
                assert!((got - *expected).abs() < 1e-5, "step {step}, parameter {i}: {got}, expected {expected}");
            }
        }
    }
    // Only those that were given get gradients.
    assert!(!toy.vars[3].grad().defined());
    toy.clear();
    let mut gb = GradBlend::new(&toy.vars, config().schedule(Schedule::offline())).unwrap();
    gb.set_weights(&[0.0; 3]).unwrap();
    gb.backward(&toy.losses(0), || -> Tensor { unreachable!("no call observes") }).unwrap();
    assert!(toy.vars[0].grad().abs().sum(Kind::Float).double_value(&[]) == 0.0);
}

#[test]
fn grad_has_the_memory_of_the_blend_and_none_is_shared() {
    let var = || Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let (a, b) = (var(), var());
    let mut gb = GradBlend::new(&[a.shallow_clone(), b.shallow_clone()], GradBlendConfig::new(1).every(2)).unwrap();
    for _ in 0..2 {
        // The gradients of both terms of a sum are one tensor.
        let loss = || (&a + &b).square().sum(Kind::Float);
        gb.backward(&[loss()], loss).unwrap();
        let [a_grad, b_grad] = [&a, &b].map(|var| var.grad());
        assert_ne!(a_grad.data_ptr(), b_grad.data_ptr(), "observed {}", gb.observed());
        let _ = a_grad.shallow_clone().zero_();
        assert_eq!(b_grad.sum(Kind::Float).double_value(&[]), 64.0);
        for mut var in [a.grad(), b.grad()] {
            let _ = var.zero_();
        }
    }
    // The same where both are made by a call that does not observe.
    let (c, d) = (var(), var());
    let offline = GradBlendConfig::new(1).schedule(Schedule::offline());
    let mut gb_offline = GradBlend::new(&[c.shallow_clone(), d.shallow_clone()], offline).unwrap();
    gb_offline.backward(&[(&c + &d).square().sum(Kind::Float)], || -> Tensor { unreachable!("offline") }).unwrap();
    assert_ne!(c.grad().data_ptr(), d.grad().data_ptr());
    assert_eq!([&c, &d].map(|var| var.grad().double_value(&[3, 3])), [4.0; 2]);
    // The graph of the fused loss is freed.
    let loss = (&a + &b).square().sum(Kind::Float);
    let mut other = GradBlend::new(&[a.shallow_clone(), b.shallow_clone()], GradBlendConfig::new(1)).unwrap();
    other.backward(&[loss.shallow_clone()], || (&a + &b).square().sum(Kind::Float)).unwrap();
    assert!(loss.f_backward().is_err());
    // `.grad` has the memory of the blend, whatever its size.
    let parameters = [7, 1, 0, 5, 900].map(|size| {
        let var = Tensor::ones([size], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        passes::Parameter::new(format!("of {size}"), var)
    });
    let given: Vec<_> = parameters.iter().map(|parameter| Some(parameter.var.detach() * 3.0)).collect();
    let addresses: Vec<_> = given.iter().flatten().map(Tensor::data_ptr).collect();
    let (losses, mut copied) = ([], 0);
    let device = gradblend::Device::cpu();
    let mut call = Call::new(device, &parameters, vec![true; 5], &losses, &mut copied);
    gradblend::trainer::Passes::output(&mut call, given).unwrap();
    for (parameter, address) in parameters.iter().zip(addresses) {
        let grad = parameter.var.grad();
        assert_eq!((grad.data_ptr(), grad.size()), (address, parameter.var.size()));
        assert!(Vec::<f32>::try_from(grad).unwrap().iter().all(|x| *x == 3.0));
    }
    // A gradient that is not dense is copied.
    let before = gb.copied();
    let loss = || a.sum(Kind::Float) + b.square().sum(Kind::Float);
    gb.backward(&[loss()], loss).unwrap();
    assert_eq!(gb.copied(), before + 2);
}

#[test]
fn a_parameter_given_twice_counts_once_and_a_frozen_one_is_left_alone() {
    let toy = Toy::new(Kind::Float);
    let handles = || toy.vars.iter().map(Tensor::shallow_clone);
    let twice: Vec<Tensor> = handles().chain(handles()).collect();
    let run = |vars: &[Tensor]| {
        toy.clear();
        let mut gb = GradBlend::new(vars, config()).unwrap();
        gb.backward(&toy.losses(0), || toy.fused(100)).unwrap();
        (gb.report().unwrap(), toy.values(&toy.vars[0].grad(), 0))
    };
    assert_eq!(run(&twice), run(&toy.vars));
    // Two leaves of one memory are two parameters.
    let leaf = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let other = leaf.detach().set_requires_grad(true);
    let both = [leaf.shallow_clone(), other.shallow_clone(), leaf.shallow_clone()];
    let mut gb = GradBlend::new(&both, GradBlendConfig::new(1)).unwrap();
    let loss = || (&leaf * 2.0 + &other).sum(Kind::Float);
    gb.backward(&[loss()], loss).unwrap();
    assert_eq!([&leaf, &other].map(|var| var.grad().double_value(&[0])), [2.0, 1.0]);
    // Frozen at first, and later.
    toy.clear();
    let _ = toy.vars[0].set_requires_grad(false);
    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    let _ = toy.vars[0].set_requires_grad(true);
    let _ = toy.vars[1].set_requires_grad(false);
    gb.backward(&toy.losses(0), || toy.fused(100)).unwrap_err(); // the second loss has no graph now
    let [first, _, fused] = toy.losses(0);
    gb.backward(&[first.shallow_clone(), first, fused], || toy.fused(100)).unwrap();
    let touched = [0, 1].map(|i| toy.values(&toy.vars[i].grad(), i).into_iter().any(|x| x != 0.0));
    assert_eq!(touched, [true, false]);
}

#[test]
fn errors_name_the_loss_and_the_parameter_and_change_nothing() {
    let toy = Toy::new(Kind::Float);
    let message = |config, vars: &[Tensor]| GradBlend::new(vars, config).unwrap_err().to_string();
    assert_eq!(message(GradBlendConfig::new(0), &toy.vars), "expected 1 to 32 modalities, got 0");
    assert_eq!(message(config().every(0), &toy.vars), "every is 0, expected at least 1");
    assert_eq!(message(config(), &[]), "there is no parameter to train");
    let wrong = Tensor::zeros([3], (Kind::Double, Device::Cpu)).set_requires_grad(true);
    let expected = "parameter 1 is Double on Cpu, expected f32, f16 or bf16";
    assert_eq!(message(config(), &[toy.vars[0].shallow_clone(), wrong]), expected);
    let computed = GradBlend::named([("audio.weight".to_owned(), &toy.vars[0] * 2.0)], config()).unwrap_err();
    let expected = "audio.weight is Float on Cpu, no leaf, expected a leaf, which is not computed from other tensors";
    assert_eq!(computed.to_string(), expected);

    let mut gb = GradBlend::new(&toy.vars, config()).unwrap();
    gb.backward(&toy.losses(0), || toy.fused(100)).unwrap();
    let before = gb.save().unwrap();
    let gradients = || toy.vars.iter().enumerate().map(|(i, var)| toy.values(&var.grad(), i)).collect::<Vec<_>>();
    let before_errors = gradients();
    let vector = || toy.vars[0].reshape(-1);
    let other = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let constant = || other.sum(Kind::Float);
    for (change, expected) in [
        (None, "there are 2 losses, expected 3"),
        (Some((1, vector())), "losses[1] is of size [35], expected a floating-point scalar with a graph"),
        (Some((2, Tensor::from(1_i64))), "losses[2] is Int64, expected a floating-point scalar with a graph"),
        (
            Some((0, toy.fused(1).detach())),
            "losses[0] is without a graph, expected a floating-point scalar with a graph",
        ),
        (Some((0, constant())), "losses[0] reaches no parameter"),
    ] {
        let mut losses = Vec::from(toy.losses(1));
        match change {
            Some((k, loss)) => losses[k] = loss,
            None => losses.truncate(2),
        }
        assert_eq!(gb.backward(&losses, || toy.fused(101)).unwrap_err().to_string(), expected);
    }
    assert_eq!(gradients(), before_errors);
    // A `.grad` that cannot be added to is found before any pass.
    let var = toy.vars[3].shallow_clone();
    let mut expanded = GradBlend::new(&[var], config()).unwrap();
    toy.vars[3].grad().set_data(&Tensor::ones([1, 1], (Kind::Float, Device::Cpu)).expand([10, 1], false));
    let error = expanded.backward(&toy.losses(1), || toy.fused(101)).unwrap_err().to_string();
    assert_eq!(error, "parameter 0.grad is Float [10, 1] on Cpu, expanded, expected Float [10, 1] on Cpu");
    toy.vars[3].grad().set_data(&Tensor::zeros([10, 1], (Kind::Float, Device::Cpu)));
    for (held_out, expected) in [
        (Ok(constant()), "the held-out loss reaches no parameter"),
        (Ok(vector()), "the held-out loss is of size [35], expected a floating-point scalar with a graph"),
        (Err("no batch is left"), "the held-out loss: no batch is left"),
    ] {
        assert_eq!(gb.backward(&toy.losses(1), || held_out).unwrap_err().to_string(), expected);
    }
    let losses = toy.losses(1);
    let panicked = tch::no_grad(|| {
        let call = || gb.backward(&losses, || -> Tensor { panic!("in held_out") });
        let panicked = catch_unwind(AssertUnwindSafe(call)).is_err();
        panicked && !(&toy.vars[0] * 2.0).requires_grad()
    });
    assert!(panicked, "gradients are switched on after a panic");
    let used = toy.losses(1);
    used[0].backward();
    toy.clear();
    let freed = gb.backward(&used, || toy.fused(101)).unwrap_err().to_string();
    assert!(freed.starts_with("losses[0]: ") && freed.contains("second time"), "{freed}");
    assert_eq!(gb.save().unwrap(), before);
    toy.clear();
    gb.backward(&toy.losses(0), || toy.fused(100)).unwrap();
    assert_eq!(gb.report().unwrap().observed, 2);
}
