//! `solve` and `reweight`: closed forms, published weights, invalid input. `tests/minimum.rs` has random problems.

use std::ptr::null;

use gradblend::{
    Average, Cadence, Config, Error, Flags, MAX_MODALITIES, Negative, Overfitting, Policy, Solution, solve,
};
use gradblend_testkit::{Face, Outcome, Random, TestBlender, forged_second_moments, rejected};

gradblend_testkit::tests! {
    once:
        reweight_is_solve,
        too_few_observations_solve_uncorrelated,
        nothing_to_go_by_keeps_the_weights,
        least_weights_bind_the_solver_alone,
        a_loaded_matrix_without_pivots,
        cadence;
    host:
        closed_forms,
        least_weights,
        degenerate_matrices,
        invalid_input;
}

const CLAMP: Policy = Policy {
    overfitting: Overfitting::Uncorrelated,
    negative: Negative::Clamp,
    damping: 1e-12,
    min_weight: [0.0; MAX_MODALITIES],
};
const SIGNED: Policy = Policy { negative: Negative::Signed, ..CLAMP };
const CORRELATED: Policy = Policy { overfitting: Overfitting::Correlated, ..CLAMP };
const BOTH: Policy = Policy { overfitting: Overfitting::Correlated, ..SIGNED };
const UNDAMPED: Policy = Policy { damping: 0.0, ..CLAMP };
const UNDAMPED_CORRELATED: Policy = Policy { damping: 0.0, ..CORRELATED };
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
const ROWS: &[Row<'_>] = &[
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
    // What gains without overfitting has an OGR of 0.
    (&[1.0, 1.0], &[0.0, 2.0], &[UNDAMPED, UNDAMPED_CORRELATED], &[1.0, 0.0], Flags::empty()),
    (&[1.0, 3.0, 9.0], &[0.0, 0.0, 2.0], &[UNDAMPED, UNDAMPED_CORRELATED], &[0.25, 0.75, 0.0], Flags::empty()),
    (&[-1.0, 3.0, 9.0], &[0.0, 1.0, 1.0], &[UNDAMPED, UNDAMPED_CORRELATED], &[0.0, 0.25, 0.75], Flags::CLAMPED),
    (&[1.0, 1.0], &[0.0, 2.0], &[Policy { damping: 0.0, ..SIGNED }], &[], Flags::HELD),
    (&[-1.0, 1.0], &[0.0, 0.0], &[CLAMP], &[0.0, 1.0], Flags::CLAMPED),
];

fn closed_forms(face: Face) -> Outcome {
    for &(m, sigma2, policies, want, flags) in ROWS {
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
    Ok(())
}

/// `policy` with least weights.
fn floors(policy: Policy, least: &[f64]) -> Policy {
    let mut policy = policy;
    policy.min_weight[..least.len()].copy_from_slice(least);
    policy
}

/// With equal gains and sigma^2 of 1 and 3 the free minimum is (3/4, 1/4).
fn least_weights(face: Face) -> Outcome {
    // m, f, w, flags.
    type Row<'a> = (&'a [f64], &'a [f64], &'a [f64], Flags);
    let rows: [Row<'_>; 7] = [
        (&[1.0, 1.0], &[0.5, 0.0], &[0.75, 0.25], Flags::empty()),
        (&[1.0, 1.0], &[0.0, 0.5], &[0.5, 0.5], Flags::FLOORED),
        (&[1.0, 1.0], &[0.0, 0.25], &[0.75, 0.25], Flags::empty()),
        (&[1.0, -1.0], &[0.0, 0.25], &[0.75, 0.25], Flags::FLOORED),
        (&[1.0, -1.0], &[0.25, 0.0], &[1.0, 0.0], Flags::CLAMPED),
        // 0.25 * 1 - 0.75 * 1 < 0: whatever the rest does, the step raises the validation loss.
        (&[1.0, -1.0], &[0.0, 0.75], &[], Flags::HELD.union(Flags::CLAMPED)),
        (&[1.0, 1.0], &[0.25, 0.749999], &[0.250001, 0.749999], Flags::FLOORED),
    ];
    for (m, least, want, flags) in rows {
        for policy in [CLAMP, CORRELATED] {
            let solution = face.solve(m, &diagonal(&[1.0, 3.0]), &floors(policy, least))?;
            assert_eq!(solution.flags, flags, "{m:?}, {least:?}");
            close(&solution.weights.unwrap_or_default(), want, 1e-9);
        }
    }
    // Nothing overfits: u = max(m, 0), so w = f + (1 - sum f) u / sum u.
    let solution = face.solve(&[1.0, 3.0, -1.0], &[0.0; 9], &floors(CLAMP, &[0.0, 0.0, 0.2]))?;
    assert_eq!(solution.flags, Flags::FLOORED);
    close(&solution.weights.unwrap_or_default(), &[0.2, 0.6, 0.2], 1e-15);
    Ok(())
}

