//! `solve` and `reweight`: closed forms, published weights, a naive solver, and the theorem behind them.

use std::ptr::null;

use gradblend::{Average, Cadence, Config, Error, Flags, Negative, Overfitting, Policy, Solution, solve};
use gradblend_testkit::proptest::prelude::*;
use gradblend_testkit::{Face, Outcome, Random, property, rejected};

gradblend_testkit::tests! {
    once:
        reweight_is_solve,
        too_few_observations_solve_uncorrelated,
        nothing_to_go_by_keeps_the_weights,
        cadence;
    host:
        closed_forms,
        random_problems,
        invalid_input;
}

const CLAMP: Policy = Policy { overfitting: Overfitting::Uncorrelated, negative: Negative::Clamp, damping: 1e-12 };
const SIGNED: Policy = Policy { negative: Negative::Signed, ..CLAMP };
const CORRELATED: Policy = Policy { overfitting: Overfitting::Correlated, ..CLAMP };
const BOTH: Policy = Policy { overfitting: Overfitting::Correlated, ..SIGNED };
const ALL: &[Policy] = &[CLAMP, SIGNED, CORRELATED, BOTH];

fn diagonal(sigma2: &[f64]) -> Vec<f64> {
    let k = sigma2.len();
    (0..k * k).map(|i| if i / k == i % k { sigma2[i / k] } else { 0.0 }).collect()
}

#[track_caller]
fn close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{got:?} against {want:?}");
    assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() <= tolerance), "{got:?} against {want:?}");
}

/// m, sigma^2, policies, w (none: held), flags.
type Row<'a> = (&'a [f64], &'a [f64], &'a [Policy], &'a [f64], Flags);

/// Closed forms, and the weights that the paper publishes (audio, RGB, fused; table 2 and its appendix) with the moments
/// that lead to them. Each row sums to 1, which the Z printed in the paper would not give.
const ROWS: [Row<'_>; 21] = [
    (&[3.0], &[7.0], ALL, &[1.0], Flags::empty()),
    (&[1.0, 1.0], &[1.0, 3.0], ALL, &[0.75, 0.25], Flags::empty()),
    (&[2.0, 1.0], &[1.0, 1.0], ALL, &[2.0 / 3.0, 1.0 / 3.0], Flags::empty()),
    (&[1.0; 3], &[5.0; 3], ALL, &[1.0 / 3.0; 3], Flags::empty()),
    (&[2.0, 3.0, 0.0], &[4.0, 3.0, 1.0], ALL, &[1.0 / 3.0, 2.0 / 3.0, 0.0], Flags::empty()),
    // No overfitting at all: a_k = m_k.
    (&[1.0, 3.0], &[0.0, 0.0], ALL, &[0.25, 0.75], Flags::empty()),
    // Kinetics, mini-Sports, mini-AudioSet: equal gains and sigma^2_k = 1 / w_k, or equal sigma^2.
    (&[1.0; 3], &[1.0 / 0.014, 1.0 / 0.630, 1.0 / 0.356], ALL, &[0.014, 0.630, 0.356], Flags::empty()),
    (&[1.0; 3], &[1.0 / 0.06, 1.0 / 0.65, 1.0 / 0.29], ALL, &[0.06, 0.65, 0.29], Flags::empty()),
    (&[0.24, 0.38, 0.38], &[1.0; 3], ALL, &[0.24, 0.38, 0.38], Flags::empty()),
    // The example of docs/method.md: normalised as it is, the signed solution would point up-hill.
    (&[0.7, -2.0, -0.4], &[0.5, 2.0, 0.9], &[CLAMP, CORRELATED], &[1.0, 0.0, 0.0], Flags::CLAMPED),
    (&[0.7, -2.0, -0.4], &[0.5, 2.0, 0.9], &[SIGNED, BOTH], &[], Flags::HELD),
    (&[1.4, -0.1, 0.5], &[1.0; 3], &[SIGNED, BOTH], &[1.4 / 1.8, -0.1 / 1.8, 0.5 / 1.8], Flags::empty()),
    (&[3.0, -1.0], &[1.0, 1.0], &[SIGNED, BOTH], &[1.5, -0.5], Flags::empty()),
    (&[-1.0, -2.0], &[1.0, 1.0], &[CLAMP, CORRELATED], &[], Flags::HELD.union(Flags::CLAMPED)),
    (&[-1.0, -2.0], &[1.0, 1.0], &[SIGNED, BOTH], &[], Flags::HELD),
    (&[0.0, 0.0], &[1.0, 1.0], ALL, &[], Flags::HELD),
    // 0 / 0 gives no NaN that would train on.
    (&[0.0, 0.0], &[0.0, 0.0], &[Policy { damping: 0.0, ..CLAMP }, CLAMP], &[], Flags::HELD),
    // Damping is a floor relative to the mean of sigma^2: denominators 0 + 0.5 and 2 + 0.5.
    (&[1.0, 1.0], &[0.0, 2.0], &[Policy { damping: 0.5, ..CLAMP }], &[5.0 / 6.0, 1.0 / 6.0], Flags::empty()),
    (&[1.0, 1.0], &[0.0, 2.0], &[CLAMP], &[1.0, 0.0], Flags::empty()),
    // 1 / 0 is nothing to go by.
    (&[1.0, 1.0], &[0.0, 2.0], &[Policy { damping: 0.0, ..CLAMP }], &[], Flags::HELD),
    (&[-1.0, 1.0], &[0.0, 0.0], &[CLAMP], &[0.0, 1.0], Flags::CLAMPED),
];

