//! `gradblend_plan_create` and `gradblend_plan_update` with arbitrary lengths, dtypes and addresses: an error exactly
//! where the header asks for one. No plan runs, so no address is read.

#![no_main]

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{null_mut, without_provenance, without_provenance_mut};

use gradblend::ffi::*;
use gradblend_fuzz::{CBlender, OK, checked, config, expect};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;

struct Tensor {
    len: u64,
    dtype: i32,
    /// Train, valid, blended, then the modalities.
    addresses: Vec<u64>,
}

/// Mostly small numbers, so that buffers are equal, overlap and touch.
fn number(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=15)? {
        0 => u.arbitrary()?,
        1 => u64::MAX - u64::from(u.arbitrary::<u8>()?),
        2..=4 => 0,
        _ => 4 * u.int_in_range(1..=255)?,
    })
}

impl Tensor {
    fn new(u: &mut Unstructured<'_>, k: usize) -> Result<Self> {
        let dtype = if u.ratio(1, 32)? { u.arbitrary()? } else { u.int_in_range(0..=2)? };
        let addresses = (0..k + 3).map(|_| number(u)).collect::<Result<_>>()?;
        Ok(Tensor { len: number(u)? / 4, dtype, addresses })
    }

    /// The bytes of buffer `i`; None where it is absent or empty.
    fn bytes(&self, i: usize) -> Option<Range<u128>> {
        let (start, size) = (u128::from(self.addresses[i]), if self.dtype == 0 { 4 } else { 2 });
        let range = start..start + u128::from(self.len) * size;
        (start != 0 && !range.is_empty()).then_some(range)
    }

    fn is_valid(&self) -> bool {
        let aligned = |a: &u64| a % if self.dtype == 0 { 4 } else { 2 } == 0;
        let fits = (0..self.addresses.len()).all(|i| self.bytes(i).is_none_or(|bytes| bytes.end <= 1 << 64));
        let pair = (self.addresses[0] == 0) == (self.addresses[1] == 0);
        (0..3).contains(&self.dtype) && self.addresses.iter().all(aligned) && fits && pair
    }
}

/// Whether a blended gradient overlaps a buffer other than one modality gradient that it is exactly equal to.
fn overlaps(tensors: &[Tensor]) -> bool {
    tensors.iter().enumerate().any(|(a, one)| {
        let Some(blended) = one.bytes(2) else { return false };
        let all =
            tensors.iter().enumerate().flat_map(|(b, other)| (0..other.addresses.len()).map(move |i| (b, other, i)));
        let shared = |(b, other, i): &(usize, &Tensor, usize)| {
            let bytes = other.bytes(*i).filter(|_| (*b, *i) != (a, 2));
            bytes.is_some_and(|bytes| bytes.start < blended.end && blended.start < bytes.end)
        };
        let shared: Vec<_> = all.filter(shared).collect();
        let in_place =
            |&(b, other, i): &(usize, &Tensor, usize)| b == a && i > 2 && other.addresses[i] == one.addresses[2];
        shared.len() > 1 || !shared.iter().all(in_place)
    })
}

fn run(mut u: Unstructured<'_>) -> Result<()> {
    let Some(blender) = CBlender::new(&config(&mut u)?) else { return Ok(()) };
    let mut plan = null_mut();
    let mut shape = None;
    for _ in 0..u.int_in_range(1..=4)? {
        let tensors =
            (0..u.int_in_range(0..=3)?).map(|_| Tensor::new(&mut u, blender.1)).collect::<Result<Vec<_>>>()?;
        let addresses: Vec<_> =
            tensors.iter().flat_map(|t| &t.addresses).map(|a| without_provenance::<c_void>(*a as usize)).collect();
        let record = |(i, t): (usize, &Tensor)| {
            let [train, valid, blended] = [t.addresses[0], t.addresses[1], t.addresses[2]].map(|a| a as usize);
            gradblend_tensor {
                len: t.len,
                dtype: t.dtype,
                train: without_provenance(train),
                valid: without_provenance(valid),
                modalities: addresses[i * (blender.1 + 3) + 3..].as_ptr(),
                blended: without_provenance_mut(blended),
            }
        };
        let records: Vec<_> = tensors.iter().enumerate().map(record).collect();
        let valid = tensors.iter().all(Tensor::is_valid) && !overlaps(&tensors);
        let this: Vec<_> = tensors.iter().map(|t| (t.len, t.dtype)).collect();
        let (list, count) = (records.as_ptr(), records.len() as u64);
        if let Some(shape) = &shape {
            // SAFETY: the records and their address arrays are alive; the plan never runs.
            expect(unsafe { gradblend_plan_update(plan, list, count, null_mut()) }, valid && this == *shape);
            continue;
        }
        // SAFETY: as for the update; `plan` is a valid pointer.
        let status = checked(unsafe { gradblend_plan_create(blender.0, list, count, &mut plan) });
        // 6 is OUT_OF_MEMORY: the chunk table of a long tensor does not fit.
        assert!(
            status == OK && valid || status == 1 && !valid || status == 6 && tensors.iter().any(|t| t.len > 1 << 32)
        );
        shape = (status == OK).then_some(this);
    }
    gradblend_plan_destroy(plan);
    Ok(())
}

fuzz_target!(|data: &[u8]| run(Unstructured::new(data)).unwrap_or_default());
