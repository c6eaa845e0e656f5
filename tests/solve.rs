//! `reweight` and `solve`: published rows, closed forms, policies, and the theorem behind them.

mod common;

use common::{Outcome, Place, Random, STREAM};
use gradblend::{Cadence, Config, Flags, Negative, Overfitting, Policy, Solution, solve};

tests! {
    once: too_few_observations_solve_uncorrelated, nothing_to_go_by_keeps_the_weights, cadence;
}

const SIGNED: Policy = Policy { overfitting: Overfitting::Uncorrelated, negative: Negative::Signed, damping: 1e-12 };
const CORRELATED: Policy = Policy { overfitting: Overfitting::Correlated, negative: Negative::Clamp, damping: 1e-12 };
const BOTH: Policy = Policy { overfitting: Overfitting::Correlated, negative: Negative::Signed, damping: 1e-12 };

fn diagonal(sigma2: &[f64]) -> Vec<f64> {
    let k = sigma2.len();
    (0..k * k).map(|i| if i / k == i % k { sigma2[i / k] } else { 0.0 }).collect()
}

fn found(solution: &Solution) -> &[f64] {
    solution.weights.as_deref().unwrap_or(&[])
}

fn close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{got:?} against {want:?}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= tolerance, "{got} against {want}");
    }
}

/// (m, sigma^2, w): closed forms, and the weights that the paper publishes (audio, RGB, fused; table 2 and its appendix)
/// with the moments that lead to them. Each row sums to 1, which the Z printed in the paper would not give.
const ROWS: [(&[f64], &[f64], &[f64]); 9] = [
    (&[3.0], &[7.0], &[1.0]),
    (&[1.0, 1.0], &[1.0, 3.0], &[0.75, 0.25]),
    (&[2.0, 1.0], &[1.0, 1.0], &[2.0 / 3.0, 1.0 / 3.0]),
    (&[1.0, 1.0, 1.0], &[5.0, 5.0, 5.0], &[1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]),
    (&[2.0, 3.0, 0.0], &[4.0, 3.0, 1.0], &[1.0 / 3.0, 2.0 / 3.0, 0.0]),
    // No overfitting at all: a_k = m_k.
    (&[1.0, 3.0], &[0.0, 0.0], &[0.25, 0.75]),
    // Kinetics, mini-Sports, mini-AudioSet: equal gains, sigma^2_k as 1 / w_k.
    (&[1.0, 1.0, 1.0], &[1.0 / 0.014, 1.0 / 0.630, 1.0 / 0.356], &[0.014, 0.630, 0.356]),
    (&[1.0, 1.0, 1.0], &[1.0 / 0.06, 1.0 / 0.65, 1.0 / 0.29], &[0.06, 0.65, 0.29]),
    (&[0.24, 0.38, 0.38], &[1.0, 1.0, 1.0], &[0.24, 0.38, 0.38]),
];

#[test]
fn published_rows_and_closed_forms() -> Outcome {
    for (m, sigma2, want) in ROWS {
        for policy in [Policy::default(), SIGNED, CORRELATED, BOTH] {
            let solution = solve(m, &diagonal(sigma2), &policy)?;
            close(found(&solution), want, 1e-10);
            assert_eq!(solution.flags, Flags::empty());
            assert!((found(&solution).iter().sum::<f64>() - 1.0).abs() < 1e-14, "weights sum to 1, not 2");
        }
    }
    Ok(())
}

