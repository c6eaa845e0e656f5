//! The C ABI: the functions of `include/gradblend.h`, which documents them. Each checks what only C can get wrong and
//! leaves the rest to the crate.

// Types have the names that C knows.
#![allow(non_camel_case_types)]
#![allow(missing_docs, clippy::missing_safety_doc, reason = "include/gradblend.h documents the functions and records")]

mod argument;
mod environment;
mod handle;
mod record;
mod status;
#[cfg(test)]
mod tests;

use std::ffi::{c_char, c_void};
use std::ptr::without_provenance_mut;

use argument::{array, check, record};
use handle::Handles;
pub use record::{gradblend_config, gradblend_dlpack, gradblend_report, gradblend_tensor};
pub use status::Status;
use status::{Fault, Outcome, call};

use crate::abi::MAX_MODALITIES;
use crate::blender::{Blender, Plan};
use crate::config::{Config, Pass};
use crate::dlpack;
use crate::error::{Error, Role};
use crate::solve::solve;
use crate::table::reserved;
use crate::tensor::{GradScale, Stream, TensorGrads};

/// Stands behind a handle in C; there is none in Rust.
#[repr(C)]
#[derive(Debug)]
pub struct gradblend_blender([u8; 0]);

/// Stands behind a handle in C; there is none in Rust.
#[repr(C)]
#[derive(Debug)]
pub struct gradblend_plan([u8; 0]);

/// What a plan's handle names.
#[derive(Debug)]
struct Planned {
    plan: Plan<'static>,
    /// Room for as many tensors as it has, so that an update allocates nothing.
    tensors: Vec<TensorGrads<'static>>,
}

static BLENDERS: Handles<Blender> = Handles::new(0xb, "blender");
static PLANS: Handles<Planned> = Handles::new(0xd, "plan");

/// Runs a body on the blender behind a handle, alone.
fn with(blender: *mut gradblend_blender, body: impl FnOnce(&mut Blender) -> Outcome) -> Status {
    call(|| BLENDERS.write(blender.addr(), body))
}

/// Runs a body on the blender behind a handle, beside others that read it.
fn with_shared(blender: *const gradblend_blender, body: impl FnOnce(&Blender) -> Outcome) -> Status {
    call(|| BLENDERS.read(blender.addr(), body))
}

