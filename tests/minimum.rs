//! `solve` finds the constrained minimum of OGR^2: enumeration of all active sets, Karush-Kuhn-Tucker conditions, and
//! properties, on random problems.

use gradblend::{Flags, MAX_MODALITIES, Negative, Overfitting, Policy, Solution};
use gradblend_testkit::{Face, Outcome, Random};

gradblend_testkit::tests! {
    host:
        enumeration,
        optimality,
        properties,
        signed_weights;
}

/// A problem: m, S, and how to solve it.
#[derive(Clone, Debug)]
struct Problem {
    k: usize,
    m: Vec<f64>,
    s: Vec<f64>,
    policy: Policy,
}

impl Problem {
    /// S is a mean of outer products, of full rank or not, and scaled unevenly in some problems.
    fn random(random: &mut Random, largest: usize, negative: Negative) -> Self {
        let k = 1 + random.below(largest);
        let shift = random.pick(&[0.0, 0.3, 0.8]);
        let vectors = random.pick(&[2 * k, 3 * k, k, k.div_ceil(2)]);
        let scales: Vec<f64> = match random.below(4) {
            0 => (0..k).map(|_| 2.0_f64.powi(random.below(5) as i32)).collect(),
            1 => (0..k).map(|_| 10.0_f64.powi(random.below(13) as i32 - 6)).collect(),
            _ => vec![1.0; k],
        };
        let mut m: Vec<f64> = random.numbers(k).iter().zip(&scales).map(|(m, scale)| (m + shift) * scale).collect();
        let mut s = vec![0.0; k * k];
        for _ in 0..vectors {
            let d: Vec<f64> = scales.iter().map(|scale| scale * random.number()).collect();
            s.iter_mut().enumerate().for_each(|(i, s)| *s += d[i / k] * d[i % k] / vectors as f64);
        }
        if random.below(8) == 0 {
            // Ties, and modalities that are equal.
            let (i, j) = (random.below(k), random.below(k));
            m[i] = m[j];
            (0..k).for_each(|l| s[i * k + l] = s[j * k + l]);
            (0..k).for_each(|l| s[l * k + i] = s[l * k + j]);
        }
        if random.below(8) == 0 {
            let i = random.below(k);
            (0..k).for_each(|l| (s[i * k + l], s[l * k + i]) = (0.0, 0.0));
        }
        let overfitting = random.pick(&[Overfitting::Uncorrelated, Overfitting::Correlated, Overfitting::Correlated]);
        let damping = random.pick(&[1e-12, 1e-12, 1e-3, 0.25]);
        let mut min_weight = [0.0; MAX_MODALITIES];
        if negative == Negative::Clamp && random.below(2) == 0 {
            let total = random.pick(&[0.1, 0.5, 0.9, 0.999, 1.0 - 1e-6, 1.0 - 1e-9, 1.0 - 1e-12]);
            let parts: Vec<f64> = (0..k).map(|_| f64::max(random.number(), 0.0)).collect();
            let sum: f64 = parts.iter().sum();
            parts.iter().zip(&mut min_weight).filter(|_| sum > 0.0).for_each(|(part, f)| *f = part / sum * total);
        }
        Problem { k, m, s, policy: Policy { overfitting, negative, damping, min_weight } }
    }

    /// Q: S or its diagonal, with the damping.
    fn q(&self) -> Vec<f64> {
        let k = self.k;
        let damping = self.policy.damping * (0..k).map(|i| self.s[i * k + i]).sum::<f64>() / k as f64;
        let entry = |i: usize| {
            let (row, column) = (i / k, i % k);
            if row == column {
                self.s[i] + damping
            } else if self.policy.overfitting == Overfitting::Correlated {
                self.s[i]
            } else {
                0.0
            }
        };
        (0..k * k).map(entry).collect()
    }

    fn solve(&self, face: Face) -> std::result::Result<Solution, Box<dyn std::error::Error>> {
        Ok(face.solve(&self.m, &self.s, &self.policy)?)
    }

    /// w'Qw and w'm.
    fn value(&self, w: &[f64]) -> (f64, f64) {
        let (k, q) = (self.k, self.q());
        let gain = w.iter().zip(&self.m).map(|(w, m)| w * m).sum::<f64>();
        ((0..k * k).map(|i| w[i / k] * w[i % k] * q[i]).sum(), gain)
    }

