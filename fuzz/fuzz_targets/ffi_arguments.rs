//! Raw bytes as configurations and DLPack records, and numbers as handles: errors, or results that the header allows.

#![no_main]

use std::ptr::{null, null_mut, without_provenance_mut};

use bytemuck::Zeroable;
use gradblend::dlpack::{DLDataType, DLDevice, DLManagedTensor, DLTensor};
use gradblend::ffi::*;
use gradblend_fuzz::{CBlender, OK, checked, config, expect};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;

fn run(mut u: Unstructured<'_>) -> Result<()> {
    let mut raw = gradblend_config::zeroed();
    (raw.size, raw.modalities, raw.threads, raw.reserved) =
        (u.int_in_range(52..=58)?, u.int_in_range(0..=34)?, u.int_in_range(1..=3)?, u.ratio(1, 8)?.into());
    (raw.average, raw.overfitting, raw.negative, raw.cadence) = u.arbitrary()?;
    (raw.decay, raw.damping) = u.arbitrary()?;
    CBlender::new(&raw);
    let Some(blender) = CBlender::new(&config(&mut u)?) else { return Ok(()) };

    // Any number but that of a live handle.
    let number: usize = u.arbitrary()?;
    let (any, plan) =
        (without_provenance_mut(if number == blender.0.addr() { 0 } else { number }), without_provenance_mut(number));
    let what = u.arbitrary()?;
    for handle in [any, blender.0] {
        // SAFETY: a handle is never dereferenced; all other pointers are NULL.
        unsafe {
            expect(gradblend_pass(handle, plan, what, null_mut()), false);
            expect(gradblend_plan_update(plan, null(), u.arbitrary()?, null_mut()), false);
            expect(gradblend_set_weights(handle, null(), u.arbitrary()?, null_mut()), false);
            expect(gradblend_get_report(handle, null_mut(), null_mut()), false);
            expect(gradblend_load(handle, null(), u.arbitrary()?, null_mut()), false);
            expect(gradblend_observe(handle, null_mut()), handle == blender.0);
            assert_ne!(*gradblend_status_name(u.arbitrary()?), 0);
        }
    }
    gradblend_blender_destroy(any);
    gradblend_plan_destroy(plan);

    let (mut shape, mut strides): ([i64; 4], [i64; 4]) =
        if u.arbitrary()? { u.arbitrary()? } else { ([u.int_in_range(0..=9)?; 4], [1; 4]) };
    let (code, bits, lanes) = if u.ratio(1, 4)? { u.arbitrary()? } else { (2, 32, 1) };
    let (device_type, device_id) = if u.ratio(1, 4)? { u.arbitrary()? } else { (1, 0) };
    extern "C" fn never(_: *mut DLManagedTensor) {
        std::process::abort();
    }
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
        deleter: Some(never),
    };
    let list = gradblend_dlpack { managed: if u.ratio(7, 8)? { &array } else { null() }, versioned: null() };
    let (lists, mut addresses) = ([list; 32], [null(); 32]);
    let mut tensor = gradblend_tensor { len: 77, ..Zeroable::zeroed() };
    let (device, modalities) = (u.int_in_range(-3..=1)?, u.int_in_range(0..=33)?);
    // SAFETY: records and arrays are alive and have the lengths that the header asks for.
    let status = checked(unsafe {
        gradblend_tensor_from_dlpack(
            device,
            modalities,
            &list,
            &list,
            lists.as_ptr(),
            null(),
            addresses.as_mut_ptr(),
            &mut tensor,
        )
    });
    let size = if tensor.dtype == 0 { 4 } else { 2 };
    assert!(if status != OK {
        status == 1 && tensor.len == 77
    } else {
        (1..=32).contains(&modalities)
            && device >= -1
            && (0..3).contains(&tensor.dtype)
            && addresses.iter().all(|a| a.addr() % size == 0)
    });
    Ok(())
}

fuzz_target!(|data: &[u8]| run(Unstructured::new(data)).unwrap_or_default());
