//! Raw numbers as configurations and DLPack records: errors, or results that the header allows.

#![no_main]

use std::mem::offset_of;
use std::ptr::{null_mut, without_provenance_mut};

use gradblend::dlpack::{DLDataType, DLDevice, DLManagedTensor, DLTensor, Dlpack};
use gradblend::ffi::*;
use gradblend::{Negative, Policy};
use gradblend_fuzz::{expect, is_valid, number, run};
use gradblend_testkit::{Face, Failure, Input};
use libfuzzer_sys::arbitrary::{Result, Unstructured};

libfuzzer_sys::fuzz_target!(|data: &[u8]| run(data, |u| {
    configuration(u)?;
    dlpack(u)?;
    Ok(Ok(()))
}));

/// A code of an enumeration: mostly valid ones.
fn code(u: &mut Unstructured<'_>) -> Result<i32> {
    if u.ratio(1, 16)? { u.arbitrary() } else { Ok(i32::from(u.ratio(1, 2)?)) }
}

/// A blender is made exactly if the configuration is valid.
fn configuration(u: &mut Unstructured<'_>) -> Result<()> {
    let (first, whole) = (offset_of!(gradblend_config, min_weight) as u32, size_of::<gradblend_config>() as u32);
    let mut min_weight = [0.0; 32];
    min_weight[u.int_in_range(0..=3)?] = if u.ratio(1, 4)? { number(u)? } else { 0.0 };
    let config = gradblend_config {
        size: match u.int_in_range(0..=8)? {
            0 => u.int_in_range(whole - 8..=whole + 8)?,
            1 => u.int_in_range(first - 8..=first + 8)?,
            2 => first,
            _ => whole,
        },
        modalities: u.int_in_range(0..=33)?,
        average: code(u)?,
        overfitting: code(u)?,
        negative: code(u)?,
        cadence: code(u)?,
        threads: u.int_in_range(1..=3)?,
        reserved: if u.ratio(1, 16)? { u.arbitrary()? } else { 0 },
        decay: number(u)?,
        damping: number(u)?,
        min_weight,
    };
    let codes = [config.average, config.overfitting, config.negative, config.cadence];
    let fields = [first, whole].contains(&config.size) && config.reserved == 0 && (1..=32).contains(&config.modalities);
    let decay = config.average == 0 || (0.0..1.0).contains(&config.decay);
    let damping = config.damping >= 0.0 && config.damping.is_finite();
    let policy = Policy {
        min_weight,
        negative: if config.negative == 1 { Negative::Signed } else { Negative::Clamp },
        ..Policy::default()
    };
    let floors = config.size == first || is_valid(&policy, config.modalities as usize);
    let valid = fields && decay && damping && floors && codes.iter().all(|code| [0, 1].contains(code));
    let mut blender = null_mut();
    // SAFETY: `config` is a whole record and `blender` an out-pointer, both valid for this call.
    let created = expect(Failure::check(unsafe { gradblend_blender_create(-1, &config, &mut blender) }), valid);
    assert_eq!(created.is_some(), !blender.is_null());
    // SAFETY: a handle is never dereferenced, and the CPU ignores streams.
    expect(Failure::check(unsafe { gradblend_observe(blender, null_mut()) }), valid);
    gradblend_blender_destroy(blender);
    Ok(())
}

/// A record that is accepted describes aligned memory.
fn dlpack(u: &mut Unstructured<'_>) -> Result<()> {
    let (mut shape, mut strides): ([i64; 4], [i64; 4]) =
        if u.arbitrary()? { u.arbitrary()? } else { ([u.int_in_range(0..=9)?; 4], [1; 4]) };
    let (code, bits, lanes) = if u.ratio(1, 4)? { u.arbitrary()? } else { (2, 32, 1) };
    let (device_type, device_id) = if u.ratio(1, 4)? { u.arbitrary()? } else { (1, 0) };
    let array = DLManagedTensor {
        dl_tensor: DLTensor {
            data: without_provenance_mut(u.arbitrary()?),
            device: DLDevice { device_type, device_id },
            ndim: u.int_in_range(-1..=4)?,
            dtype: DLDataType { code, bits, lanes },
            shape: shape.as_mut_ptr(),
            strides: if u.arbitrary()? { strides.as_mut_ptr() } else { null_mut() },
            byte_offset: if u.arbitrary()? { u.arbitrary()? } else { 0 },
        },
        manager_ctx: null_mut(),
        deleter: None,
    };
    let record = Some(Dlpack::Managed(&array));
    // SAFETY: the record and its arrays are alive; no plan runs on what they describe.
    if let Ok(input) = unsafe { Face::FFI.from_dlpack(u.int_in_range(-3..=1)?, record, None, &[record, None], record) }
    {
        let Input::Addresses(tensor) = input else { unreachable!("a record of the Rust API") };
        let addresses = [tensor.train, tensor.modalities[0], tensor.blended.cast_const()];
        assert!(addresses.iter().all(|a| *a == tensor.train && (a.addr() as u64).is_multiple_of(tensor.dtype.bytes())));
    }
    Ok(())
}