    /// The largest gain of weights within the bounds, relative to its terms: that of a corner.
    fn largest_gain(&self) -> f64 {
        let f = &self.policy.min_weight[..self.k];
        let left = 1.0 - f.iter().sum::<f64>();
        let common: f64 = f.iter().zip(&self.m).map(|(f, m)| f * m).sum();
        let size: f64 = f.iter().zip(&self.m).map(|(f, m)| (f * m).abs()).sum();
        let corner = |m: &f64| (left * m + common) / (left * m.abs() + size);
        self.m.iter().map(corner).fold(f64::NEG_INFINITY, f64::max)
    }
}

/// Solution of a linear system by Gaussian elimination with pivoting; `None` if it is singular.
fn eliminate(mut a: Vec<Vec<f64>>) -> Option<Vec<f64>> {
    let n = a.len();
    // Equilibrated, so that pivots compare.
    for row in &mut a {
        let largest = row[..n].iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        row.iter_mut().for_each(|x| *x /= largest);
    }
    for i in 0..n {
        let pivot = (i..n).max_by(|x, y| a[*x][i].abs().total_cmp(&a[*y][i].abs()))?;
        if a[pivot][i].is_nan() || a[pivot][i].abs() <= 1e-13 {
            return None;
        }
        a.swap(i, pivot);
        let top = a[i].clone();
        for row in a.iter_mut().skip(i + 1) {
            let factor = row[i] / top[i];
            row.iter_mut().zip(&top).for_each(|(x, t)| *x -= factor * t);
        }
    }
    let mut x = vec![0.0; n];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| a[i][j] * x[j]).sum();
        x[i] = (a[i][n] - known) / a[i][i];
    }
    Some(x)
}

/// The least OGR^2 by enumeration of the modalities at their bounds. For each set: v = w / (w'm) minimises v'Qv under
/// m'v = 1 and v_k = f_k sum v in the set, a linear system of v and its multipliers.
fn enumerate(problem: &Problem) -> f64 {
    let (k, q, m, f) = (problem.k, problem.q(), &problem.m, &problem.policy.min_weight);
    let mut least = f64::INFINITY;
    for set in 0..(1_u32 << k) - 1 {
        let bound: Vec<usize> = (0..k).filter(|i| set >> i & 1 == 1).collect();
        let n = k + 1 + bound.len();
        let constraint = |c: usize, i: usize| match c {
            0 => m[i],
            c => f64::from(u8::from(bound[c - 1] == i)) - f[bound[c - 1]],
        };
        let mut rows = vec![vec![0.0; n + 1]; n];
        for i in 0..k {
            for j in 0..k {
                rows[i][j] = q[i * k + j];
            }
            for c in 0..=bound.len() {
                rows[i][k + c] = constraint(c, i);
                rows[k + c][i] = constraint(c, i);
            }
        }
        rows[k][n] = 1.0;
        let Some(v) = eliminate(rows) else { continue };
        let sum: f64 = v[..k].iter().sum();
        let feasible = |i: usize| set >> i & 1 == 1 || v[i] >= f[i] * sum;
        if sum > 0.0 && (0..k).all(feasible) {
            // Exactly within the bounds: f, and a share of the rest.
            let slack: Vec<f64> = (0..k).map(|i| if set >> i & 1 == 1 { 0.0 } else { v[i] - f[i] * sum }).collect();
            let (rest, left) = (slack.iter().sum::<f64>(), 1.0 - f.iter().sum::<f64>());
            let w: Vec<f64> = slack.iter().zip(f).map(|(slack, f)| f + left * slack / rest).collect();
            let (variance, gain) = problem.value(&w);
            if gain > 0.0 {
                least = least.min(variance / (gain * gain));
            }
        }
    }
    least
}

/// Checks that weights are within their bounds and sum to 1.
#[track_caller]
fn check_bounds(problem: &Problem, w: &[f64]) {
    let sum: f64 = w.iter().sum();
    assert!((sum - 1.0).abs() < 1e-14 * problem.k as f64, "{problem:?}: the weights sum to {sum}");
    assert!(w.iter().zip(problem.policy.min_weight).all(|(w, f)| *w >= f), "{problem:?}: {w:?}");
}

