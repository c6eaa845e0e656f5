//! `observe`: averages, the scale, skipped observations, reset, and the saved state.

mod common;

use common::{Outcome, Place, Random, STREAM, Tensor};
use gradblend::{Average, Blender, Cadence, Config, Error, Flags, GradScale, Negative, Overfitting, Policy};

tests! {
    once:
        averages_are_what_they_are_called,
        nothing_pending_is_an_observation_of_zeros,
        not_finite_changes_a_counter_and_a_flag,
        gradients_that_are_not_finite_never_enter,
        scale_is_judged_after_division,
        reset_keeps_the_weights_alone,
        saved_states_go_on,
        altered_states_are_refused;
}

/// Moments from a list of (c, d), straight from their definition.
fn moments(average: Average, seen: &[([f64; 2], [f64; 2])]) -> ([f64; 2], [f64; 4]) {
    let n = seen.len() as i32;
    let share = |i: usize| match average {
        Average::Mean => 1.0 / f64::from(n),
        Average::Ema { decay } => (1.0 - decay) * decay.powi(n - 1 - i as i32) / (1.0 - decay.powi(n)),
    };
    let (mut mean, mut second) = ([0.0; 2], [0.0; 4]);
    for (i, (c, d)) in seen.iter().enumerate() {
        for j in 0..2 {
            mean[j] += share(i) * c[j];
            for k in 0..2 {
                second[2 * j + k] += share(i) * d[j] * d[k];
            }
        }
    }
    (mean, second)
}

fn close(got: &[f64], want: &[f64]) {
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{got} against {want}");
    }
}

fn averages_are_what_they_are_called(place: Place) -> Outcome {
    for average in
        [Average::Mean, Average::Ema { decay: 0.9 }, Average::Ema { decay: 0.99 }, Average::Ema { decay: 0.0 }]
    {
        let mut random = Random(31);
        let mut blender = place.blender_with(Config { average, ..Config::new(2) })?;
        let mut seen = Vec::new();
        for n in 1..300_u64 {
            let (c, d) = ([random.number(), random.number()], [random.number(), random.number()]);
            seen.push((c, d));
            place.set_pending(&mut blender, &c, &d);
            blender.observe(STREAM())?;
            assert_eq!(place.pending(&blender), [0.0; 4], "observe zeroes the pending sums");
            let (mean, second) = moments(average, &seen);
            let report = blender.report(STREAM())?;
            assert_eq!((report.observed, report.skipped, report.flags), (n, 0, Flags::empty()));
            close(&report.mean, &mean);
            close(&report.second_moment, &[second[0], second[3]]);
            close(&blender.second_moments(STREAM())?, &second);
            close(&report.ogr, &[second[0].sqrt() / mean[0].abs(), second[3].sqrt() / mean[1].abs()]);
            let uniform = (second.iter().sum::<f64>() / 4.0).sqrt() / (mean.iter().sum::<f64>() / 2.0).abs();
            close(&[report.ogr_uniform / uniform], &[1.0]);
        }
    }
    Ok(())
}

fn nothing_pending_is_an_observation_of_zeros(place: Place) -> Outcome {
    let mut blender = place.blender(2)?;
    let report = blender.report(STREAM())?;
    assert_eq!((report.observed, &report.mean), (0, &vec![0.0; 2]));
    assert!(report.ogr.iter().all(|ogr| ogr.is_nan()) && report.ogr_blend.is_nan());
    blender.observe(STREAM())?;
    let report = blender.report(STREAM())?;
    assert_eq!((report.observed, report.mean, report.second_moment), (1, vec![0.0; 2], vec![0.0; 2]));
    Ok(())
}

