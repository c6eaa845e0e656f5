//! Raw numbers as configurations, handles and DLPack records: errors, or results that the header allows.

#![no_main]

use std::ptr::{null, null_mut, without_provenance_mut};

use gradblend::dlpack::{DLDataType, DLDevice, DLManagedTensor, DLTensor, Dlpack};
use gradblend::ffi::*;
use gradblend_fuzz::{expect, run};
use gradblend_testkit::{Face, Failure, Input};

libfuzzer_sys::fuzz_target!(|data: &[u8]| run(data, |u| {
    let (size, modalities, threads) = (u.int_in_range(52..=58)?, u.int_in_range(0..=33)?, u.int_in_range(1..=3)?);
    let ([average, overfitting, negative, cadence], reserved): ([i8; 4], bool) = u.arbitrary()?;
    let codes = [average, overfitting, negative, cadence].map(i32::from);
    let [average, overfitting, negative, cadence] = codes;
    let (reserved, decay, damping) = (reserved.into(), u.arbitrary()?, u.arbitrary()?);
    let config = gradblend_config {
        size,
        modalities,
        average,
        overfitting,
        negative,
        cadence,
        threads,
        reserved,
        decay,
        damping,
    };
    let numbers = (average == 0 || (0.0..1.0).contains(&decay)) && damping >= 0.0 && damping.is_finite();
    let sizes = size as usize == size_of_val(&config) && reserved == 0 && (1..=32).contains(&modalities);
    let valid = sizes && numbers && codes.iter().all(|code| [0, 1].contains(code));
    let mut blender = null_mut();
    // SAFETY: both are valid pointers.
    expect(Failure::check(unsafe { gradblend_blender_create(-1, &config, &mut blender) }), valid);
    // Any number but that of the live handle.
    let any = Some(u.arbitrary()?).filter(|any| *any != blender.addr()).unwrap_or(0);
    let (plan, what, count, bytes) = (without_provenance_mut(any), u.arbitrary()?, u.arbitrary()?, u.arbitrary()?);
    for handle in [blender, without_provenance_mut(any)] {
        // SAFETY: a handle is never dereferenced; all other pointers are NULL.
        let statuses = unsafe {
            [
                gradblend_pass(handle, plan, what, null_mut()),
                gradblend_plan_update(plan, null(), bytes, null_mut()),
                gradblend_set_weights(handle, null(), count, null_mut()),
                gradblend_load(handle, null(), bytes as usize, null_mut()),
            ]
        };
        assert_eq!(statuses, [1; 4]);
        // SAFETY: a handle is never dereferenced, and the CPU ignores streams.
        expect(Failure::check(unsafe { gradblend_observe(handle, null_mut()) }), valid && handle == blender);
    }
    gradblend_plan_destroy(plan);
    gradblend_blender_destroy(blender);
    gradblend_blender_destroy(blender);

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
    Ok(Ok(()))
}));