/// Singular matrices, and some that are no second moment.
fn degenerate_matrices(face: Face) -> Outcome {
    // Two modalities with equal gradients share their weight in any way; the damping makes it half and half.
    let s = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0];
    let solution = face.solve(&[1.0, 1.0, 1.0], &s, &CORRELATED)?;
    let weights = solution.weights.unwrap_or_default();
    assert_eq!(solution.flags, Flags::empty());
    close(&[weights[0] + weights[1], weights[2]], &[0.5, 0.5], 1e-9);
    close(&weights, &[0.25, 0.25, 0.5], 1e-3);
    // d_0 = -d_1: half of each does not overfit at all.
    let solution = face.solve(&[1.0, 1.0], &[1.0, -1.0, -1.0, 1.0], &UNDAMPED_CORRELATED)?;
    close(&solution.weights.unwrap_or_default(), &[0.5, 0.5], 1e-12);
    // Rows of zeros, damped and not.
    for policy in [CORRELATED, UNDAMPED_CORRELATED] {
        let s = [2.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.5, 0.0, 1.0];
        let solution = face.solve(&[1.0, 2.0, 1.0], &s, &policy)?;
        close(&solution.weights.unwrap_or_default(), &[0.0, 1.0, 0.0], 1e-9);
        let solution = face.solve(&[1.0, -2.0, 1.0], &s, &policy)?;
        assert_eq!(solution.flags, Flags::CLAMPED);
        close(&solution.weights.unwrap_or_default(), &[0.25, 0.0, 0.75], 1e-9);
    }
    // Of very different scales: w_k is as 1 / sigma^2_k.
    let s = [1e-150, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1e150];
    for (m, want) in
        [([1.0; 3], [1.0, 0.0, 0.0]), ([1e-150, 1.0, 1e150], [1.0 / 3.0; 3]), ([-1.0, 1e-75, 1e75], [0.0, 0.5, 0.5])]
    {
        for policy in [UNDAMPED, UNDAMPED_CORRELATED] {
            close(&face.solve(&m, &s, &policy)?.weights.unwrap_or_default(), &want, 1e-12);
        }
    }
    // Not positive semidefinite: weights within their bounds, and a flag where that mattered.
    let solution = face.solve(&[1.0, 1.0], &[1.0, -2.0, -2.0, 1.0], &CORRELATED)?;
    assert_eq!((solution.weights, solution.flags), (Some(vec![1.0, 0.0]), Flags::INEXACT));
    let s = [1.0, 2.0, 2.0, 1.0];
    assert_eq!(face.solve(&[1.0, 1.0], &s, &BOTH)?, face.solve(&[1.0, 1.0], &s, &SIGNED)?);
    Ok(())
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
    for got in [-1e-300, 1.0, 1.5, f64::NAN, f64::INFINITY] {
        let want = Error::MinWeight { modality: 1, expected: "at least 0 and below 1", got };
        rejected(face.solve(&[1.0; 2], &[1.0; 4], &floors(CLAMP, &[0.0, got])), &want, "min_weight of modality 1");
    }
    let want = Error::MinWeight { modality: 2, expected: "0 for a modality that does not exist", got: 0.5 };
    rejected(face.solve(&[1.0; 2], &[1.0; 4], &floors(CLAMP, &[0.0, 0.0, 0.5])), &want, "min_weight of modality 2");
    let want = Error::MinWeight { modality: 1, expected: "0 where weights may be negative", got: 0.5 };
    rejected(face.solve(&[1.0; 2], &[1.0; 4], &floors(SIGNED, &[0.0, 0.5])), &want, "min_weight of modality 1");
    let want = Error::MinWeightSum { got: 1.0 };
    rejected(face.solve(&[1.0; 2], &[1.0; 4], &floors(CLAMP, &[0.25, 0.75])), &want, "min_weight|sums to 1");
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
        let mut policy = random.pick(ALL);
        if policy.negative == Negative::Clamp && round % 2 == 0 {
            policy.min_weight[..k].fill_with(|| random.pick(&[0.0, 0.5 / k as f64, 0.9 / k as f64]));
        }
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
            let least =
                |(k, w): (usize, &f64)| u32::from(policy.min_weight[k] > 0.0 && *w == policy.min_weight[k]) << k;
            let at_least = weights.iter().flatten().enumerate().map(least).sum::<u32>();
            assert_eq!(
                (&after.weights, after.flags),
                (weights.as_ref().unwrap_or(&before), flags),
                "K = {k}, {policy:?}"
            );
            assert_eq!((after.floored, after.floored != 0), (at_least, flags.contains(Flags::FLOORED)));
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

