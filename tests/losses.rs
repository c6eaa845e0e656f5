//! The loss-based estimator, and a test for each mistake seen in public implementations of it (end of docs/method.md).

use gradblend::{Error, Flags, Losses, MeanLoss, Negative, Policy, Schedule, Trainee, gb_estimate, ogr};
use gradblend_testkit::{Outcome, rejected};

fn losses(train: f64, valid: f64) -> Losses {
    Losses { train, valid }
}

fn weights(before: &[Losses], after: &[Losses]) -> gradblend::Result<Vec<f64>> {
    Ok(ogr(before, after, &Policy::default())?.solution.weights.unwrap_or_default())
}

fn close(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{got:?} against {want:?}");
    assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-9), "{got:?} against {want:?}");
}

/// Mistake: absolute losses instead of differences. An offset that both moments share must not matter.
#[test]
fn differences_count() -> Outcome {
    let (before, after) = ([losses(2.0, 2.1), losses(3.0, 3.0)], [losses(1.0, 1.5), losses(1.5, 2.0)]);
    let shift = |list: [Losses; 2]| list.map(|l| losses(l.train + 100.0, l.valid + 100.0));
    close(&weights(&before, &after)?, &weights(&shift(before), &shift(after))?);
    let estimate = ogr(&before, &after, &Policy::default())?;
    close(&estimate.delta_g, &[0.6, 1.0]);
    close(&estimate.delta_o, &[0.4, 0.5]);
    close(&estimate.ogr, &[0.4 / 0.6, 0.5]);
    Ok(())
}

/// Mistake: abs() that hides the sign of dG. A modality whose validation loss rose gets no weight.
#[test]
fn sign_of_the_gain_counts() -> Outcome {
    let (before, after) = ([losses(2.0, 2.0); 2], [losses(1.0, 2.5), losses(1.0, 1.5)]);
    close(&weights(&before, &after)?, &[0.0, 1.0]);
    assert_eq!(ogr(&before, &after, &Policy::default())?.solution.flags, Flags::CLAMPED);
    let signed = ogr(&before, &after, &Policy { negative: Negative::Signed, ..Policy::default() })?;
    // a = (-0.5 / 1.5^2, 0.5 / 0.5^2)
    let a = [-0.5 / 2.25, 2.0];
    close(&signed.solution.weights.unwrap_or_default(), &a.map(|x| x / (a[0] + a[1])));
    Ok(())
}

/// Mistake: a negative gap replaced by 1e-4, so that an under-fitted head takes all the weight. The gap is squared.
#[test]
fn negative_gap_is_as_large_as_a_positive_one() -> Outcome {
    let before = [losses(2.0, 2.0); 2];
    let after = [losses(1.5, 1.0), losses(0.5, 1.0)];
    close(&ogr(&before, &after, &Policy::default())?.delta_o, &[-0.5, 0.5]);
    close(&weights(&before, &after)?, &[0.5, 0.5]);
    Ok(())
}

/// Mistake: sums over loaders of different length instead of means.
#[test]
fn loaders_of_different_length_compare() {
    let (mut short, mut long) = (MeanLoss::default(), MeanLoss::default());
    short.add(1.0, 8);
    short.add(4.0, 4);
    for _ in 0..10 {
        long.add(1.0, 8);
        long.add(4.0, 4);
    }
    assert_eq!((short.mean(), long.mean()), (2.0, 2.0));
    short.add(f64::NAN, 0);
    assert_eq!(short.mean(), 2.0, "an empty batch counts for nothing");
    assert!(MeanLoss::default().mean().is_nan(), "no sample, no loss");
}

/// Mistakes: weights that sum to 2, the ratio inverted (O / G^2), softmax in place of Z.
#[test]
fn weights_are_gain_over_squared_gap_and_sum_to_one() -> Outcome {
    let before = [losses(2.0, 2.0); 3];
    let after = [losses(1.0, 1.5), losses(1.0, 1.25), losses(0.5, 1.5)];
    // dG = .5, .75, .5; dO = .5, .25, 1; dG / dO^2 = 2, 12, .5.
    let got = weights(&before, &after)?;
    close(&got, &[2.0 / 14.5, 12.0 / 14.5, 0.5 / 14.5]);
    assert!((got.iter().sum::<f64>() - 1.0).abs() < 1e-14);
    Ok(())
}

