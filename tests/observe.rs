//! `observe` and `reset`: averages, the gradient scale, skipped observations.

use gradblend::{Average, Cadence, Config, Flags};
use gradblend_testkit::{Face, Moments, Outcome, Random, Tensor, TestBlender};

gradblend_testkit::tests! {
    once:
        averages_match_their_definition,
        standard_errors_are_the_spread_of_the_means,
        nothing_pending_is_an_observation_of_zeros,
        not_finite_changes_a_counter_and_a_flag,
        gradients_that_are_not_finite_never_enter,
        scale_is_judged_after_division,
        reset_keeps_the_weights_alone;
}

fn averages_match_their_definition(face: Face) -> Outcome {
    for average in
        [Average::Mean, Average::Ema { decay: 0.9 }, Average::Ema { decay: 0.99 }, Average::Ema { decay: 0.0 }]
    {
        let mut random = Random(31);
        let mut blender = face.blender_with(Config { average, ..Config::new(2) })?;
        let mut moments = Moments::new(2, average);
        for n in 1..300 {
            let (c, d) = (random.numbers(2), random.numbers(2));
            moments.observe(&[&*c, &*d].concat(), 1.0);
            blender.observe_sums(&c, &d)?;
            assert_eq!(blender.pending()?, [0.0; 4], "observe zeroes the pending sums");
            let report = blender.report()?;
            assert_eq!(report.flags, Flags::empty());
            moments.check(&report, &blender.second_moments()?, &format!("{average:?}, observation {n}"));
        }
    }
    Ok(())
}

/// Over many series of independent products, the means spread as their standard errors say.
fn standard_errors_are_the_spread_of_the_means(face: Face) -> Outcome {
    for (average, observations) in
        [(Average::Mean, 30), (Average::Ema { decay: 0.9 }, 100), (Average::Ema { decay: 0.97 }, 20)]
    {
        let (mut squares, mut errors) = (0.0, 0.0);
        let mut random = Random(33);
        for _ in 0..60 {
            let mut blender = face.blender_with(Config { average, threads: 1, ..Config::new(32) })?;
            for _ in 0..observations {
                let c: Vec<f64> = random.numbers(32).iter().map(|c| c + 3.0).collect();
                blender.observe_sums(&c, &[1.0; 32])?;
            }
            let report = blender.report()?;
            squares += report.mean.iter().map(|m| (m - 3.0).powi(2)).sum::<f64>();
            errors += report.standard_error.iter().map(|error| error.powi(2)).sum::<f64>();
            let signal = report.signal_to_noise();
            assert!((signal[0] - report.mean[0] / report.standard_error[0]).abs() < 1e-9 * signal[0]);
        }
        // Of 1,920 series: a spread of 3 %.
        assert!((squares / errors - 1.0).abs() < 0.12, "{average:?}: {}", squares / errors);
    }
    Ok(())
}

fn nothing_pending_is_an_observation_of_zeros(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    let report = blender.report()?;
    assert_eq!((report.observed, &report.mean), (0, &vec![0.0; 2]));
    assert!(report.ogr.iter().all(|ogr| ogr.is_nan()) && report.ogr_blend.is_nan());
    blender.observe()?;
    let report = blender.report()?;
    assert_eq!((report.observed, report.mean, report.second_moment), (1, vec![0.0; 2], vec![0.0; 2]));
    Ok(())
}