/// No active set gives a smaller OGR, and the weights are held exactly if none gives any.
fn enumeration(face: Face) -> Outcome {
    let mut random = Random(71);
    let (mut held, mut clamped, mut floored, mut equal) = (0, 0, 0, 0);
    for round in 0..6000 {
        let problem = Problem::random(&mut random, if round % 20 == 0 { 8 } else { 5 }, Negative::Clamp);
        let solution = problem.solve(face)?;
        let possible = problem.largest_gain();
        if possible.abs() < 1e-12 {
            continue;
        }
        assert_eq!(solution.flags.contains(Flags::HELD), possible < 0.0, "{problem:?}");
        held += usize::from(possible < 0.0);
        clamped += usize::from(solution.flags.contains(Flags::CLAMPED));
        floored += usize::from(solution.flags.contains(Flags::FLOORED));
        let Some(w) = &solution.weights else { continue };
        check_bounds(&problem, w);
        let (variance, gain) = problem.value(w);
        let (got, want) = (variance / (gain * gain), enumerate(&problem));
        // Where directions do not overfit, OGR is 0 up to rounding.
        let roots: f64 = w.iter().enumerate().map(|(i, w)| w * problem.q()[i * problem.k + i].sqrt()).sum();
        let rounding = 64.0 * f64::EPSILON * roots * roots / (gain * gain);
        assert!(
            gain > 0.0 && got <= want * (1.0 + 1e-9) + rounding,
            "{problem:?}: OGR^2 of {w:?} is {got}, expected {want}"
        );
        assert!(!solution.flags.contains(Flags::INEXACT), "{problem:?}");
        // The enumeration leaves out singular systems; where it has the minimum, both have it.
        equal += usize::from((got - want).abs() <= 1e-9 * want + rounding);
    }
    assert!(held > 100 && clamped > 500 && floored > 500 && equal > 4000, "{held}, {clamped}, {floored}, {equal}");
    Ok(())
}

/// Karush-Kuhn-Tucker conditions. Half the gradient of OGR^2, times (w'm)^3, is g = Qw (w'm) - m (w'Qw): it is the same for
/// all modalities above their bound, and not smaller for those at it.
fn optimality(face: Face) -> Outcome {
    let mut random = Random(72);
    let problems = if face.c { 5_000 } else { 100_000 };
    let (mut worst, mut solved, mut told) = (0.0_f64, 0, 0);
    for round in 0..problems {
        let largest = if round % 10 == 0 { MAX_MODALITIES } else { 6 };
        let problem = Problem::random(&mut random, largest, Negative::Clamp);
        let solution = problem.solve(face)?;
        assert!(!solution.flags.contains(Flags::INEXACT), "{problem:?}");
        let Some(w) = &solution.weights else {
            assert!(problem.largest_gain() < 1e-12, "{problem:?}");
            continue;
        };
        check_bounds(&problem, w);
        solved += 1;
        let (k, q, (variance, gain)) = (problem.k, problem.q(), problem.value(w));
        let (mut g, mut size) = (vec![0.0; k], vec![0.0; k]);
        let gain_size: f64 = w.iter().zip(&problem.m).map(|(w, m)| (w * m).abs()).sum();
        let variance_size: f64 = (0..k * k).map(|i| (w[i / k] * w[i % k] * q[i]).abs()).sum();
        for i in 0..k {
            let row: f64 = (0..k).map(|j| q[i * k + j] * w[j]).sum();
            let row_size: f64 = (0..k).map(|j| (q[i * (k + 1)] * q[j * (k + 1)]).sqrt() * w[j]).sum();
            g[i] = row * gain - problem.m[i] * variance;
            size[i] = row_size * gain_size + problem.m[i].abs() * variance_size;
        }
        let at_bound = |i: usize| w[i] <= problem.policy.min_weight[i];
        // w'g = 0, so with weights at a bound of 0 the common value is 0; else it is that of a weight above its bound.
        let Some(free) = (0..k).filter(|i| !at_bound(*i)).min_by(|i, j| size[*i].total_cmp(&size[*j])) else {
            continue;
        };
        let floors = problem.policy.min_weight.iter().any(|f| *f > 0.0);
        let (common, common_size) = if floors { (g[free], size[free]) } else { (0.0, 0.0) };
        for i in 0..k {
            let residual = if at_bound(i) { f64::min(g[i] - common, 0.0) } else { g[i] - common };
            worst = worst.max(residual.abs() / (size[i] + common_size));
        }
        // The flags tell of weights at a bound that have a multiplier.
        let multiplier = |i: usize| (g[i] - common) / (size[i] + common_size);
        for (flag, floor) in [(Flags::CLAMPED, false), (Flags::FLOORED, true)] {
            let bound = || (0..k).filter(|i| at_bound(*i) && (problem.policy.min_weight[*i] > 0.0) == floor);
            let certain = bound().any(|i| multiplier(i) > 1e-9);
            let possible = bound().any(|i| multiplier(i) > -1e-9);
            let set = solution.flags.contains(flag);
            assert!(if set { possible } else { !certain }, "{flag:?} is {set}: {problem:?}");
            told += usize::from(certain);
        }
    }
    assert!(worst < 1e-9 && solved > problems / 2, "the largest residual is {worst}, of {solved} problems");
    assert!(told > problems / 4, "{told}");
    println!("largest residual {worst:e} in {solved} problems");
    Ok(())
}

