//! `save` and `load`: a restored state continues bit for bit, and an altered one is rejected and changes nothing.

use gradblend::{Average, Cadence, Config, Error, Negative, Overfitting, Policy};
use gradblend_testkit::proptest::prelude::*;
use gradblend_testkit::{
    Face, Outcome, Random, Result, TestBlender, forged, property, rejected, rejected_as, version_1,
};

gradblend_testkit::tests! {
    once:
        restored_states_continue,
        every_altered_byte_is_noticed,
        impossible_states_are_rejected,
        states_of_version_1_are_read,
        other_configurations_are_rejected,
        random_states;
}

/// Checks that a state is rejected as corrupt.
#[track_caller]
fn corrupt(result: Result<()>, words: &str) {
    let failure = rejected_as(result, 8, &format!("not a saved state|{words}"));
    assert!(matches!(failure.error, None | Some(Error::CorruptState { .. })));
}

/// Save, load elsewhere, continue: the same as never stopping.
fn restored_states_continue(face: Face) -> Outcome {
    fn put_sums(blender: &mut TestBlender, random: &mut Random, i: usize) -> Result<()> {
        let (d, c) = (random.numbers(3), random.number());
        blender.set_pending(&if i == 9 { [f64::NAN; 3] } else { [c, 1.0, 2.0] }, &d)
    }
    for average in [Average::Mean, Average::Ema { decay: 0.9 }] {
        for overfitting in [Overfitting::Uncorrelated, Overfitting::Correlated] {
            let policy = Policy { overfitting, negative: Negative::Signed, ..Policy::default() };
            let config = Config { average, policy, cadence: Cadence::EveryObservation, ..Config::new(3) };
            let (mut stopped, mut straight) = (face.blender_with(config)?, face.blender_with(config)?);
            let mut randoms = [Random(33), Random(33)];
            for i in 0..20 {
                put_sums(&mut stopped, &mut randoms[0], i)?;
                if i % 5 == 4 {
                    // Pending sums are part of the state.
                    let saved = stopped.save()?;
                    let mut other = face.blender_with(config)?;
                    other.load(&saved)?;
                    assert_eq!(other.save()?, saved);
                    assert_eq!(other.weights()?, stopped.weights()?);
                    stopped = other;
                }
                stopped.observe()?;
                put_sums(&mut straight, &mut randoms[1], i)?;
                straight.observe()?;
            }
            assert_eq!(stopped.save()?, straight.save()?);
        }
    }
    Ok(())
}

/// A blender of two modalities whose state has no zero part, and the state.
fn observed(face: Face) -> Result<(TestBlender, Vec<u8>)> {
    let mut blender = face.blender(2)?;
    blender.observe_sums(&[1.0, 1.0], &[1.0, 2.0])?;
    blender.observe_sums(&[0.5, f64::NAN], &[1.0, 2.0])?;
    blender.reweight()?;
    blender.set_pending(&[3.0, 4.0], &[5.0, 6.0])?;
    let saved = blender.save()?;
    Ok((blender, saved))
}

fn every_altered_byte_is_noticed(face: Face) -> Outcome {
    let (mut blender, saved) = observed(face)?;
    for i in 0..saved.len() {
        for flip in [1 << (i % 8), 0x80, 0xff] {
            let mut altered = saved.clone();
            altered[i] ^= flip;
            corrupt(blender.load(&altered), "");
        }
        corrupt(blender.load(&saved[..i]), "");
    }
    for more in 1..16 {
        let longer = [&saved[..], &vec![0; more]].concat();
        corrupt(blender.load(&longer), "");
    }
    assert_eq!(blender.save()?, saved);
    Ok(())
}

fn impossible_states_are_rejected(face: Face) -> Outcome {
    let (mut blender, saved) = observed(face)?;
    corrupt(blender.load(&[]), "shorter than a header");
    corrupt(blender.load(&[0; 400]), "does not start with");
    let mut altered = saved.clone();
    altered[140] ^= 1;
    corrupt(blender.load(&altered), "checksum");
    assert_eq!(forged(&saved, &[]), saved);
    // For K = 2 the version is at 8, K at 12, average, flags and non-finite bits at 16, 20 and 24, the decay at 28, the
    // normaliser at 36, n at 44, the weights at 92, the means at 108, S at 124, the means of squares at 156, `floored` at 172.
    let changes = [(8, 3), (8, 0), (11, 1), (12, 0), (12, 33), (15, 1), (16, 2), (20, 32), (24, 4), (172, 4)];
    for (at, byte) in changes {
        corrupt(blender.load(&forged(&saved, &[(at, &[byte])])), "");
    }
    for at in (92..172).step_by(8) {
        let nan = forged(&saved, &[(at, &f64::NAN.to_le_bytes())]);
        corrupt(blender.load(&nan), if at < 156 { "not finite" } else { "NaN" });
    }
    for at in [124, 156] {
        corrupt(blender.load(&forged(&saved, &[(at, &(-1.0_f64).to_le_bytes())])), "negative");
    }
    assert_eq!(blender.save()?, saved);
    // From here on a state without an observation.
    let empty = face.blender(2)?.save()?;
    let one = 1_u64.to_le_bytes();
    let (weight, moment) = ("weight", "moment");
    // Numbers to put at some positions, whether there is an observation, and what the message names.
    type Case<'a> = (&'a [(usize, f64)], bool, &'a str);
    let cases: [Case<'_>; 7] = [
        (&[], true, weight),
        (&[(36, 0.5)], false, weight),
        (&[(36, 2.0)], true, weight),
        (&[(36, -1.0)], true, weight),
        (&[(108, 1.0)], false, moment),
        (&[(156, 1.0)], false, "without an observation"),
        (&[(36, 1e-300), (108, 1e300)], true, moment),
    ];
    for (numbers, has_observation, reason) in cases {
        let numbers: Vec<_> = numbers.iter().map(|(at, number)| (*at, number.to_le_bytes())).collect();
        let mut changes: Vec<(usize, &[u8])> = numbers.iter().map(|(at, number)| (*at, &number[..])).collect();
        changes.extend(has_observation.then_some((44, &one[..])));
        corrupt(blender.load(&forged(&empty, &changes)), reason);
    }
    blender.load(&empty)?;
    Ok(())
}

