//! `gradblend_solve` on arbitrary numbers: weights that sum to 1, or HELD, and never NaN; an error writes nothing.

#![no_main]

use gradblend::ffi::gradblend_solve;
use gradblend_fuzz::{Number, config, expect, is_valid};
use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;

fn run(mut u: Unstructured<'_>) -> Result<()> {
    let config = config(&mut u)?;
    let k = config.modalities as usize;
    let mut numbers = |count| (0..count).map(|_| Ok(Number::arbitrary(&mut u)?.0)).collect::<Result<Vec<f64>>>();
    let (mut numerator, in_force, second_moment) = (numbers(k)?, numbers(k)?, numbers(k * k)?);
    let (overlap, held): (bool, bool) = u.arbitrary()?;
    let mut valid = is_valid(&config) && numerator.iter().chain(&second_moment).all(|x| x.is_finite());
    valid &= (0..k).all(|i| second_moment[i * (k + 1)] >= 0.0) && (!held || in_force.iter().all(|x| x.is_finite()));
    let (mut weights, mut flags) = (vec![-7.0; k], 77);
    let output = if overlap { numerator.as_mut_ptr() } else { weights.as_mut_ptr() };
    let in_force = if held { in_force.as_ptr() } else { std::ptr::null() };
    // SAFETY: all arrays have the lengths that K asks for, and the header allows them to overlap.
    let status =
        unsafe { gradblend_solve(&config, numerator.as_ptr(), second_moment.as_ptr(), in_force, output, &mut flags) };
    if !expect(status, valid) {
        assert!(flags == 77 && weights.iter().all(|w| *w == -7.0));
        return Ok(());
    }
    let weights = if overlap { numerator } else { weights };
    let (sum, magnitude) = weights.iter().fold((0.0, 0.0), |(sum, size), w| (sum + w, size + w.abs()));
    assert!(weights.iter().all(|w| w.is_finite()) && [0, 1, 4].contains(&flags));
    let held = flags & 1 != 0;
    assert!(held || (sum - 1.0_f64).abs() <= 4.0 * k as f64 * magnitude * 2f64.powi(-53));
    assert!(held || config.negative == 1 || weights.iter().all(|w| *w >= 0.0));
    Ok(())
}

fuzz_target!(|data: &[u8]| run(Unstructured::new(data)).unwrap_or_default());
