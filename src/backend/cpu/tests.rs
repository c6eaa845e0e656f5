//! Unit tests of private code: instruction sets agree bit for bit.

use std::io::Write;

use half::{bf16, f16};

use crate::abi::MAX_MODALITIES;
use crate::table::{Grouping, Table};
use crate::tensor::{DType, Element, TensorGrads};

use super::pass::{Kernel, SpanPass, Sums, best, portable};

/// Bits of the sums and of the blended gradient of one tensor, by one instruction set.
fn bits<T: Element>(
    kernel: Kernel,
    buffer: impl Fn(usize) -> Vec<T>,
    modalities: usize,
    non_temporal: bool,
) -> crate::error::Result<Vec<u64>> {
    let (t, g) = (buffer(0), buffer(1));
    let v: Vec<Vec<T>> = (0..modalities).map(|k| buffer(2 + k)).collect();
    let mut blended = buffer(100);
    let refs: Vec<Option<&[T]>> = v.iter().map(|v| Some(v.as_slice())).collect();
    let tensors = [TensorGrads::new(&t, &g, &refs).blended(&mut blended)];
    let table = Table::new(modalities, tensors, Grouping::THREADS)?;
    let weights = std::array::from_fn(|k| if k % 4 == 3 { 0.0 } else { 0.1 + 0.01 * k as f32 });
    let mut out = Vec::new();
    for accumulate in [false, true] {
        let pass = SpanPass {
            modalities,
            tensors: &table.rows.tensors,
            addresses: &table.rows.addresses,
            indices: &table.rows.indices,
            weights: &weights,
            dot: true,
            blend: true,
            accumulate,
            non_temporal,
        };
        let mut sums: Sums = [[0.0; 2]; MAX_MODALITIES];
        // SAFETY: the table's addresses are those of the slices above; one thread runs.
        unsafe { kernel(&pass, &table.chunks, &mut sums) };
        out.extend(sums.iter().flatten().map(|sum| sum.to_bits()));
    }
    out.extend(bytemuck::cast_slice::<T, u8>(&blended).iter().map(|byte| u64::from(*byte)));
    Ok(out)
}

/// Numbers of all magnitudes of a dtype, with subnormal numbers, halfway cases and values beyond its range.
fn number(buffer: usize, i: usize) -> f32 {
    let mut x = (buffer as u64) << 32 | i as u64;
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let exponent = (x >> 40) % 40;
    ((x & 0xff_ffff) as f32 / 8_388_608.0 - 1.0) * 2.0_f32.powi(exponent as i32 - 24)
}

#[test]
fn instruction_sets_agree_to_the_bit() -> crate::error::Result<()> {
    if std::ptr::fn_addr_eq(best(), portable as Kernel) {
        // The test harness captures what the macros print.
        let _ = writeln!(std::io::stderr(), "skipped: this processor has the portable instructions only");
        return Ok(());
    }
    for len in [1, 7, 8, 9, 1023, 1024, 1025, 5000] {
        for modalities in [1, 2, 3, 4, 5, 9, 32] {
            for non_temporal in [false, true] {
                let buffer = |buffer: usize| (0..len).map(|i| number(buffer, i)).collect::<Vec<f32>>();
                let f16s = |k: usize| buffer(k).into_iter().map(f16::from_f32).collect::<Vec<f16>>();
                let bf16s = |k: usize| buffer(k).into_iter().map(bf16::from_f32).collect::<Vec<bf16>>();
                let case = format!("len {len}, K = {modalities}, non-temporal: {non_temporal}");
                let one = |kernel| bits(kernel, buffer, modalities, non_temporal);
                assert_eq!(one(best())?, one(portable)?, "{}, {case}", DType::F32);
                let one = |kernel| bits(kernel, f16s, modalities, non_temporal);
                assert_eq!(one(best())?, one(portable)?, "{}, {case}", DType::F16);
                let one = |kernel| bits(kernel, bf16s, modalities, non_temporal);
                assert_eq!(one(best())?, one(portable)?, "{}, {case}", DType::BF16);
            }
        }
    }
    Ok(())
}

/// Every f16 and bf16, and the f32 halfway between neighbours and beside it, round alike.
#[test]
fn conversions_agree_for_every_half() {
    for bits16 in 0..=u16::MAX {
        let (one, other) = (f16::from_bits(bits16), bf16::from_bits(bits16));
        for x in [one.to_f32(), other.to_f32()].into_iter().filter(|x| x.is_finite()) {
            for x in [x, f32::from_bits(x.to_bits() | 0x1000), f32::from_bits(x.to_bits() | 0x8000)] {
                assert_eq!(f16::from_f32_const(x).to_bits(), f16::from_f32(x).to_bits());
                assert_eq!(bf16::from_f32_const(x).to_bits(), bf16::from_f32(x).to_bits());
            }
        }
    }
}
