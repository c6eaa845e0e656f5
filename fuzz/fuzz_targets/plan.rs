//! Plans through the C functions with arbitrary lengths, dtypes and addresses: an error exactly where the header asks for
//! one, and an update has the same errors. No plan runs, so no address is read.

#![no_main]

use std::ops::Range;

use gradblend::DType;
use gradblend_fuzz::{blender, expect, run};
use gradblend_testkit::{Input, TestPlan};
use libfuzzer_sys::arbitrary::{Result, Unstructured};

#[derive(Debug)]
struct Tensor {
    len: u64,
    dtype: DType,
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
        let dtype = *u.choose(&[DType::F32, DType::F16, DType::BF16])?;
        // Lengths whose chunk table has 2 GB to 1 TB are valid, and more than a fuzzer may allocate.
        let len = number(u)? / 4;
        let len = if (1 << 32..1 << 56).contains(&len) { u64::MAX } else { len };
        Ok(Tensor { len, dtype, addresses: (0..k + 3).map(|_| number(u)).collect::<Result<_>>()? })
    }

    /// The bytes of buffer `i`; None where it is absent or empty.
    fn bytes(&self, i: usize) -> Option<Range<u128>> {
        let start = u128::from(self.addresses[i]);
        let end = start + u128::from(self.len) * u128::from(self.dtype.bytes());
        (start != 0 && end > start).then_some(start..end)
    }

    fn is_valid(&self) -> bool {
        let fits = |i| self.bytes(i).is_none_or(|bytes| bytes.end <= u64::MAX.into());
        let aligned = self.addresses.iter().all(|address| address.is_multiple_of(self.dtype.bytes()));
        let paired = (self.addresses[0] == 0) == (self.addresses[1] == 0);
        paired && aligned && self.len <= i64::MAX as u64 / self.dtype.bytes() && (0..self.addresses.len()).all(fits)
    }

    fn input(&self) -> Input<'static> {
        let addresses: Vec<usize> = self.addresses.iter().map(|address| *address as usize).collect();
        // SAFETY: no plan with this tensor runs, so nothing is read or written.
        unsafe { Input::at(self.len, self.dtype, addresses[0], addresses[1], &addresses[3..], addresses[2]) }
    }
}

/// Whether a blended gradient overlaps a buffer other than one modality gradient of its tensor that it is equal to.
fn overlaps(tensors: &[Tensor]) -> bool {
    tensors.iter().enumerate().any(|(a, one)| {
        let Some(blended) = one.bytes(2) else { return false };
        let buffers =
            tensors.iter().enumerate().flat_map(|(b, t)| (0..t.addresses.len()).map(move |i| (b, i, t.bytes(i))));
        let shared: Vec<_> = buffers
            .filter(|(b, i, _)| (*b, *i) != (a, 2))
            .filter(|(_, _, other)| other.as_ref().is_some_and(|o| o.start < blended.end && blended.start < o.end))
            .collect();
        shared.len() > 1 || shared.iter().any(|(b, i, other)| *b != a || *i < 3 || other.as_ref() != Some(&blended))
    })
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| run(data, |u| {
    let Some(blender) = blender(u)? else { return Ok(Ok(())) };
    let k = blender.k();
    let (mut plan, mut shape) = (None, Vec::new());
    for _ in 0..u.int_in_range(1..=4)? {
        let tensors: Vec<Tensor> = (0..u.int_in_range(0..=3)?).map(|_| Tensor::new(u, k)).collect::<Result<_>>()?;
        let valid = tensors.iter().all(Tensor::is_valid) && !overlaps(&tensors);
        let these: Vec<_> = tensors.iter().map(|tensor| (tensor.len, tensor.dtype)).collect();
        let inputs = tensors.iter().map(Tensor::input).collect();
        if let Some(plan) = &mut plan {
            expect(TestPlan::update(plan, inputs, blender.stream), valid && these == shape);
            continue;
        }
        let made = blender.plan(inputs);
        // 6 is OUT_OF_MEMORY: the chunk table of a long tensor.
        if !made.as_ref().is_err_and(|failure| failure.status == 6 && these.iter().any(|(len, _)| *len > 1 << 32)) {
            (plan, shape) = (expect(made, valid), these);
        }
    }
    Ok(Ok(()))
}));