/// Version 1 has neither the means of squares nor `floored`: the standard errors are then unknown until a reset.
fn states_of_version_1_are_read(face: Face) -> Outcome {
    let (mut blender, saved) = observed(face)?;
    let first = version_1(&saved, 2);
    let before = blender.report()?;
    let mut other = face.blender(2)?;
    other.load(&first)?;
    let report = other.report()?;
    assert_eq!((&report.weights, &report.mean, report.observed), (&before.weights, &before.mean, before.observed));
    assert_eq!(report.standard_error, [f64::INFINITY; 2]);
    other.observe_sums(&[1.0; 2], &[1.0; 2])?;
    assert_eq!(other.report()?.standard_error, [f64::INFINITY; 2]);
    let second = other.save()?;
    blender.load(&second)?;
    assert_eq!(blender.save()?, second);
    other.reset()?;
    for c in [1.0, 2.0] {
        other.observe_sums(&[c; 2], &[1.0; 2])?;
    }
    assert!(other.report()?.standard_error.iter().all(|error| error.is_finite() && *error > 0.0));
    corrupt(blender.load(&first[..first.len() - 1]), "bytes");
    Ok(())
}

/// A state fits a blender of the same K, average and decay; the policy and the cadence may differ.
fn other_configurations_are_rejected(face: Face) -> Outcome {
    let (mut blender, saved) = observed(face)?;
    let policy =
        Policy { overfitting: Overfitting::Correlated, negative: Negative::Signed, damping: 0.5, ..Policy::default() };
    let base = Config { policy, cadence: Cadence::EveryObservation, threads: 1, ..Config::new(2) };
    let decay = |decay| Config { average: Average::Ema { decay }, ..base };
    let close = f64::from_bits(0.99_f64.to_bits() - 1);
    for (config, what, expected, got) in [
        (Config { modalities: 3, ..base }, "modalities", "2", "3"),
        (Config { average: Average::Mean, ..base }, "average", "ema", "mean"),
        (decay(0.5), "decay", "0.99", "0.5"),
        (decay(close), "decay", "0.99", &close.to_string()),
    ] {
        let other = face.blender_with(config)?.save()?;
        let want = Error::StateMismatch { what, expected: expected.into(), got: got.into() };
        rejected(blender.load(&other), &want, &format!("{what}|{expected}|{got}"));
        assert_eq!(blender.save()?, saved);
    }
    blender.load(&face.blender_with(base)?.save()?)?;
    // -0 is the same decay as 0.
    let negative_zero = face.blender_with(decay(-0.0))?.save()?;
    face.blender_with(decay(0.0))?.load(&negative_zero)?;
    Ok(())
}

/// Random states survive a round trip, and any change of one to three bytes is noticed.
fn random_states(face: Face) -> Outcome {
    let number = prop_oneof![8 => -1e3..1e3, 1 => Just(0.0), 1 => Just(f64::NAN), 1 => Just(1e200)];
    let sums = prop::collection::vec(prop::collection::vec(number, 64), 0..5);
    let changes = prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4);
    property(48, (1..=32_usize, sums, changes, 0.0..1.0), |(k, sums, changes, decay)| {
        let config = Config { average: Average::Ema { decay }, threads: 1, ..Config::new(k as u32) };
        let (mut blender, mut other) = (face.blender_with(config)?, face.blender_with(config)?);
        for sums in &sums {
            blender.observe_sums(&sums[..k], &sums[k..2 * k])?;
            blender.reweight()?;
            blender.set_pending(&sums[..k], &sums[k..2 * k])?;
        }
        let saved = blender.save()?;
        let mut altered = saved.clone();
        changes.iter().for_each(|(at, flip)| altered[at.index(saved.len())] ^= flip);
        if altered != saved {
            corrupt(other.load(&altered), "");
        }
        other.load(&saved)?;
        assert_eq!(other.save()?, saved);
        // NaN differs from itself, its text does not.
        assert_eq!(format!("{:?}", other.report()?), format!("{:?}", blender.report()?));
        Ok(())
    })
}