/// Weights that are held, set or loaded can be below the least weights, until `reweight` finds others.
fn least_weights_bind_the_solver_alone(face: Face) -> Outcome {
    let config = Config { policy: floors(CLAMP, &[0.0, 0.0, 0.8]), ..Config::new(3) };
    let mut blender = face.blender_with(config)?;
    let state =
        |blender: &mut TestBlender| blender.report().map(|report| (report.weights, report.flags, report.floored));
    assert_eq!(state(&mut blender)?, (vec![1.0 / 3.0; 3], Flags::empty(), 0));
    blender.reweight()?;
    assert_eq!(state(&mut blender)?, (vec![1.0 / 3.0; 3], Flags::HELD, 0));
    blender.set_weights(&[1.0, 0.0, 0.0])?;
    blender.observe_sums(&[-1.0; 3], &[1.0; 3])?;
    blender.reweight()?;
    assert_eq!(state(&mut blender)?, (vec![1.0, 0.0, 0.0], Flags::HELD | Flags::CLAMPED, 0));
    let held = blender.save()?;
    blender.reset()?;
    blender.observe_sums(&[1.0; 3], &[1.0; 3])?;
    blender.reweight()?;
    let (weights, flags, floored) = state(&mut blender)?;
    close(&weights, &[0.1, 0.1, 0.8], 1e-11);
    assert_eq!((flags, floored), (Flags::FLOORED, 0b100));
    // The flag and its modalities are part of a saved state.
    let mut other = face.blender_with(config)?;
    other.load(&blender.save()?)?;
    assert_eq!(state(&mut other)?, (weights, flags, floored));
    blender.load(&held)?;
    assert_eq!(state(&mut blender)?, (vec![1.0, 0.0, 0.0], Flags::HELD | Flags::CLAMPED, 0));
    Ok(())
}

/// A saved state can hold an S that no observations have. Each backend has the weights and flags of `solve`.
fn a_loaded_matrix_without_pivots(face: Face) -> Outcome {
    let (mut random, mut inexact) = (Random(45), 0);
    for round in 0..60 {
        let k = 2 + random.below(if round % 6 == 0 { 31 } else { 4 });
        let mut policy = if round % 4 == 0 { BOTH } else { CORRELATED };
        if policy.negative == Negative::Clamp && round % 2 == 0 {
            policy.min_weight[..k].fill_with(|| random.pick(&[0.0, 0.7 / k as f64]));
        }
        let config = Config { average: Average::Mean, policy, threads: 1, ..Config::new(k as u32) };
        let mut blender = face.blender_with(config)?;
        for _ in 0..k {
            let c: Vec<f64> = random.numbers(k).iter().map(|c| c + 0.5).collect();
            blender.observe_sums(&c, &random.numbers(k))?;
        }
        let mut s: Vec<f64> = random.numbers(k * k);
        (0..k).for_each(|i| s[i * (k + 1)] = s[i * (k + 1)].abs());
        let bytes: Vec<u8> = s.iter().flat_map(|s| s.to_le_bytes()).collect();
        let saved = forged_second_moments(&blender.save()?, k, &bytes);
        blender.load(&saved)?;
        assert_eq!(blender.second_moments()?, s);
        let before = blender.report()?.weights;
        blender.reweight()?;
        let (report, solution) = (blender.report()?, solve(&blender.report()?.mean, &s, &policy)?);
        let want = (solution.weights.unwrap_or(before), solution.flags);
        assert_eq!((report.weights, report.flags), want, "K = {k}, {policy:?}, {s:?}");
        inexact += u32::from(report.flags.contains(Flags::INEXACT));
    }
    assert!(inexact > 10, "{inexact}");
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