/// Scaling and permuting change nothing, nor does what is not used of S.
fn properties(face: Face) -> Outcome {
    let mut random = Random(73);
    for round in 0..2000 {
        let negative = if round % 4 == 0 { Negative::Signed } else { Negative::Clamp };
        let mut problem = Problem::random(&mut random, if round % 10 == 0 { 32 } else { 6 }, negative);
        // Well-conditioned, so that rounding does not decide.
        problem.policy.damping = f64::max(problem.policy.damping, 1e-3);
        if problem.largest_gain().abs() < 1e-9 {
            continue;
        }
        let k = problem.k;
        let solution = problem.solve(face)?;
        let same = |other: Problem, order: &[usize], what: &str| -> Outcome {
            let got = other.solve(face)?;
            let (Some(w), Some(other)) = (&solution.weights, &got.weights) else {
                assert_eq!(got.weights.is_some(), solution.weights.is_some(), "{what}: {problem:?}");
                return Ok(());
            };
            let size = w.iter().fold(1.0, |max: f64, w| max.max(w.abs()));
            let close = |(i, o): (usize, &usize)| (other[i] - w[*o]).abs() < 1e-7 * size * size;
            assert!(order.iter().enumerate().all(close), "{what}: {w:?}, {other:?}, {problem:?}");
            assert_eq!(got.flags, solution.flags, "{what}: {problem:?}");
            Ok(())
        };
        let identity: Vec<usize> = (0..k).collect();
        for scale in [1e-140, 1e-15, 1e75, 1e140] {
            let mut scaled = problem.clone();
            scaled.m.iter_mut().for_each(|m| *m *= scale);
            scaled.s.iter_mut().for_each(|s| *s *= scale * scale / 10.0);
            same(scaled, &identity, "scaled")?;
        }
        let order: Vec<usize> = (0..k).map(|i| (i + 1 + round % k) % k).collect();
        let mut permuted = problem.clone();
        permuted.m = order.iter().map(|i| problem.m[*i]).collect();
        permuted.s = (0..k * k).map(|i| problem.s[order[i / k] * k + order[i % k]]).collect();
        order.iter().enumerate().for_each(|(i, o)| permuted.policy.min_weight[i] = problem.policy.min_weight[*o]);
        same(permuted, &order, "permuted")?;
        let mut unused = problem.clone();
        for (i, j) in (0..k).flat_map(|i| (0..i).map(move |j| (i, j))) {
            let change = random.number();
            unused.s[i * k + j] += change;
            unused.s[j * k + i] -= if problem.policy.overfitting == Overfitting::Correlated { change } else { 0.0 };
        }
        let size = problem.s.iter().fold(0.0, |max: f64, s| max.max(*s));
        if size > 1e-3 || problem.policy.overfitting == Overfitting::Uncorrelated {
            same(unused, &identity, "of another antisymmetric part")?;
        }
    }
    Ok(())
}

/// Q^-1 m by elimination, normalised.
fn signed_weights(face: Face) -> Outcome {
    let mut random = Random(74);
    let mut solved = 0;
    for _ in 0..2000 {
        let mut problem = Problem::random(&mut random, 12, Negative::Signed);
        problem.policy.damping = f64::max(problem.policy.damping, 1e-3);
        let (k, q) = (problem.k, problem.q());
        let rows = (0..k).map(|i| [&q[i * k..(i + 1) * k], &[problem.m[i]]].concat()).collect();
        let Some(a) = eliminate(rows) else { continue };
        let (sum, size) = a.iter().fold((0.0, 0.0), |(sum, size), a| (sum + a, size + a.abs()));
        if sum.abs() < 1e-6 * size {
            continue;
        }
        let solution = problem.solve(face)?;
        assert_eq!(solution.flags, if sum < 0.0 { Flags::HELD } else { Flags::empty() }, "{problem:?}");
        let close = |(w, a): (&f64, &f64)| (w - a / sum).abs() < 1e-9 * size / sum.abs() * size / sum.abs();
        assert!(solution.weights.iter().flatten().zip(&a).all(close), "{problem:?}: {:?}, {a:?}", solution.weights);
        solved += usize::from(sum > 0.0);
    }
    assert!(solved > 500, "{solved}");
    Ok(())
}