fn not_finite_changes_a_counter_and_a_flag(face: Face) -> Outcome {
    let mut blender = face.blender_with(Config { cadence: Cadence::EveryObservation, ..Config::new(3) })?;
    blender.observe_sums(&[1.0, 2.0, 3.0], &[1.0, 1.0, 1.0])?;
    let before = blender.report()?;
    let bad = [
        ([f64::NAN, 1.0, 1.0], [1.0, 1.0, 1.0], 0b001),
        ([1.0, f64::INFINITY, 1.0], [1.0, 1.0, 1.0], 0b010),
        ([1.0, 1.0, 1.0], [1.0, f64::NEG_INFINITY, f64::NAN], 0b110),
        // Its square is what enters S.
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1e200], 0b100),
    ];
    for (skipped, (c, d, names)) in bad.into_iter().enumerate() {
        blender.observe_sums(&c, &d)?;
        let report = blender.report()?;
        assert_eq!((report.skipped, report.nonfinite), (skipped as u64 + 1, names));
        assert!(report.flags.contains(Flags::NONFINITE));
        assert_eq!((&report.weights, &report.mean, report.observed), (&before.weights, &before.mean, before.observed));
        assert_eq!(blender.pending()?, [0.0; 6], "a skipped observation zeroes the pending sums too");
    }
    // Only d_k is squared. Where the square of a c_k overflows, the standard error is unknown.
    for decay in [0.99, 0.0] {
        let mut other = face.blender_with(Config { average: Average::Ema { decay }, ..Config::new(1) })?;
        for c in [1e300, 1.0, 2.0] {
            other.observe_sums(&[c], &[1.0])?;
        }
        let report = other.report()?;
        assert_eq!((report.observed, report.skipped, &*report.standard_error), (3, 0, &[f64::INFINITY][..]));
        let saved = other.save()?;
        other.load(&saved)?;
    }
    blender.set_weights(&[3.0, 2.0, 1.0])?;
    blender.set_pending(&[f64::NAN; 3], &[1.0; 3])?;
    blender.observe()?;
    assert_eq!(blender.report()?.weights, [3.0, 2.0, 1.0], "a skipped observation does not reweight");
    blender.set_pending(&[1.0; 3], &[1.0; 3])?;
    blender.observe()?;
    let report = blender.report()?;
    assert_eq!((report.flags, report.nonfinite, report.skipped, report.observed), (Flags::empty(), 0, 5, 2));
    Ok(())
}

/// One NaN or infinity anywhere in the gradients, also where its factor is 0.
fn gradients_that_are_not_finite_never_enter(face: Face) -> Outcome {
    let mut random = Random(32);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 1023, 4999] {
            let mut blender = face.blender(2)?;
            let mut tensors = [Tensor::<f32>::random(&mut random, 5000, 2, 0, 0)];
            tensors[0].valid[at] = 0.0;
            tensors[0].modalities[1].iter_mut().for_each(|v| v[at] = bad);
            face.run(&mut blender, &mut tensors, TestBlender::step)?;
            let report = blender.report()?;
            assert_eq!((report.observed, report.skipped, report.nonfinite), (0, 1, 0b10), "{bad} at {at}");
            assert!(!tensors[0].blended[at].is_finite(), "blend propagates it, as its weight is not 0");
        }
    }
    Ok(())
}

fn scale_is_judged_after_division(face: Face) -> Outcome {
    let mut blender = face.blender(1)?;
    let cell = face.array(vec![1.0]);
    // SAFETY: `cell` lives until another scale is set, and is written to between calls only.
    unsafe { blender.set_grad_scale(cell.address()) }?;
    for (scale, c, d, kept) in [
        (0.0, 1.0, 1.0, false),
        (f32::NAN, 1.0, 1.0, false),
        (f32::INFINITY, 1.0, 1.0, false),
        (2.0, 8.0, 4.0, true),
        (f32::MIN_POSITIVE, 1e300, 1.0, false),
    ] {
        blender.reset()?;
        cell.set(scale);
        blender.observe_sums(&[c], &[d])?;
        let report = blender.report()?;
        assert_eq!(report.observed == 1, kept, "scale {scale}");
        if kept {
            assert_eq!((report.mean[0], report.second_moment[0]), (2.0, 1.0));
        }
    }
    // SAFETY: NULL is a scale of 1.
    unsafe { blender.set_grad_scale(std::ptr::null()) }?;
    blender.reset()?;
    blender.observe_sums(&[3.0], &[1.0])?;
    assert_eq!(blender.report()?.mean, [3.0]);
    Ok(())
}

fn reset_keeps_the_weights_alone(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    blender.observe_sums(&[1.0, 1.0], &[1.0, 2.0])?;
    blender.reweight()?;
    let weights = blender.report()?.weights;
    blender.observe_sums(&[f64::NAN, 1.0], &[1.0, 2.0])?;
    blender.set_pending(&[5.0, 5.0], &[5.0, 5.0])?;
    let addresses = blender.addresses()?;
    blender.reset()?;
    let report = blender.report()?;
    assert_eq!((report.observed, report.skipped, report.flags, report.nonfinite), (0, 0, Flags::empty(), 0));
    assert_eq!((report.mean, report.second_moment, blender.pending()?), (vec![0.0; 2], vec![0.0; 2], vec![0.0; 4]));
    assert_eq!(report.weights, weights);
    assert_eq!(blender.addresses()?, addresses);
    Ok(())
}
