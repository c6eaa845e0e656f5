//! Functions on a blender.

use std::ffi::c_void;
use std::ptr::without_provenance_mut;

use super::argument::{array, check};
use super::handle::Handles;
use super::record::{self, FIRST_CONFIG, FIRST_REPORT, gradblend_config, gradblend_report};
use super::status::{Fault, Outcome, Status, call};
use crate::blender::Blender;
use crate::error::Error;
use crate::tensor::{GradScale, Stream};

/// Type behind a blender's handle in C. It has no value in Rust.
#[repr(C)]
#[derive(Debug)]
pub struct gradblend_blender([u8; 0]);

/// A blender, and how the program that created it was compiled.
#[derive(Debug)]
struct Owned {
    blender: Blender,
    /// Whether with the header of version 0.1.0, in which `gradblend_report.size` was not for the caller to set.
    first_version: bool,
}

static BLENDERS: Handles<Owned> = Handles::new(0xb, "blender");

/// Calls `body` with exclusive access to the blender of a handle.
pub(super) fn with(blender: *mut gradblend_blender, body: impl FnOnce(&mut Blender) -> Outcome) -> Status {
    call(|| BLENDERS.write(blender.addr(), |owned| body(&mut owned.blender)))
}

/// Calls `body` with shared access to the blender of a handle.
pub(super) fn with_shared(blender: *const gradblend_blender, body: impl FnOnce(&Blender) -> Outcome) -> Status {
    call(|| BLENDERS.read(blender.addr(), |owned| body(&owned.blender)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_blender_create(
    device: i32,
    config: *const gradblend_config,
    blender: *mut *mut gradblend_blender,
) -> Status {
    call(|| {
        check("where to put the blender", blender)?;
        // SAFETY: the header requires `config` to be NULL or a record of the size that it states.
        let (config, size) = unsafe { gradblend_config::read(config) }?;
        let first_version = size == FIRST_CONFIG;
        let handle =
            BLENDERS.insert(Owned { blender: Blender::new(&record::device(device)?, config)?, first_version })?;
        // SAFETY: `check` has seen that `blender` is not NULL and aligned; the header requires an out-pointer.
        unsafe { blender.write(without_provenance_mut(handle)) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn gradblend_blender_destroy(blender: *mut gradblend_blender) {
    call(|| {
        BLENDERS.destroy(blender.addr());
        Ok(())
    });
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_observe(blender: *mut gradblend_blender, stream: *mut c_void) -> Status {
    // SAFETY: the header requires a live stream of the blender's device, or NULL.
    with(blender, |blender| Ok(blender.observe(unsafe { Stream::from_raw(stream) })?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_reweight(blender: *mut gradblend_blender, stream: *mut c_void) -> Status {
    // SAFETY: the header requires a live stream of the blender's device, or NULL.
    with(blender, |blender| Ok(blender.reweight(unsafe { Stream::from_raw(stream) })?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_reset(blender: *mut gradblend_blender, stream: *mut c_void) -> Status {
    // SAFETY: the header requires a live stream of the blender's device, or NULL.
    with(blender, |blender| Ok(blender.reset(unsafe { Stream::from_raw(stream) })?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_set_weights(
    blender: *mut gradblend_blender,
    weights: *const f64,
    count: u32,
    stream: *mut c_void,
) -> Status {
    with(blender, |blender| {
        let expected = blender.config().modalities;
        if count != expected {
            let (expected, got) = (expected as usize, count as usize);
            return Err(Error::Count { what: "the weights", expected, got }.into());
        }
        // SAFETY: the header requires K numbers at `weights`, and a live stream of the blender's device, or NULL.
        unsafe {
            let weights = array("weights", weights, u64::from(count))?;
            Ok(blender.set_weights(weights, Stream::from_raw(stream))?)
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_set_grad_scale(blender: *mut gradblend_blender, scale: *const f32) -> Status {
    // SAFETY: the header requires `scale` to be NULL or to stay readable by the device while it is in force.
    with(blender, |blender| Ok(blender.set_grad_scale(unsafe { GradScale::from_raw(scale) })?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_get_report(
    blender: *mut gradblend_blender,
    report: *mut gradblend_report,
    stream: *mut c_void,
) -> Status {
    let body = |owned: &mut Owned| {
        check("report", report)?;
        // SAFETY: `check` has seen that `report` is not NULL and aligned. The header requires as much memory there as the
        // report's `size` says (as a report has, in version 0.1.0), and a live stream of the blender's device, or NULL.
        unsafe {
            let bytes = if owned.first_version { FIRST_REPORT } else { gradblend_report::writable_bytes(report)? };
            gradblend_report::of(&owned.blender.report(Stream::from_raw(stream))?).write(report, bytes);
        }
        Ok(())
    };
    call(|| BLENDERS.write(blender.addr(), body))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_get_second_moments(
    blender: *mut gradblend_blender,
    second_moment: *mut f64,
    stream: *mut c_void,
) -> Status {
    with(blender, |blender| {
        check("second_moment", second_moment)?;
        // SAFETY: the header requires room for K x K numbers at `second_moment`, and a live stream of the blender's
        // device, or NULL.
        unsafe {
            let moments = blender.second_moments(Stream::from_raw(stream))?;
            second_moment.copy_from_nonoverlapping(moments.as_ptr(), moments.len());
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_device_weights(
    blender: *const gradblend_blender,
    weights: *mut *const f32,
) -> Status {
    with_shared(blender, |blender| {
        check("where to put the address of the weights", weights)?;
        // SAFETY: `check` has seen that `weights` is not NULL and aligned; the header requires an out-pointer.
        unsafe { weights.write(blender.device_weights()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_pending_sums(
    blender: *const gradblend_blender,
    sums: *mut *mut f64,
    count: *mut u32,
) -> Status {
    with_shared(blender, |blender| {
        check("where to put the address of the sums", sums)?;
        check("count", count)?;
        // SAFETY: `check` has seen that both are not NULL and aligned; the header requires out-pointers.
        unsafe {
            sums.write(blender.pending_sums());
            count.write(2 * blender.config().modalities);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_save(
    blender: *mut gradblend_blender,
    buffer: *mut c_void,
    bytes: *mut usize,
    stream: *mut c_void,
) -> Status {
    with(blender, |blender| {
        check("bytes", bytes)?;
        let needed = blender.saved_bytes();
        // SAFETY: `bytes` is not NULL and aligned. The header requires that it can be read and written, `*bytes` bytes of
        // memory at `buffer` unless that is NULL, and a live stream of the blender's device, or NULL.
        unsafe {
            if buffer.is_null() {
                bytes.write(needed);
                return Ok(());
            }
            let room = bytes.read();
            if room < needed {
                bytes.write(needed);
                return Err(Fault::Argument(format!("buffer: the state has {needed} bytes, got room for {room}")));
            }
            let saved = blender.save(Stream::from_raw(stream))?;
            buffer.cast::<u8>().copy_from_nonoverlapping(saved.as_ptr(), saved.len());
            bytes.write(saved.len());
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_load(
    blender: *mut gradblend_blender,
    buffer: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> Status {
    with(blender, |blender| {
        let buffer = buffer.cast::<u8>();
        check("buffer", buffer)?;
        // SAFETY: the header requires `bytes` readable bytes at `buffer`, and a live stream of the blender's device, or NULL.
        unsafe { Ok(blender.load(array("buffer", buffer, bytes as u64)?, Stream::from_raw(stream))?) }
    })
}