fn closed_forms(face: Face) -> Outcome {
    for (m, sigma2, policies, want, flags) in ROWS {
        for policy in policies {
            let solution = face.solve(m, &diagonal(sigma2), policy)?;
            assert_eq!(solution.flags, flags, "{m:?}, {sigma2:?}, {policy:?}");
            assert_eq!(solution.weights.is_none(), flags.contains(Flags::HELD));
            let weights = solution.weights.unwrap_or_default();
            close(&weights, want, 1e-10);
            let sum = weights.iter().sum::<f64>();
            assert!(weights.is_empty() || (sum - 1.0).abs() < 1e-14, "the weights sum to {sum}");
        }
    }
    // A matrix without Cholesky factors, even damped, is solved as uncorrelated.
    let s = [1.0, 2.0, 2.0, 1.0];
    assert_eq!(face.solve(&[1.0, 1.0], &s, &CORRELATED)?, face.solve(&[1.0, 1.0], &s, &CLAMP)?);
    Ok(())
}

/// A problem: m, and S as a mean of outer products of `n` vectors of different magnitudes.
#[derive(Clone, Debug)]
struct Problem {
    k: usize,
    m: Vec<f64>,
    s: Vec<f64>,
    policy: Policy,
}

fn problems() -> impl Strategy<Value = Problem> {
    let k = prop_oneof![7 => 1..=6_usize, 1 => 1..=32_usize];
    let policy = (any::<bool>(), any::<bool>(), prop_oneof![Just(1e-12), Just(0.25)]);
    (k, 0.0..0.8, any::<u64>(), policy).prop_map(|(k, shift, seed, (correlated, signed, damping))| {
        let mut random = Random(seed);
        let m = random.numbers(k).iter().map(|m| m + shift).collect();
        let scales: Vec<f64> = (0..k).map(|_| (1 << random.below(5)) as f64).collect();
        let mut s = vec![0.0; k * k];
        for _ in 0..3 * k {
            let d: Vec<f64> = scales.iter().map(|scale| scale * random.number()).collect();
            s.iter_mut().enumerate().for_each(|(i, s)| *s += d[i / k] * d[i % k] / (3 * k) as f64);
        }
        let overfitting = if correlated { Overfitting::Correlated } else { Overfitting::Uncorrelated };
        let negative = if signed { Negative::Signed } else { Negative::Clamp };
        Problem { k, m, s, policy: Policy { overfitting, negative, damping } }
    })
}