/// Mistake: 0 / 0 giving NaN weights that train on.
#[test]
fn nothing_gained_and_nothing_lost() -> Outcome {
    let still = [losses(1.0, 1.0); 3];
    let estimate = ogr(&still, &still, &Policy::default())?;
    assert_eq!((estimate.solution.weights, estimate.solution.flags), (None, Flags::HELD));
    assert!(estimate.ogr.iter().all(|ogr| ogr.is_nan()));
    // An over-fitted state: every validation loss rises, which is nothing to go by either.
    let worse = ogr(&still, &[losses(0.5, 1.2); 3], &Policy::default())?;
    assert_eq!(worse.solution.weights, None);
    // One that did not move has no weight, and does not spoil the others'.
    close(&weights(&still, &[losses(1.0, 1.0), losses(0.5, 0.75), losses(0.5, 0.75)])?, &[0.0, 0.5, 0.5]);
    Ok(())
}

/// Tiny losses weigh like large ones.
#[test]
fn scaling_all_losses_changes_nothing() -> Outcome {
    for scale in [1e-170, 1e-30, 1.0, 1e30, 1e170] {
        let before = [losses(2.0 * scale, 2.0 * scale); 2];
        let after = [losses(scale, 1.5 * scale), losses(0.5 * scale, 1.5 * scale)];
        close(&weights(&before, &after)?, &[0.8, 0.2]);
    }
    Ok(())
}

/// Least weights bind here as they do for gradients.
#[test]
fn least_weights() -> Outcome {
    let before = [losses(2.0, 2.0); 3];
    let after = [losses(1.0, 1.5), losses(1.0, 1.25), losses(0.5, 1.5)];
    let mut policy = Policy::default();
    policy.min_weight[2] = 0.1;
    // dG / dO^2 = 2, 12, .5: the third has less than its least weight. The others keep dG - Q w of one value.
    let solution = ogr(&before, &after, &policy)?.solution;
    let w = solution.weights.ok_or("held")?;
    assert_eq!((solution.flags, w[2]), (Flags::FLOORED, 0.1));
    let (gain, variance) = (0.5 * w[0] + 0.75 * w[1] + 0.05, 0.25 * w[0] * w[0] + w[1] * w[1] / 16.0 + 0.01);
    close(&[0.25 * w[0] * gain - 0.5 * variance], &[w[1] / 16.0 * gain - 0.75 * variance]);
    close(&[w[0] + w[1]], &[0.9]);
    Ok(())
}

/// Training is a table of losses by (modality, epochs trained); modality 9 cannot be trained.
#[derive(Default)]
struct Scripted {
    state: Vec<u64>,
    log: Vec<String>,
    fails_at: Option<usize>,
    nan_at: Option<usize>,
}

#[derive(Debug, PartialEq)]
enum Failure {
    Training(usize),
    Estimate(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Estimate(error)
    }
}

impl Trainee for Scripted {
    type Checkpoint = Vec<u64>;
    type Error = Failure;

    fn modalities(&self) -> usize {
        self.state.len()
    }
    fn save(&mut self) -> Result<Vec<u64>, Failure> {
        Ok(self.state.clone())
    }
    fn restore(&mut self, checkpoint: &Vec<u64>) -> Result<(), Failure> {
        self.state.clone_from(checkpoint);
        self.log.push("restore".into());
        Ok(())
    }
    fn train_modality(&mut self, modality: usize, epochs: u64) -> Result<(), Failure> {
        self.log.push(format!("train {modality}"));
        self.state[modality] += epochs;
        if self.fails_at == Some(modality) { Err(Failure::Training(modality)) } else { Ok(()) }
    }
    fn losses(&mut self, modality: usize) -> Result<Losses, Failure> {
        let trained = self.state[modality] as f64;
        if self.nan_at == Some(modality) && trained > 3.0 {
            return Ok(losses(f64::NAN, 1.0));
        }
        Ok(losses(3.0 - 0.2 * trained, 3.0 - 0.1 * trained / (modality + 1) as f64))
    }
}

