//! What the fuzz targets share: configurations, numbers, and what holds of a blender after every call.

use std::ffi::c_char;

use gradblend::{Average, Cadence, Config, Flags, MAX_MODALITIES, Negative, Overfitting, Policy};
use gradblend_testkit::{Face, Result as Called, TestBlender};
use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};

/// AddressSanitizer's options: an allocation that is too large returns NULL, as malloc does.
#[unsafe(no_mangle)]
pub extern "C" fn __asan_default_options() -> *const c_char {
    c"allocator_may_return_null=1".as_ptr()
}

/// A number: often one at which something changes, sometimes any bits.
pub fn number(u: &mut Unstructured<'_>) -> Result<f64> {
    const EDGES: [f64; 12] =
        [0.0, -0.0, 1.0, -1.0, 1e-12, 1e300, -1e300, 5e-324, 1e154, f64::INFINITY, f64::NAN, 3.4e38];
    match u.int_in_range(0..=3)? {
        0 => f64::arbitrary(u),
        1 => Ok(*u.choose(&EDGES)?),
        _ => Ok(f64::from(i8::arbitrary(u)?) / 16.0),
    }
}

/// `count` numbers.
pub fn numbers(u: &mut Unstructured<'_>, count: usize) -> Result<Vec<f64>> {
    (0..count).map(|_| number(u)).collect()
}

/// A policy, whose damping and least weights may be invalid.
pub fn policy(u: &mut Unstructured<'_>) -> Result<Policy> {
    let damping = if u.arbitrary()? { 1e-12 } else { number(u)? };
    let overfitting = *u.choose(&[Overfitting::Uncorrelated, Overfitting::Correlated])?;
    let mut min_weight = [0.0; MAX_MODALITIES];
    if u.arbitrary()? {
        for least in &mut min_weight[..u.int_in_range(0..=3)?] {
            *least = if u.ratio(1, 8)? { number(u)? } else { f64::from(u.int_in_range(0..=99_u8)?) / 256.0 };
        }
    }
    Ok(Policy { overfitting, negative: *u.choose(&[Negative::Clamp, Negative::Signed])?, damping, min_weight })
}

/// A blender through the C functions, of 1 to 5 modalities or rarely 32. It is an error exactly if a number is invalid.
pub fn blender(u: &mut Unstructured<'_>) -> Result<Option<TestBlender>> {
    let decay = if u.arbitrary()? { 0.99 } else { number(u)? };
    let config = Config {
        modalities: if u.ratio(1, 16)? { 32 } else { u.int_in_range(1..=5)? },
        average: *u.choose(&[Average::Mean, Average::Ema { decay }])?,
        policy: policy(u)?,
        cadence: *u.choose(&[Cadence::OnRequest, Cadence::EveryObservation])?,
        threads: u.int_in_range(1..=2)?,
    };
    let valid = config.average == Average::Mean || (0.0..1.0).contains(&decay);
    Ok(expect(Face::FFI.blender_with(config), valid && is_valid(&config.policy, config.modalities as usize)))
}

/// Whether the header allows this policy for K modalities.
pub fn is_valid(policy: &Policy, k: usize) -> bool {
    let least = &policy.min_weight;
    let damping = policy.damping >= 0.0 && policy.damping.is_finite();
    let none = least.iter().all(|least| *least == 0.0);
    let some = least.iter().all(|least| *least >= 0.0)
        && least.iter().sum::<f64>() < 1.0
        && least.iter().skip(k).all(|least| *least == 0.0);
    damping && (none || some && policy.negative == Negative::Clamp)
}

/// The result of a call that succeeds exactly if its arguments are `valid`; else it is INVALID_ARGUMENT, with a message.
#[track_caller]
pub fn expect<T: std::fmt::Debug>(called: Called<T>, valid: bool) -> Option<T> {
    let expected = called.as_ref().map_or_else(|e| !valid && e.status == 1 && !e.message.is_empty(), |_| valid);
    assert!(expected, "{called:?}, where the arguments are valid: {valid}");
    called.ok()
}

/// Checks that everything in the state is finite, whatever the blender went through.
#[track_caller]
pub fn check_state(blender: &mut TestBlender) -> Called<()> {
    let (k, report, s) = (blender.k(), blender.report()?, blender.second_moments()?);
    assert!(u64::from(report.nonfinite) >> k == 0 && Flags::all().contains(report.flags));
    assert!(report.weights.iter().chain(&report.mean).chain(&s).all(|number| number.is_finite()));
    assert!((0..k).all(|i| s[i * (k + 1)] >= 0.0 && s[i * (k + 1)] == report.second_moment[i]));
    assert!(blender.weights()?.iter().zip(&report.weights).all(|(f32, f64)| *f32 == *f64 as f32));
    Ok(())
}

/// Runs a target on an input; an input that ends early is none.
pub fn run(data: &[u8], target: fn(&mut Unstructured<'_>) -> Result<Called<()>>) {
    let failure = target(&mut Unstructured::new(data)).ok().and_then(Called::err);
    assert_eq!(failure, None);
}