/// The naive solver: Gauss-Jordan elimination, and all negative weights dropped together before the rest is solved
/// again (dropping them one by one can end elsewhere). `None` where a decision depends on a rounding.
fn naive(Problem { k, m, s, policy }: &Problem) -> Option<(Vec<f64>, Flags)> {
    let correlated = policy.overfitting == Overfitting::Correlated;
    let damping = policy.damping * (0..*k).map(|i| s[i * k + i]).sum::<f64>() / *k as f64;
    let (mut left, mut flags) = ((0..*k).collect::<Vec<_>>(), Flags::empty());
    let a = loop {
        let row = |j: usize| {
            let entry = move |i: usize| {
                if i == j {
                    s[j * k + j] + damping
                } else if correlated {
                    s[j * k + i]
                } else {
                    0.0
                }
            };
            left.iter().map(|i| entry(*i)).chain([m[j]]).collect::<Vec<f64>>()
        };
        let mut rows: Vec<Vec<f64>> = left.iter().map(|j| row(*j)).collect();
        let n = left.len();
        for i in 0..n {
            let top = rows[i].clone();
            for (_, row) in rows.iter_mut().enumerate().filter(|(j, _)| *j != i) {
                let factor = row[i] / top[i];
                row.iter_mut().zip(&top).for_each(|(x, t)| *x -= factor * t);
            }
        }
        let x: Vec<f64> = (0..n).map(|i| rows[i][n] / rows[i][i]).collect();
        let largest = x.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
        if x.iter().any(|x| x.abs() <= 1e-6 * largest) {
            return None;
        }
        let keeps = |x: &f64| *x >= 0.0 || policy.negative == Negative::Signed;
        let kept: Vec<usize> = left.iter().zip(&x).filter(|(_, x)| keeps(x)).map(|(i, _)| *i).collect();
        let mut a = vec![0.0; *k];
        left.iter().zip(&x).filter(|(_, x)| keeps(x)).for_each(|(i, x)| a[*i] = *x);
        flags.set(Flags::CLAMPED, kept.len() < *k);
        let done = kept.len() == n || !correlated;
        left = kept;
        if done {
            break a;
        }
    };
    let (sum, magnitude) = (a.iter().sum::<f64>(), a.iter().map(|a| a.abs()).sum::<f64>());
    flags.set(Flags::HELD, sum <= 0.0);
    (magnitude == 0.0 || sum.abs() > 1e-6 * magnitude).then(|| (a.iter().map(|a| a / sum).collect(), flags))
}

/// (w'Sw) / (w'm)^2.
fn ratio(w: &[f64], m: &[f64], s: &[f64]) -> f64 {
    let k = w.len();
    let gain: f64 = w.iter().zip(m).map(|(w, m)| w * m).sum();
    let variance: f64 = (0..k * k).map(|i| w[i / k] * w[i % k] * s[i]).sum();
    variance / (gain * gain)
}

