//! Functions on a plan, and the operations that run one.

use std::ffi::c_void;
use std::ptr::without_provenance_mut;

use super::argument::{array, check, read};
use super::blender::{gradblend_blender, with, with_shared};
use super::handle::Handles;
use super::record::{self, gradblend_dlpack, gradblend_tensor};
use super::status::{Fault, Status, call};
use crate::abi::MAX_MODALITIES;
use crate::blender::Plan;
use crate::config::{Config, Pass};
use crate::dlpack;
use crate::error::{Error, Role};
use crate::table::reserved;
use crate::tensor::{Stream, TensorGrads};

/// Type behind a plan's handle in C. It has no value in Rust.
#[repr(C)]
#[derive(Debug)]
pub struct gradblend_plan([u8; 0]);

static PLANS: Handles<Plan<'static>> = Handles::new(0xd, "plan");

/// The tensors of C records, up to the first that has an unknown dtype or no addresses: `fault` is then set, and the
/// caller returns it. An iterator, so that an update allocates nothing.
///
/// # Safety
/// Each record's `modalities` is NULL or the address of K addresses, and the contract of [`TensorGrads::from_raw`].
unsafe fn convert<'a>(
    tensors: &'a [gradblend_tensor],
    modalities: usize,
    fault: &'a mut Option<Fault>,
) -> impl Iterator<Item = TensorGrads<'static>> + 'a {
    tensors.iter().enumerate().map_while(move |(index, tensor)| {
        // SAFETY: the caller fulfils the contract of `convert`.
        unsafe { record::tensor(index, tensor, modalities) }.map_err(|found| *fault = Some(found)).ok()
    })
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
        let modalities = blender.config().k();
        // SAFETY: the header requires `count` records.
        let tensors = unsafe { array("tensors", tensors, count) }?;
        // More tensors than a plan can have are an error before their records are read.
        drop(reserved::<gradblend_tensor>(count)?);
        let mut fault = None;
        // SAFETY: the header requires the contract of `TensorGrads::from_raw` for each record.
        let made = blender.plan(unsafe { convert(tensors, modalities, &mut fault) });
        if let Some(fault) = fault {
            return Err(fault);
        }
        let handle = PLANS.insert(made?)?;
        // SAFETY: `plan` is not NULL and aligned, and the header requires an out-pointer.
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
    let update = |plan: &mut Plan<'static>| {
        // Before the records are read: another count is a sign of another array.
        let (expected, modalities) = plan.shape();
        if count != expected as u64 {
            return Err(Error::PlanTensors { expected, got: usize::try_from(count).unwrap_or(usize::MAX) }.into());
        }
        let mut fault = None;
        // SAFETY: the header requires `count` records, the contract of `TensorGrads::from_raw` for each, and a stream as
        // `Stream::from_raw` does.
        let updated = unsafe {
            let tensors = convert(array("tensors", tensors, count)?, modalities, &mut fault);
            plan.update(tensors, Stream::from_raw(stream))
        };
        match fault {
            Some(fault) => Err(fault),
            None => Ok(updated?),
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
        // SAFETY: the header requires a live stream of the blender's device, or NULL.
        let stream = unsafe { Stream::from_raw(stream) };
        PLANS.read(plan.addr(), |plan| Ok(blender.pass(plan, Pass::from_bits_retain(what), stream)?))
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_dot(
    blender: *mut gradblend_blender,
    plan: *const gradblend_plan,
    stream: *mut c_void,
) -> Status {
    // SAFETY: this function and `gradblend_pass` have the same contract.
    unsafe { gradblend_pass(blender, plan, Pass::DOT.bits(), stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_blend(
    blender: *mut gradblend_blender,
    plan: *const gradblend_plan,
    stream: *mut c_void,
) -> Status {
    // SAFETY: this function and `gradblend_pass` have the same contract.
    unsafe { gradblend_pass(blender, plan, Pass::BLEND.bits(), stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn gradblend_step(
    blender: *mut gradblend_blender,
    plan: *const gradblend_plan,
    stream: *mut c_void,
) -> Status {
    let step = Pass::DOT | Pass::BLEND | Pass::OBSERVE;
    // SAFETY: this function and `gradblend_pass` have the same contract.
    unsafe { gradblend_pass(blender, plan, step.bits(), stream) }
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
        let one = |role: Role, dlpack: *const gradblend_dlpack| match dlpack.is_null() {
            true => Ok(None),
            // SAFETY: the header requires each array to be NULL or valid for reads of its type.
            false => unsafe { read(role, dlpack) }?.array(role),
        };
        let (train, valid) = (one(Role::Train, train)?, one(Role::Valid, valid)?);
        let blended = one(Role::Blended, blended)?;
        let mut v = [None; MAX_MODALITIES];
        // SAFETY: the header requires K records at `gradients`.
        for (k, array) in unsafe { array("gradients", gradients, u64::from(modalities)) }?.iter().enumerate() {
            v[k] = array.array(Role::Modality(k))?;
        }
        // SAFETY: the header requires each record to refer to a live DLPack array.
        let arrays = unsafe { dlpack::read(ordinal, train, valid, &v[..modalities as usize], blended) }?;
        // SAFETY: both are not NULL and aligned; the header requires room for K addresses and for a tensor.
        unsafe {
            addresses.copy_from_nonoverlapping(arrays.modalities.as_ptr(), modalities as usize);
            tensor.write(gradblend_tensor {
                len: arrays.len,
                dtype: arrays.dtype as i32,
                train: arrays.train,
                valid: arrays.valid,
                modalities: addresses,
                blended: arrays.blended,
            });
        }
        Ok(())
    })
}