#[test]
fn signs() -> Outcome {
    // The example of docs/method.md: normalised as it is, this would point up-hill.
    let (m, s) = ([0.7, -2.0, -0.4], diagonal(&[0.5, 2.0, 0.9]));
    let clamped = solve(&m, &s, &Policy::default())?;
    close(found(&clamped), &[1.0, 0.0, 0.0], 1e-12);
    assert_eq!(clamped.flags, Flags::CLAMPED);
    let signed = solve(&m, &s, &SIGNED)?;
    assert_eq!((signed.weights, signed.flags), (None, Flags::HELD), "a negative sum is held");
    let m = [0.7, -0.2, 0.4];
    let signed = solve(&m, &s, &SIGNED)?;
    let a = [1.4, -0.1, 0.4 / 0.9];
    let sum: f64 = a.iter().sum();
    close(found(&signed), &a.map(|a| a / sum), 1e-10);
    assert_eq!(signed.flags, Flags::empty());
    let none = solve(&[-1.0, -2.0], &diagonal(&[1.0, 1.0]), &Policy::default())?;
    assert_eq!((none.weights, none.flags), (None, Flags::HELD | Flags::CLAMPED));
    let zero = solve(&[0.0, 0.0], &diagonal(&[1.0, 1.0]), &Policy::default())?;
    assert_eq!((zero.weights, zero.flags), (None, Flags::HELD));
    let both = solve(&[0.0, 0.0], &diagonal(&[0.0, 0.0]), &Policy { damping: 0.0, ..Policy::default() })?;
    assert_eq!((both.weights, both.flags), (None, Flags::HELD), "0 / 0 trains on with no NaN");
    Ok(())
}

#[test]
fn damping_is_a_relative_floor() -> Outcome {
    let solution = solve(&[1.0, 1.0], &diagonal(&[0.0, 2.0]), &Policy { damping: 0.5, ..Policy::default() })?;
    // Denominators 0 + 0.5 * 1 and 2 + 0.5 * 1.
    close(found(&solution), &[5.0 / 6.0, 1.0 / 6.0], 1e-14);
    let solution = solve(&[1.0, 1.0], &diagonal(&[0.0, 2.0]), &Policy::default())?;
    close(found(&solution), &[1.0, 0.0], 1e-11);
    let solution = solve(&[1.0, 1.0], &diagonal(&[0.0, 2.0]), &Policy { damping: 0.0, ..Policy::default() })?;
    assert_eq!((solution.weights, solution.flags), (None, Flags::HELD), "1 / 0 is nothing to go by");
    Ok(())
}

/// A random second-moment matrix of rank n.
fn second_moment(random: &mut Random, k: usize, n: usize) -> Vec<f64> {
    let mut s = vec![0.0; k * k];
    for _ in 0..n {
        let d: Vec<f64> = (0..k).map(|_| random.number()).collect();
        for (i, s) in s.iter_mut().enumerate() {
            *s += d[i / k] * d[i % k] / n as f64;
        }
    }
    s
}

fn ratio(w: &[f64], m: &[f64], s: &[f64]) -> f64 {
    let k = w.len();
    let gain: f64 = w.iter().zip(m).map(|(w, m)| w * m).sum();
    let variance: f64 = (0..k * k).map(|i| w[i / k] * w[i % k] * s[i]).sum();
    variance / (gain * gain)
}

/// Proposition 1, and its form without the assumption: no other weights that sum to 1 have a smaller ratio; clamped, no
/// other ones that are not negative either.
#[test]
fn weights_minimise_the_ratio() -> Outcome {
    let mut random = Random(41);
    for round in 0..200 {
        let k = 2 + round % 7;
        let m: Vec<f64> = (0..k).map(|_| random.number()).collect();
        let full = second_moment(&mut random, k, 3 * k);
        let only = diagonal(&(0..k).map(|i| full[i * k + i]).collect::<Vec<f64>>());
        for (policy, s) in [(Policy::default(), &only), (SIGNED, &only), (BOTH, &full)] {
            let solution = solve(&m, s, &policy)?;
            let Some(w) = &solution.weights else { continue };
            let best = ratio(w, &m, s);
            for _ in 0..50 {
                let mut other: Vec<f64> = w.iter().map(|w| w + 0.3 * random.number()).collect();
                if policy.negative == Negative::Clamp {
                    other.iter_mut().for_each(|w| *w = w.max(0.0));
                }
                // Only weights that point down-hill compete.
                if other.iter().zip(&m).map(|(w, m)| w * m).sum::<f64>() > 1e-9 {
                    assert!(ratio(&other, &m, s) >= best * (1.0 - 1e-9), "{m:?} {s:?} {w:?} {other:?}");
                }
            }
        }
    }
    Ok(())
}

