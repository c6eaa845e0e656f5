//! Functions without a handle: version, messages, configuration, solver.

use std::ffi::c_char;

use super::argument::{array, check};
use super::record::{FIRST_CONFIG, gradblend_config};
use super::status::{self, Fault, Status, call};
use crate::abi::MAX_MODALITIES;
use crate::config::Config;
use crate::solve::solve;

#[unsafe(no_mangle)]
pub extern "C" fn gradblend_version() -> u32 {
    // Cargo.toml has the only copy of the version.
    const fn number(digits: &str) -> u32 {
        let (digits, mut number, mut i) = (digits.as_bytes(), 0, 0);
        while i < digits.len() {
            number = number * 10 + (digits[i] - b'0') as u32;
            i += 1;
        }
        number
    }
    const {
        number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
            | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
            | number(env!("CARGO_PKG_VERSION_PATCH"))
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn gradblend_status_name(status: Status) -> *const c_char {
    status::name(status).as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_last_error(buffer: *mut c_char, bytes: usize) -> usize {
    // SAFETY: the header requires `buffer` to be NULL or valid for writes of `bytes` bytes.
    unsafe { status::last(buffer, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_config_default(modalities: u32, config: *mut gradblend_config) -> Status {
    call(|| {
        check("config", config)?;
        let default = Config::new(modalities);
        default.check()?;
        let record = gradblend_config { size: FIRST_CONFIG as u32, ..gradblend_config::of(&default) };
        // The symbol cannot know with which header its caller was compiled, so it fills what all records have. The header's
        // inline function of the same name fills the rest.
        //
        // SAFETY: `check` has seen that `config` is not NULL and aligned; the header requires an out-pointer.
        unsafe { (&raw const record).cast::<u8>().copy_to_nonoverlapping(config.cast(), FIRST_CONFIG) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_solve(
    config: *const gradblend_config,
    numerator: *const f64,
    second_moment: *const f64,
    in_force: *const f64,
    weights: *mut f64,
    flags: *mut u32,
) -> Status {
    call(|| {
        // SAFETY: the header requires `config` to be NULL or a record of the size that it states.
        let (config, _) = unsafe { gradblend_config::read(config) }?;
        let modalities = config.k();
        check("weights", weights)?;
        check("flags", flags)?;
        // SAFETY: the header requires K and K x K numbers.
        let (numerator, second_moment) = unsafe {
            let matrix = (modalities * modalities) as u64;
            (array("numerator", numerator, modalities as u64)?, array("second_moment", second_moment, matrix)?)
        };
        let mut held = [1.0 / modalities as f64; MAX_MODALITIES];
        if !in_force.is_null() {
            // SAFETY: the header requires K numbers at `in_force`.
            held[..modalities].copy_from_slice(unsafe { array("in_force", in_force, modalities as u64) }?);
        }
        if let Some(modality) = held[..modalities].iter().position(|w| !w.is_finite()) {
            let got = held[modality];
            return Err(Fault::Argument(format!("in_force of modality {modality} is {got}, expected a finite number")));
        }
        let solution = solve(numerator, second_moment, &config.policy)?;
        let solved = solution.weights.as_deref().unwrap_or(&held[..modalities]);
        // SAFETY: the header requires room for K weights and for the flags. All input was read, so the arrays may overlap.
        unsafe {
            weights.copy_from(solved.as_ptr(), modalities);
            flags.write(solution.flags.bits());
        }
        Ok(())
    })
}