#[unsafe(no_mangle)]
pub extern "C" fn gradblend_version() -> u32 {
    // The numbers stand in Cargo.toml alone; the compiler composes them.
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
    // SAFETY: as the header asks.
    unsafe { status::last(buffer, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_config_default(modalities: u32, config: *mut gradblend_config) -> Status {
    call(|| {
        check("config", config)?;
        let default = Config::new(modalities);
        default.check()?;
        // SAFETY: as the header asks.
        unsafe { config.write(gradblend_config::of(&default)) };
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
        // SAFETY: as the header asks.
        let config = unsafe { record("config", config) }?.config()?;
        let modalities = config.modalities as usize;
        check("weights", weights)?;
        check("flags", flags)?;
        // SAFETY: as the header asks, with K as `config` has it.
        let (numerator, second_moment) = unsafe {
            let matrix = (modalities * modalities) as u64;
            (array("numerator", numerator, modalities as u64)?, array("second_moment", second_moment, matrix)?)
        };
        let mut held = [1.0 / modalities as f64; MAX_MODALITIES];
        if !in_force.is_null() {
            // SAFETY: as above.
            held[..modalities].copy_from_slice(unsafe { array("in_force", in_force, modalities as u64) }?);
        }
        if let Some(modality) = held[..modalities].iter().position(|w| !w.is_finite()) {
            let got = held[modality];
            return Err(Fault::Argument(format!("in_force of modality {modality} is {got}, expected a finite number")));
        }
        let solution = solve(numerator, second_moment, &config.policy)?;
        let solved = solution.weights.as_deref().unwrap_or(&held[..modalities]);
        // SAFETY: as above. Everything that is read was read, so the arrays may overlap.
        unsafe {
            weights.copy_from(solved.as_ptr(), modalities);
            flags.write(solution.flags.bits());
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_blender_create(
    device: i32,
    config: *const gradblend_config,
    blender: *mut *mut gradblend_blender,
) -> Status {
    call(|| {
        check("where to put the blender", blender)?;
        // SAFETY: as the header asks.
        let config = unsafe { record("config", config) }?.config()?;
        let handle = BLENDERS.insert(Blender::new(&record::device(device)?, config)?)?;
        // SAFETY: as the header asks.
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
pub unsafe extern "C" fn gradblend_plan_create(
    blender: *const gradblend_blender,
    tensors: *const gradblend_tensor,
    count: u64,
    plan: *mut *mut gradblend_plan,
) -> Status {
    with_shared(blender, |blender| {
        check("where to put the plan", plan)?;
        let modalities = blender.config().modalities as usize;
        // SAFETY: as the header asks.
        let list = unsafe { array("tensors", tensors, count) }?;
        let mut tensors = reserved(count)?;
        // SAFETY: as above; what the lists must keep is asked for by the header too.
        unsafe { record::tensors(list, modalities, &mut tensors) }?;
        let handle = PLANS.insert(Planned { plan: blender.plan(tensors.drain(..))?, tensors })?;
        // SAFETY: as above.
        unsafe { plan.write(without_provenance_mut(handle)) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_plan_update(
    plan: *mut gradblend_plan,
    tensors: *const gradblend_tensor,
    count: u64,
    stream: *mut c_void,
) -> Status {
    let update = |planned: &mut Planned| {
        let Planned { plan, tensors: room } = planned;
        // Before it goes to `room`, which has place for so many.
        let (expected, modalities) = plan.shape();
        if count != expected as u64 {
            return Err(Error::PlanTensors { expected, got: usize::try_from(count).unwrap_or(usize::MAX) }.into());
        }
        // SAFETY: as the header asks.
        unsafe {
            record::tensors(array("tensors", tensors, count)?, modalities, room)?;
            Ok(plan.update(room.drain(..), Stream::from_raw(stream))?)
        }
    };
    call(|| PLANS.write(plan.addr(), update))
}

#[unsafe(no_mangle)]
pub extern "C" fn gradblend_plan_destroy(plan: *mut gradblend_plan) {
    call(|| {
        PLANS.destroy(plan.addr());
        Ok(())
    });
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_pass(
    blender: *mut gradblend_blender,
    plan: *const gradblend_plan,
    what: u32,
    stream: *mut c_void,
) -> Status {
    with(blender, |blender| {
        // SAFETY: as the header asks.
        let stream = unsafe { Stream::from_raw(stream) };
        PLANS.read(plan.addr(), |planned| Ok(blender.pass(&planned.plan, Pass::from_bits_retain(what), stream)?))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_dot(
    blender: *mut gradblend_blender,
    plan: *const gradblend_plan,
    stream: *mut c_void,
) -> Status {
    // SAFETY: as the header asks.
    unsafe { gradblend_pass(blender, plan, Pass::DOT.bits(), stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_observe(blender: *mut gradblend_blender, stream: *mut c_void) -> Status {
    // SAFETY: as the header asks.
    with(blender, |blender| Ok(blender.observe(unsafe { Stream::from_raw(stream) })?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_reweight(blender: *mut gradblend_blender, stream: *mut c_void) -> Status {
    // SAFETY: as the header asks.
    with(blender, |blender| Ok(blender.reweight(unsafe { Stream::from_raw(stream) })?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_blend(
    blender: *mut gradblend_blender,
    plan: *const gradblend_plan,
    stream: *mut c_void,
) -> Status {
    // SAFETY: as the header asks.
    unsafe { gradblend_pass(blender, plan, Pass::BLEND.bits(), stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_step(
    blender: *mut gradblend_blender,
    plan: *const gradblend_plan,
    stream: *mut c_void,
) -> Status {
    let step = Pass::DOT | Pass::BLEND | Pass::OBSERVE;
    // SAFETY: as the header asks.
    unsafe { gradblend_pass(blender, plan, step.bits(), stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_reset(blender: *mut gradblend_blender, stream: *mut c_void) -> Status {
    // SAFETY: as the header asks.
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
        // SAFETY: as the header asks.
        unsafe {
            let weights = array("weights", weights, u64::from(count))?;
            Ok(blender.set_weights(weights, Stream::from_raw(stream))?)
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_set_grad_scale(blender: *mut gradblend_blender, scale: *const f32) -> Status {
    // SAFETY: as the header asks.
    with(blender, |blender| Ok(blender.set_grad_scale(unsafe { GradScale::from_raw(scale) })?))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_get_report(
    blender: *mut gradblend_blender,
    report: *mut gradblend_report,
    stream: *mut c_void,
) -> Status {
    with(blender, |blender| {
        check("report", report)?;
        // SAFETY: as the header asks.
        unsafe { report.write(gradblend_report::of(&blender.report(Stream::from_raw(stream))?)) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_get_second_moments(
    blender: *mut gradblend_blender,
    second_moment: *mut f64,
    stream: *mut c_void,
) -> Status {
    with(blender, |blender| {
        check("second_moment", second_moment)?;
        // SAFETY: as the header asks.
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
        // SAFETY: as the header asks.
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
        // SAFETY: as the header asks.
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
        // SAFETY: as the header asks.
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
        // SAFETY: as the header asks.
        unsafe { Ok(blender.load(array("buffer", buffer, bytes as u64)?, Stream::from_raw(stream))?) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_tensor_from_dlpack(
    device: i32,
    modalities: u32,
    train: *const gradblend_dlpack,
    valid: *const gradblend_dlpack,
    gradients: *const gradblend_dlpack,
    blended: *const gradblend_dlpack,
    addresses: *mut *const c_void,
    tensor: *mut gradblend_tensor,
) -> Status {
    call(|| {
        check("addresses", addresses)?;
        check("tensor", tensor)?;
        Config::new(modalities).check()?;
        let ordinal = record::ordinal(device)?;
        let one = |name: Role, list: *const gradblend_dlpack| match list.is_null() {
            true => Ok(None),
            // SAFETY: as the header asks.
            false => unsafe { record(name, list) }?.array(name),
        };
        let (train, valid) = (one(Role::Train, train)?, one(Role::Valid, valid)?);
        let blended = one(Role::Blended, blended)?;
        let mut v = [None; MAX_MODALITIES];
        // SAFETY: as the header asks.
        for (k, list) in unsafe { array("gradients", gradients, u64::from(modalities)) }?.iter().enumerate() {
            v[k] = list.array(Role::Modality(k))?;
        }
        // SAFETY: as the header asks.
        let lists = unsafe { dlpack::read(ordinal, train, valid, &v[..modalities as usize], blended) }?;
        // SAFETY: as the header asks.
        unsafe {
            addresses.copy_from_nonoverlapping(lists.modalities.as_ptr(), modalities as usize);
            tensor.write(gradblend_tensor {
                len: lists.len,
                dtype: lists.dtype as i32,
                train: lists.train,
                valid: lists.valid,
                modalities: addresses,
                blended: lists.blended,
            });
        }
        Ok(())
    })
}