#[test]
fn gb_estimate_trains_each_alone_and_restores() -> Result<(), Failure> {
    let mut trainee = Scripted { state: vec![3; 3], ..Scripted::default() };
    let estimate = gb_estimate(&mut trainee, 5, &Policy::default())?;
    assert_eq!(trainee.state, [3; 3]);
    assert_eq!(trainee.log, ["restore", "train 0", "restore", "train 1", "restore", "train 2", "restore"]);
    close(&estimate.delta_g, &[0.5, 0.25, 0.5 / 3.0]);
    close(&estimate.delta_o, &[0.5, 0.75, 1.0 - 0.5 / 3.0]);
    Ok(())
}

#[test]
fn gb_estimate_restores_after_an_error() {
    let mut trainee = Scripted { state: vec![3; 3], fails_at: Some(1), ..Scripted::default() };
    assert_eq!(gb_estimate(&mut trainee, 5, &Policy::default()), Err(Failure::Training(1)));
    assert_eq!(trainee.state, [3; 3]);
    let mut trainee = Scripted { state: vec![3; 3], nan_at: Some(2), ..Scripted::default() };
    match gb_estimate(&mut trainee, 5, &Policy::default()) {
        Err(Failure::Estimate(Error::Loss { modality: 2, which: "training", when: "after training", got })) => {
            assert!(got.is_nan());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(trainee.state, [3; 3]);
}

#[test]
fn schedules() -> Outcome {
    let offline = Schedule::offline();
    assert!(offline.starts(0) && !(1..100).any(|epoch| offline.starts(epoch) || offline.ends(epoch)));
    assert_eq!(offline.len(7), None);
    let online = Schedule::online(10, 5)?;
    let starts: Vec<u64> = (0..30).filter(|epoch| online.starts(*epoch)).collect();
    let ends: Vec<u64> = (0..30).filter(|epoch| online.ends(*epoch)).collect();
    assert_eq!((starts, ends), (vec![0, 10, 15, 20, 25], vec![9, 14, 19, 24, 29]));
    assert_eq!((online.len(9), online.len(10)), (Some(10), Some(5)));
    assert!(!online.ends(u64::MAX));
    Ok(())
}

#[test]
fn invalid_input() {
    let policy = Policy::default();
    let (good, bad) = (losses(1.0, 1.0), losses(1.0, f64::NAN));
    let want = Error::Loss { modality: 1, which: "validation", when: "at the checkpoint", got: f64::NAN };
    rejected(ogr(&[good, bad], &[good; 2], &policy), &want, "validation loss of modality 1");
    let (up, down) = (losses(1.0, 1e308), losses(1.0, -1e308));
    let (which, when) = ("difference of the", "before and after training");
    let want = Error::Loss { modality: 1, which, when, got: f64::INFINITY };
    rejected(ogr(&[good, up], &[good, down], &policy), &want, "modality 1");
    let mut bad_policy = policy;
    bad_policy.min_weight[2] = 0.1;
    let want = Error::MinWeight { modality: 2, expected: "0 for a modality that does not exist", got: 0.1 };
    rejected(ogr(&[good; 2], &[good; 2], &bad_policy), &want, "min_weight of modality 2");
    // Before any training.
    let mut trainee = Scripted { state: vec![3; 2], ..Scripted::default() };
    assert_eq!(gb_estimate(&mut trainee, 5, &bad_policy), Err(Failure::Estimate(want)));
    assert!(trainee.log.is_empty(), "{:?}", trainee.log);
    let count = Error::Count { what: "the losses after training", expected: 2, got: 1 };
    rejected(ogr(&[good; 2], &[good], &policy), &count, "got 1");
    rejected(Schedule::online(0, 5), &Error::Schedule { what: "warm-up" }, "warm-up");
    rejected(Schedule::online(5, 0), &Error::Schedule { what: "super-epoch" }, "super-epoch");
}