fn not_finite_changes_a_counter_and_a_flag(place: Place) -> Outcome {
    let mut blender = place.blender_with(Config { cadence: Cadence::EveryObservation, ..Config::new(3) })?;
    place.set_pending(&mut blender, &[1.0, 2.0, 3.0], &[1.0, 1.0, 1.0]);
    blender.observe(STREAM())?;
    let before = blender.report(STREAM())?;
    let bad = [
        ([f64::NAN, 1.0, 1.0], [1.0, 1.0, 1.0], 0b001),
        ([1.0, f64::INFINITY, 1.0], [1.0, 1.0, 1.0], 0b010),
        ([1.0, 1.0, 1.0], [1.0, f64::NEG_INFINITY, f64::NAN], 0b110),
        // Its square is what enters S.
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1e200], 0b100),
    ];
    for (skipped, (c, d, names)) in bad.into_iter().enumerate() {
        place.set_pending(&mut blender, &c, &d);
        blender.observe(STREAM())?;
        let report = blender.report(STREAM())?;
        assert_eq!((report.skipped, report.nonfinite), (skipped as u64 + 1, names));
        assert!(report.flags.contains(Flags::NONFINITE));
        assert_eq!((&report.weights, &report.mean, report.observed), (&before.weights, &before.mean, before.observed));
        assert_eq!(place.pending(&blender), [0.0; 6], "a skipped observation zeroes the pending sums too");
    }
    blender.set_weights(&[3.0, 2.0, 1.0], STREAM())?;
    place.set_pending(&mut blender, &[f64::NAN; 3], &[1.0; 3]);
    blender.observe(STREAM())?;
    assert_eq!(blender.report(STREAM())?.weights, [3.0, 2.0, 1.0], "a skipped observation does not reweight");
    place.set_pending(&mut blender, &[1.0; 3], &[1.0; 3]);
    blender.observe(STREAM())?;
    let report = blender.report(STREAM())?;
    assert_eq!((report.flags, report.nonfinite, report.skipped, report.observed), (Flags::empty(), 0, 5, 2));
    Ok(())
}

/// One NaN or infinity anywhere in the gradients, also against a zero.
fn gradients_that_are_not_finite_never_enter(place: Place) -> Outcome {
    let mut random = Random(32);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 1023, 4999] {
            let mut blender = place.blender(2)?;
            let mut tensors = [Tensor::<f32>::random(&mut random, 5000, 2, 0, 0)];
            tensors[0].valid[at] = 0.0;
            tensors[0].modalities[1].iter_mut().for_each(|v| v[at] = bad);
            place.run(&mut blender, &mut tensors, Blender::step)?;
            let report = blender.report(STREAM())?;
            assert_eq!((report.observed, report.skipped, report.nonfinite), (0, 1, 0b10), "{bad} at {at}");
            assert!(!tensors[0].blended[at].is_finite(), "blend passes it on");
        }
    }
    Ok(())
}

fn scale_is_judged_after_division(place: Place) -> Outcome {
    let mut blender = place.blender(1)?;
    let cell = place.buffer(vec![1.0]);
    // SAFETY: `cell` lives until another scale is set, and is written to between calls only.
    blender.set_grad_scale(unsafe { GradScale::from_raw(cell.address()) })?;
    for (scale, c, d, kept) in [
        (0.0, 1.0, 1.0, false),
        (f32::NAN, 1.0, 1.0, false),
        (f32::INFINITY, 1.0, 1.0, false),
        (2.0, 8.0, 4.0, true),
        (f32::MIN_POSITIVE, 1e300, 1.0, false),
    ] {
        blender.reset(STREAM())?;
        cell.set(scale);
        place.set_pending(&mut blender, &[c], &[d]);
        blender.observe(STREAM())?;
        let report = blender.report(STREAM())?;
        assert_eq!(report.observed == 1, kept, "scale {scale}");
        if kept {
            assert_eq!((report.mean[0], report.second_moment[0]), (2.0, 1.0));
        }
    }
    // SAFETY: NULL is a scale of 1.
    blender.set_grad_scale(unsafe { GradScale::from_raw(std::ptr::null()) })?;
    blender.reset(STREAM())?;
    place.set_pending(&mut blender, &[3.0], &[1.0]);
    blender.observe(STREAM())?;
    assert_eq!(blender.report(STREAM())?.mean, [3.0]);
    Ok(())
}