fn random_problems(face: Face) -> Outcome {
    let counts = std::cell::Cell::new([0; 4]);
    property(1500, (problems(), any::<u64>()), |(problem, seed)| {
        let Problem { k, m, s, policy } = &problem;
        let (k, mut random) = (*k, Random(seed));
        let solution = face.solve(m, s, policy)?;
        let Some((want, flags)) = naive(&problem) else { return Ok(()) };
        let dropped = want.iter().filter(|w| **w == 0.0).count();
        let mut tried = counts.get();
        for (count, more) in tried.iter_mut().zip([1, usize::from(flags.contains(Flags::HELD)), dropped, k / 9]) {
            *count += more;
        }
        counts.set(tried);
        assert_eq!(solution.flags, flags);
        let Some(w) = &solution.weights else { return Ok(()) };
        // The two solvers round differently, by the condition of S: at most 2^10 of magnitudes times 2^20 here.
        let size = want.iter().fold(1.0_f64, |max, w| max.max(w.abs()));
        close(w, &want, 1e-7 * size);
        assert!(w.iter().zip(&want).all(|(w, want)| (*w == 0.0) == (*want == 0.0)));
        check_residual(&problem, w);
        check_minimum(&problem, w, &mut random);
        // Scaling m and S changes nothing.
        let scale = 10.0_f64.powi(random.pick(&[-150, -75, -15, 15, 75, 150]));
        let scaled = |values: &[f64], scale: f64| values.iter().map(|x| x * scale).collect::<Vec<f64>>();
        let same = face.solve(&scaled(m, scale), &scaled(s, scale * scale), policy)?;
        close(&same.weights.unwrap_or_default(), w, 1e-7 * size);
        // Permuting modalities permutes weights.
        let order: Vec<usize> = (0..k).map(|i| (i + 1) % k).collect();
        let permuted_s: Vec<f64> = (0..k * k).map(|i| s[order[i / k] * k + order[i % k]]).collect();
        let permuted_m: Vec<f64> = order.iter().map(|i| m[*i]).collect();
        let permuted = face.solve(&permuted_m, &permuted_s, policy)?.weights.unwrap_or_default();
        close(&permuted, &order.iter().map(|i| w[*i]).collect::<Vec<f64>>(), 1e-7 * size);
        // Only the symmetric part of S matters, and uncorrelated only its diagonal.
        let mut other = s.clone();
        for (i, j) in (0..k).flat_map(|i| (0..i).map(move |j| (i, j))) {
            match policy.overfitting {
                Overfitting::Correlated => {
                    (other[i * k + j], other[j * k + i]) = (s[j * k + i] + 0.25, s[i * k + j] - 0.25)
                }
                Overfitting::Uncorrelated => other[i * k + j] = random.number(),
            }
        }
        close(&face.solve(m, &other, policy)?.weights.unwrap_or_default(), w, 1e-7 * size);
        Ok(())
    })?;
    let [decided, held, dropped, large] = counts.get();
    assert!(decided > 900 && held > 30 && dropped > 300 && large > 30, "{decided}, {held}, {dropped}, {large}");
    Ok(())
}

/// (S + damping) w is parallel to m on the modalities that have weight, as far as a backward stable solver comes: its
/// error is that of a matrix changed by K^2 roundings of its trace.
fn check_residual(Problem { k, m, s, policy }: &Problem, w: &[f64]) {
    let k = *k;
    let trace: f64 = (0..k).map(|i| s[i * k + i]).sum();
    let correlated = policy.overfitting == Overfitting::Correlated;
    let product = |i: usize| {
        let others = (0..k).filter(|j| correlated || *j == i).map(|j| s[i * k + j] * w[j]).sum::<f64>();
        policy.damping * trace / k as f64 * w[i] + others
    };
    let left: Vec<usize> = (0..k).filter(|i| w[*i] != 0.0).collect();
    let along = left.iter().map(|i| product(*i) * m[*i]).sum::<f64>() / left.iter().map(|i| m[*i] * m[*i]).sum::<f64>();
    let largest = w.iter().fold(0.0_f64, |max, w| max.max(w.abs()));
    let bound = 8.0 * (k * k + 8) as f64 * (1.0 + policy.damping) * trace * largest * f64::EPSILON;
    for i in left {
        let (got, want) = (product(i), along * m[i]);
        assert!((got - want).abs() <= bound, "row {i} of S w is {got}, expected {want} +- {bound}");
    }
}

/// Proposition 1, and its form without the assumption: no other weights that sum to 1 have a smaller ratio; clamped and
/// uncorrelated, none that are not negative either.
fn check_minimum(Problem { k, m, s, policy }: &Problem, w: &[f64], random: &mut Random) {
    let (clamped, correlated) = (policy.negative == Negative::Clamp, policy.overfitting == Overfitting::Correlated);
    if policy.damping > 1e-6 || (clamped && correlated) {
        return;
    }
    let s = if correlated { s.clone() } else { diagonal(&(0..*k).map(|i| s[i * k + i]).collect::<Vec<_>>()) };
    let best = ratio(w, m, &s);
    for _ in 0..20 {
        let mut other: Vec<f64> = w.iter().map(|w| w + 0.3 * random.number()).collect();
        if clamped {
            other.iter_mut().for_each(|w| *w = w.max(0.0));
        }
        // Only weights that point down-hill compete.
        if other.iter().zip(m).map(|(w, m)| w * m).sum::<f64>() > 1e-9 {
            assert!(ratio(&other, m, &s) >= best * (1.0 - 1e-9), "{other:?} is better");
        }
    }
}

