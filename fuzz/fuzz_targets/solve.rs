//! `gradblend_solve` on arbitrary numbers: finite weights that sum to 1, or HELD; an error exactly for invalid numbers.

#![no_main]

use gradblend::{Flags, Negative};
use gradblend_fuzz::{expect, is_valid, numbers, policy, run};
use gradblend_testkit::Face;

libfuzzer_sys::fuzz_target!(|data: &[u8]| run(data, |u| {
    let (policy, k) = (policy(u)?, u.int_in_range(1..=6)?);
    let (numerator, second_moment) = (numbers(u, k)?, numbers(u, k * k)?);
    let finite = numerator.iter().chain(&second_moment).all(|number| number.is_finite());
    let valid = is_valid(&policy, k) && finite && (0..k).all(|i| second_moment[i * (k + 1)] >= 0.0);
    let Some(solution) = expect(Face::FFI.solve(&numerator, &second_moment, &policy), valid) else {
        return Ok(Ok(()));
    };
    assert!(!solution.flags.contains(Flags::NONFINITE) && Flags::all().contains(solution.flags));
    assert_eq!(solution.weights.is_none(), solution.flags.contains(Flags::HELD));
    let weights = solution.weights.unwrap_or_else(|| vec![1.0 / k as f64; k]);
    let (sum, magnitude) = weights.iter().fold((0.0, 0.0), |(sum, magnitude), w| (sum + w, magnitude + w.abs()));
    assert!((sum - 1.0_f64).abs() <= 4.0 * k as f64 * magnitude * 2f64.powi(-53), "{weights:?}");
    let bounded = |(w, least): (&f64, &f64)| *w >= *least || solution.flags.contains(Flags::HELD);
    let least = &policy.min_weight;
    assert!(policy.negative == Negative::Signed || weights.iter().zip(least).all(bounded), "{weights:?}, {least:?}");
    Ok(Ok(()))
}));