/// S w is parallel to m where no modality is dropped; the dropped ones have no weight.
#[test]
fn correlated_solves_the_linear_system() -> Outcome {
    let mut random = Random(42);
    let mut dropped = 0;
    for round in 0..300 {
        let k = 1 + round % 32;
        let s = second_moment(&mut random, k, 4 * k);
        let m: Vec<f64> = (0..k).map(|_| 0.5 + random.number()).collect();
        let solution = solve(&m, &s, &BOTH)?;
        if let Some(w) = &solution.weights {
            let sw: Vec<f64> = (0..k).map(|j| (0..k).map(|i| s[j * k + i] * w[i]).sum()).collect();
            let factor = sw[0] / m[0];
            let size = m.iter().fold(0.0_f64, |max, m| max.max(m.abs())) * factor.abs();
            close(&sw, &m.iter().map(|m| m * factor).collect::<Vec<f64>>(), 1e-7 * size);
        }
        let clamped = solve(&m, &s, &CORRELATED)?;
        if let Some(w) = &clamped.weights {
            assert!(w.iter().all(|w| *w >= 0.0));
            let left: Vec<usize> = (0..k).filter(|i| w[*i] > 0.0).collect();
            let sw: Vec<f64> = left.iter().map(|j| left.iter().map(|i| s[j * k + i] * w[*i]).sum()).collect();
            let factor = sw[0] / m[left[0]];
            let want: Vec<f64> = left.iter().map(|i| m[*i] * factor).collect();
            close(&sw, &want, 1e-7 * want.iter().fold(0.0_f64, |max, w| max.max(w.abs())));
            dropped += k - left.len();
            assert_eq!(clamped.flags.contains(Flags::CLAMPED), left.len() < k);
        }
    }
    assert!(dropped > 100, "the rule for dropping was tried");
    Ok(())
}

/// x with S x = m on `left`, by Gauss-Jordan elimination with row exchanges.
fn eliminate(s: &[f64], m: &[f64], left: &[usize]) -> Vec<f64> {
    let (k, n) = (m.len(), left.len());
    let mut rows: Vec<Vec<f64>> =
        left.iter().map(|j| left.iter().map(|i| s[j * k + i]).chain([m[*j]]).collect()).collect();
    for i in 0..n {
        let pivot = (i..n).fold(i, |best, j| if rows[j][i].abs() > rows[best][i].abs() { j } else { best });
        rows.swap(i, pivot);
        let top = rows[i].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let factor = row[i] / top[i];
            row.iter_mut().zip(&top).skip(i).for_each(|(x, t)| *x -= factor * t);
        }
    }
    (0..n).map(|i| rows[i][n] / rows[i][i]).collect()
}

/// All negative ones are dropped at once, then the rest is solved again: dropping them one by one can end elsewhere.
#[test]
fn negative_weights_are_dropped_together() -> Outcome {
    let mut random = Random(45);
    for round in 0..500 {
        let k = 3 + round % 8;
        let s = second_moment(&mut random, k, 2 * k);
        let m: Vec<f64> = (0..k).map(|_| 0.3 + random.number()).collect();
        let mut left: Vec<usize> = (0..k).collect();
        let x = loop {
            let x = eliminate(&s, &m, &left);
            if x.iter().all(|x| *x >= 0.0) {
                break x;
            }
            left = left.iter().zip(&x).filter(|(_, x)| **x >= 0.0).map(|(k, _)| *k).collect();
        };
        let sum: f64 = x.iter().sum();
        let mut want = vec![0.0; k];
        left.iter().zip(&x).for_each(|(k, x)| want[*k] = x / sum);
        let solution = solve(&m, &s, &CORRELATED)?;
        if left.is_empty() {
            assert_eq!(solution.weights, None);
        } else {
            close(found(&solution), &want, 1e-7);
        }
    }
    Ok(())
}