/// In C the output may be any of the inputs, and held weights are those that the caller passes as in force.
#[test]
fn arrays_of_c_may_overlap() -> Outcome {
    let config = gradblend_testkit::c::config(&Config { policy: CORRELATED, ..Config::new(3) })?;
    let mut random = Random(42);
    for round in 0..50 {
        let s = diagonal(&[1.0, 2.0 + random.number(), 3.0]);
        let m = if round % 5 == 0 { vec![-1.0; 3] } else { random.numbers(3) };
        let in_force = random.numbers(3);
        let solution = solve(&m, &s, &CORRELATED)?;
        let want = solution.weights.unwrap_or_else(|| in_force.clone());
        for over in 0..4 {
            let (mut m, mut s, mut in_force, mut out, mut flags) =
                (m.clone(), s.clone(), in_force.clone(), vec![0.0; 3], 77);
            let out = match over {
                0 => out.as_mut_ptr(),
                1 => m.as_mut_ptr(),
                2 => s.as_mut_ptr(),
                _ => in_force.as_mut_ptr(),
            };
            let (m, s, in_force) = (m.as_ptr(), s.as_ptr(), in_force.as_ptr());
            // SAFETY: K numbers for each vector, K x K for the matrix, and room for K numbers wherever `out` points.
            let (status, got) = unsafe {
                let status = gradblend::ffi::gradblend_solve(&config, m, s, in_force, out, &mut flags);
                (status, std::slice::from_raw_parts(out, 3).to_vec())
            };
            assert_eq!((status, &got, flags), (0, &want, solution.flags.bits()), "output over array {over}");
        }
    }
    let mut flags = 0;
    // SAFETY: NULL is rejected, not read.
    let status = unsafe { gradblend::ffi::gradblend_solve(&config, null(), null(), null(), &mut 0.0, &mut flags) };
    assert_eq!(status, 1);
    Ok(())
}

fn invalid_input(face: Face) -> Outcome {
    for got in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for modality in 0..2 {
            let mut m = [1.0, 2.0];
            m[modality] = got;
            let want = Error::Numerator { modality, got };
            rejected(face.solve(&m, &[1.0; 4], &CLAMP), &want, &format!("modality {modality}"));
        }
        for entry in 0..4 {
            let mut s = [1.0, 0.5, 0.5, 2.0];
            s[entry] = got;
            let want = Error::SecondMoment { row: entry / 2, column: entry % 2, got };
            rejected(face.solve(&[1.0; 2], &s, &CLAMP), &want, &format!("{} and {}", entry / 2, entry % 2));
        }
    }
    for (entry, got) in [(0, -1e-300), (3, -1.0)] {
        let mut s = [1.0, 0.5, 0.5, 2.0];
        s[entry] = got;
        let want = Error::SecondMoment { row: entry / 2, column: entry % 2, got };
        rejected(face.solve(&[1.0; 2], &s, &CLAMP), &want, "diagonal");
    }
    face.solve(&[1.0; 2], &[1.0, -1e300, 0.5, 2.0], &CLAMP)?;
    for got in [-1e-9, f64::NAN, f64::INFINITY] {
        let policy = Policy { damping: got, ..CLAMP };
        rejected(face.solve(&[1.0], &[1.0], &policy), &Error::Damping { got }, "damping");
    }
    for got in [0, 33] {
        let (m, s) = (vec![1.0; got], vec![1.0; got * got]);
        rejected(face.solve(&m, &s, &CLAMP), &Error::Modalities { got: got as u64 }, &format!("got {got}"));
    }
    // C has no lengths.
    let want = Error::Count { what: "the second moment", expected: 4, got: 2 };
    rejected(solve(&[1.0; 2], &[1.0; 2], &CLAMP), &want, "expected 4");
    Ok(())
}

