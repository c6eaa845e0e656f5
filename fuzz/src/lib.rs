//! What the fuzz targets share: blenders behind the C functions, and what holds after every call.

use std::ptr::null_mut;

use gradblend::MAX_MODALITIES;
use gradblend::ffi::*;
use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};

/// Statuses of the header.
pub const OK: i32 = 0;
/// An argument is invalid.
pub const INVALID_ARGUMENT: i32 = 1;
/// A saved state is not one.
pub const CORRUPT_STATE: i32 = 8;

/// A status that the header has, other than INTERNAL; an error has a message.
#[track_caller]
pub fn checked(status: i32) -> i32 {
    let mut message = [0; 8];
    // SAFETY: `message` is a valid pointer to as many bytes as the call is told.
    let len = unsafe { gradblend_last_error(message.as_mut_ptr().cast(), message.len()) };
    assert!((OK..9).contains(&status) && (status == OK || len > 0 && message[0] != 0 && message[7] == 0));
    status
}

/// Whether a call succeeded, which it must exactly if its arguments are `valid`.
#[track_caller]
pub fn expect(status: i32, valid: bool) -> bool {
    assert_eq!(checked(status), if valid { OK } else { INVALID_ARGUMENT });
    valid
}

/// A number: often one at which something changes, sometimes any bits.
#[derive(Clone, Copy, Debug)]
pub struct Number(pub f64);

impl<'a> Arbitrary<'a> for Number {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        const EDGES: [f64; 13] =
            [0.0, -0.0, 1.0, -1.0, 1e-12, 1e300, -1e300, 5e-324, 1e154, f64::INFINITY, f64::NAN, 0.99, 3.4e38];
        Ok(Number(match u.int_in_range(0..=3)? {
            0 => f64::arbitrary(u)?,
            1 => *u.choose(&EDGES)?,
            _ => f64::from(i8::arbitrary(u)?) / 16.0,
        }))
    }
}

/// A valid configuration of up to 5 modalities, rarely 32; some have invalid numbers. One or two threads.
pub fn config(u: &mut Unstructured<'_>) -> Result<gradblend_config> {
    let mut config: gradblend_config = bytemuck::Zeroable::zeroed();
    let modalities = if u.ratio(1, 16)? { MAX_MODALITIES as u32 } else { u.int_in_range(1..=5)? };
    // SAFETY: `config` is a valid pointer to a record.
    expect(unsafe { gradblend_config_default(modalities, &mut config) }, true);
    for code in [&mut config.average, &mut config.overfitting, &mut config.negative, &mut config.cadence] {
        *code = u.int_in_range(0..=1)?;
    }
    config.threads = u.int_in_range(1..=2)?;
    if u.arbitrary()? {
        (config.decay, config.damping) = (Number::arbitrary(u)?.0, Number::arbitrary(u)?.0);
    }
    Ok(config)
}

/// Whether the header allows this configuration on the CPU.
pub fn is_valid(c: &gradblend_config) -> bool {
    let codes = [c.average, c.overfitting, c.negative, c.cadence].iter().all(|code| [0, 1].contains(code));
    let decay = c.average == 0 || (0.0..1.0).contains(&c.decay);
    let sizes = c.size as usize == size_of_val(c) && c.reserved == 0 && (1..=32).contains(&c.modalities);
    codes && decay && sizes && c.damping >= 0.0 && c.damping.is_finite()
}

/// A blender on the CPU, by its handle.
#[derive(Debug)]
pub struct CBlender(pub *mut gradblend_blender, pub usize);

impl CBlender {
    /// None if `config` is invalid.
    pub fn new(config: &gradblend_config) -> Option<Self> {
        let mut handle = null_mut();
        // SAFETY: both are valid pointers.
        let status = unsafe { gradblend_blender_create(-1, config, &mut handle) };
        expect(status, is_valid(config) && config.threads <= 4096).then(|| CBlender(handle, config.modalities as usize))
    }

    /// The saved state.
    pub fn save(&self) -> Vec<u8> {
        let mut bytes = 0;
        // SAFETY: `bytes` is a valid pointer; with a NULL buffer only it is written.
        expect(unsafe { gradblend_save(self.0, null_mut(), &mut bytes, null_mut()) }, true);
        let mut saved = vec![0_u8; bytes];
        // SAFETY: `saved` has `bytes` bytes.
        expect(unsafe { gradblend_save(self.0, saved.as_mut_ptr().cast(), &mut bytes, null_mut()) }, true);
        saved
    }

    /// Loads a state.
    pub fn load(&self, saved: &[u8]) -> i32 {
        // SAFETY: `saved` has as many bytes as the call is told.
        checked(unsafe { gradblend_load(self.0, saved.as_ptr().cast(), saved.len(), null_mut()) })
    }

    /// The report; everything in the state is finite, whatever the blender went through.
    pub fn report(&self) -> gradblend_report {
        let (mut report, mut s): (gradblend_report, _) = (bytemuck::Zeroable::zeroed(), vec![0.0; self.1 * self.1]);
        // SAFETY: both are valid pointers to what the calls write.
        unsafe {
            expect(gradblend_get_report(self.0, &mut report, null_mut()), true);
            expect(gradblend_get_second_moments(self.0, s.as_mut_ptr(), null_mut()), true);
        }
        assert!(report.modalities as usize == self.1 && report.flags <= 7);
        assert!(u64::from(report.nonfinite) >> self.1 == 0 && (report.nonfinite != 0) == (report.flags & 2 != 0));
        assert!(report.weights.iter().chain(&report.mean).chain(&s).all(|number| number.is_finite()));
        assert!((0..self.1).all(|k| s[k * (self.1 + 1)] >= 0.0 && s[k * (self.1 + 1)] == report.second_moment[k]));
        report
    }
}

impl Drop for CBlender {
    fn drop(&mut self) {
        // Twice: the second call has no effect.
        gradblend_blender_destroy(self.0);
        gradblend_blender_destroy(self.0);
    }
}