fn reset_keeps_the_weights_alone(place: Place) -> Outcome {
    let mut blender = place.blender(2)?;
    place.set_pending(&mut blender, &[1.0, 1.0], &[1.0, 2.0]);
    blender.observe(STREAM())?;
    blender.reweight(STREAM())?;
    let weights = blender.report(STREAM())?.weights;
    place.set_pending(&mut blender, &[f64::NAN, 1.0], &[1.0, 2.0]);
    blender.observe(STREAM())?;
    place.set_pending(&mut blender, &[5.0, 5.0], &[5.0, 5.0]);
    let addresses = (blender.pending_sums(), blender.device_weights());
    blender.reset(STREAM())?;
    let report = blender.report(STREAM())?;
    assert_eq!((report.observed, report.skipped, report.flags, report.nonfinite), (0, 0, Flags::empty(), 0));
    assert_eq!(
        (report.mean, report.second_moment, place.pending(&blender)),
        (vec![0.0; 2], vec![0.0; 2], vec![0.0; 4])
    );
    assert_eq!(report.weights, weights);
    assert_eq!((blender.pending_sums(), blender.device_weights()), addresses);
    Ok(())
}

/// Save, load elsewhere, go on: the same as never stopping.
fn saved_states_go_on(place: Place) -> Outcome {
    for average in [Average::Mean, Average::Ema { decay: 0.9 }] {
        for overfitting in [Overfitting::Uncorrelated, Overfitting::Correlated] {
            let policy = Policy { overfitting, negative: Negative::Signed, ..Policy::default() };
            let config = Config { average, policy, cadence: Cadence::EveryObservation, ..Config::new(3) };
            let mut random = Random(33);
            let mut whole = place.blender_with(config)?;
            for i in 0..20 {
                let d = [random.number(), random.number(), random.number()];
                let c = if i == 9 { [f64::NAN; 3] } else { [random.number(), 1.0, 2.0] };
                place.set_pending(&mut whole, &c, &d);
                if i % 5 == 4 {
                    // Pending sums are part of the state.
                    let saved = whole.save(STREAM())?;
                    let mut other = place.blender_with(config)?;
                    other.load(&saved, STREAM())?;
                    assert_eq!(other.save(STREAM())?, saved);
                    assert_eq!(place.weights(&other), place.weights(&whole));
                    whole = other;
                }
                whole.observe(STREAM())?;
            }
            let mut straight = place.blender_with(config)?;
            let mut random = Random(33);
            for i in 0..20 {
                let d = [random.number(), random.number(), random.number()];
                let c = if i == 9 { [f64::NAN; 3] } else { [random.number(), 1.0, 2.0] };
                place.set_pending(&mut straight, &c, &d);
                straight.observe(STREAM())?;
            }
            assert_eq!(whole.save(STREAM())?, straight.save(STREAM())?);
        }
    }
    Ok(())
}

/// Every single byte altered, and every truncation, is noticed, and nothing is changed by it.
fn altered_states_are_refused(place: Place) -> Outcome {
    let mut blender = place.blender(2)?;
    place.set_pending(&mut blender, &[1.0, 1.0], &[1.0, 2.0]);
    blender.observe(STREAM())?;
    let saved = blender.save(STREAM())?;
    for i in 0..saved.len() {
        let mut altered = saved.clone();
        altered[i] ^= 1 << (i % 8);
        assert!(matches!(blender.load(&altered, STREAM()), Err(Error::CorruptState { .. })), "byte {i}");
        assert!(matches!(blender.load(&saved[..i], STREAM()), Err(Error::CorruptState { .. })), "{i} bytes");
    }
    let longer: Vec<u8> = saved.iter().copied().chain([0]).collect();
    assert!(matches!(blender.load(&longer, STREAM()), Err(Error::CorruptState { .. })));
    assert_eq!(blender.save(STREAM())?, saved);
    Ok(())
}