/// `reweight` puts in force what `solve` makes of the moments: of S, or of its diagonal before there are K observations.
fn reweight_is_solve(face: Face) -> Outcome {
    let mut random = Random(43);
    for round in 0..100 {
        let k = 1 + random.below(if round % 8 == 0 { 32 } else { 6 });
        let policy = random.pick(ALL);
        let average = random.pick(&[Average::Mean, Average::Ema { decay: 0.9 }]);
        let cadence = random.pick(&[Cadence::OnRequest, Cadence::EveryObservation]);
        let mut blender =
            face.blender_with(Config { average, policy, cadence, threads: 1, ..Config::new(k as u32) })?;
        for _ in 0..1 + random.below(2 * k) {
            let c: Vec<f64> = random.numbers(k).iter().map(|c| c + 0.3).collect();
            let before = blender.report()?.weights;
            blender.observe_sums(&c, &random.numbers(k))?;
            if cadence == Cadence::OnRequest {
                assert_eq!(blender.report()?.weights, before);
                blender.reweight()?;
            }
            let (after, s) = (blender.report()?, blender.second_moments()?);
            let enough = after.observed >= k as u64;
            let policy = if enough { policy } else { Policy { overfitting: Overfitting::Uncorrelated, ..policy } };
            let Solution { weights, flags } = solve(&after.mean, &s, &policy)?;
            assert_eq!((after.weights, after.flags), (weights.unwrap_or(before), flags), "K = {k}, {policy:?}");
        }
    }
    Ok(())
}

fn too_few_observations_solve_uncorrelated(face: Face) -> Outcome {
    let config = Config { policy: CORRELATED, ..Config::new(3) };
    let mut correlated = face.blender_with(config)?;
    let mut uncorrelated = face.blender(3)?;
    let mut random = Random(44);
    for n in 1..=4 {
        let d = random.numbers(3);
        for blender in [&mut correlated, &mut uncorrelated] {
            blender.observe_sums(&[1.0, 2.0, 3.0], &d)?;
            blender.reweight()?;
        }
        let same = correlated.report()?.weights == uncorrelated.report()?.weights;
        assert_eq!(same, n < 3, "after {n} observations");
    }
    Ok(())
}

fn nothing_to_go_by_keeps_the_weights(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    blender.reweight()?;
    let report = blender.report()?;
    assert_eq!((report.weights, report.flags), (vec![0.5, 0.5], Flags::HELD));
    blender.set_weights(&[3.0, -0.5])?;
    blender.observe_sums(&[-1.0, -1.0], &[1.0, 1.0])?;
    blender.reweight()?;
    let report = blender.report()?;
    assert_eq!((report.weights, report.flags), (vec![3.0, -0.5], Flags::HELD | Flags::CLAMPED));
    assert_eq!(blender.weights()?, [3.0, -0.5]);
    blender.reset()?;
    blender.observe_sums(&[1.0, 1.0], &[1.0, 1.0])?;
    blender.reweight()?;
    assert_eq!(blender.report()?.flags, Flags::empty());
    Ok(())
}

fn cadence(face: Face) -> Outcome {
    for cadence in [Cadence::OnRequest, Cadence::EveryObservation] {
        let mut blender = face.blender_with(Config { cadence, ..Config::new(2) })?;
        blender.observe_sums(&[1.0, 1.0], &[1.0, 3.0_f64.sqrt()])?;
        let want = if cadence == Cadence::OnRequest { [0.5, 0.5] } else { [0.75, 0.25] };
        let report = blender.report()?;
        close(&report.weights, &want, 1e-11);
        // The blend of the better weights overfits less than uniform weights do.
        assert!(report.ogr_blend <= report.ogr_uniform * (1.0 + 1e-12));
    }
    Ok(())
}