#[test]
fn scaling_and_permuting_change_nothing() -> Outcome {
    let mut random = Random(43);
    for policy in [Policy::default(), SIGNED, CORRELATED, BOTH] {
        let k = 5;
        let m: Vec<f64> = (0..k).map(|_| random.number() + 1.2).collect();
        let s = second_moment(&mut random, k, 20);
        let straight = solve(&m, &s, &policy)?;
        for exponent in [-150, -75, -15, 0, 15, 75, 150] {
            let scale = 10.0_f64.powi(exponent);
            let m: Vec<f64> = m.iter().map(|m| m * scale).collect();
            let s: Vec<f64> = s.iter().map(|s| s * scale * scale).collect();
            close(found(&solve(&m, &s, &policy)?), found(&straight), 1e-11);
        }
        let order = [3, 1, 4, 0, 2];
        let pm: Vec<f64> = order.iter().map(|i| m[*i]).collect();
        let ps: Vec<f64> = (0..k * k).map(|i| s[order[i / k] * k + order[i % k]]).collect();
        let want: Vec<f64> = order.iter().map(|i| found(&straight)[*i]).collect();
        close(found(&solve(&pm, &ps, &policy)?), &want, 1e-11);
    }
    Ok(())
}

fn too_few_observations_solve_uncorrelated(place: Place) -> Outcome {
    let config = Config { policy: CORRELATED, ..Config::new(3) };
    let mut correlated = place.blender_with(config)?;
    let mut uncorrelated = place.blender(3)?;
    let mut random = Random(44);
    for n in 1..=4 {
        let d = [random.number(), random.number(), random.number()];
        for blender in [&mut correlated, &mut uncorrelated] {
            place.set_pending(blender, &[1.0, 2.0, 3.0], &d);
            blender.observe(STREAM())?;
            blender.reweight(STREAM())?;
        }
        let same = correlated.report(STREAM())?.weights == uncorrelated.report(STREAM())?.weights;
        assert_eq!(same, n < 3, "after {n} observations");
    }
    // A matrix without factors, even damped: the same fall-back.
    let s = [1.0, 2.0, 2.0, 1.0];
    assert_eq!(solve(&[1.0, 1.0], &s, &CORRELATED)?, solve(&[1.0, 1.0], &s, &Policy::default())?);
    Ok(())
}

fn nothing_to_go_by_keeps_the_weights(place: Place) -> Outcome {
    let mut blender = place.blender(2)?;
    blender.reweight(STREAM())?;
    let report = blender.report(STREAM())?;
    assert_eq!((report.weights, report.flags), (vec![0.5, 0.5], Flags::HELD));
    blender.set_weights(&[3.0, -0.5], STREAM())?;
    place.set_pending(&mut blender, &[-1.0, -1.0], &[1.0, 1.0]);
    blender.observe(STREAM())?;
    blender.reweight(STREAM())?;
    let report = blender.report(STREAM())?;
    assert_eq!((report.weights, report.flags), (vec![3.0, -0.5], Flags::HELD | Flags::CLAMPED));
    assert_eq!(place.weights(&blender), [3.0, -0.5]);
    blender.reset(STREAM())?;
    place.set_pending(&mut blender, &[1.0, 1.0], &[1.0, 1.0]);
    blender.observe(STREAM())?;
    blender.reweight(STREAM())?;
    assert_eq!(blender.report(STREAM())?.flags, Flags::empty());
    Ok(())
}

fn cadence(place: Place) -> Outcome {
    for cadence in [Cadence::OnRequest, Cadence::EveryObservation] {
        let mut blender = place.blender_with(Config { cadence, ..Config::new(2) })?;
        place.set_pending(&mut blender, &[1.0, 1.0], &[1.0, 3.0_f64.sqrt()]);
        blender.observe(STREAM())?;
        let want = if cadence == Cadence::OnRequest { [0.5, 0.5] } else { [0.75, 0.25] };
        close(&blender.report(STREAM())?.weights, &want, 1e-11);
        let report = blender.report(STREAM())?;
        // The blend of the better weights overfits less than uniform weights do.
        assert!(report.ogr_blend <= report.ogr_uniform * (1.0 + 1e-12));
    }
    Ok(())
}
