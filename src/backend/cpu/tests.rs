//! What only the inside of the room can see: that instruction sets agree to the bit.

use half::{bf16, f16};

use crate::abi::MAX_MODALITIES;
use crate::table::{Grouping, Table};
use crate::tensor::{DType, Element, TensorGrads};

use super::pass::{Run, Sums, Work, best, portable};

/// Bits of the sums and of the blend of one tensor, by one instruction set.
fn bits<T: Element>(run: Run, list: impl Fn(usize) -> Vec<T>, modalities: usize, past_cache: bool) -> Vec<u64> {
    let (t, g) = (list(0), list(1));
    let v: Vec<Vec<T>> = (0..modalities).map(|k| list(2 + k)).collect();
    let mut blended = list(100);
    let refs: Vec<Option<&[T]>> = v.iter().map(|v| Some(v.as_slice())).collect();
    let tensors = [TensorGrads::new(&t, &g, &refs).blended(&mut blended)];
    let Ok(table) = Table::new(modalities, &tensors, Grouping::THREADS) else { return Vec::new() };
    let weights = std::array::from_fn(|k| 0.1 + 0.01 * k as f32);
    let mut out = Vec::new();
    for accumulate in [false, true] {
        let work = Work {
            modalities,
            tensors: &table.tensors,
            addresses: &table.addresses,
            indices: &table.indices,
            weights: &weights,
            dot: true,
            blend: true,
            accumulate,
            past_cache,
        };
        let mut sums: Sums = [[0.0; 2]; MAX_MODALITIES];
        // SAFETY: the table's addresses are those of the slices above; one thread runs.
        unsafe { run(&work, &table.chunks, &mut sums) };
        out.extend(sums.iter().flatten().map(|sum| sum.to_bits()));
    }
    let _ = tensors;
    let bytes = std::mem::size_of::<T>() * blended.len();
    // SAFETY: f32, f16 and bf16 are plain numbers without padding.
    let bytes = unsafe { std::slice::from_raw_parts(blended.as_ptr().cast::<u8>(), bytes) };
    out.extend(bytes.iter().map(|byte| u64::from(*byte)));
    out
}

/// Numbers of all magnitudes that the dtype has, subnormal ones, halfway cases and values beyond its range included.
fn number(list: usize, i: usize) -> f32 {
    let mut x = (list as u64) << 32 | i as u64;
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let exponent = (x >> 40) % 40;
    ((x & 0xff_ffff) as f32 / 8_388_608.0 - 1.0) * 2.0_f32.powi(exponent as i32 - 24)
}

#[test]
fn instruction_sets_agree_to_the_bit() {
    if std::ptr::fn_addr_eq(best(), portable as Run) {
        println!("skipped: this processor has the portable instructions only");
        return;
    }
    for len in [1, 7, 8, 9, 1023, 1024, 1025, 5000] {
        for modalities in [1, 2, 3, 4, 5, 9, 32] {
            for past_cache in [false, true] {
                let list = |list: usize| (0..len).map(|i| number(list, i)).collect::<Vec<f32>>();
                let half = |k: usize| list(k).into_iter().map(f16::from_f32).collect::<Vec<f16>>();
                let brain = |k: usize| list(k).into_iter().map(bf16::from_f32).collect::<Vec<bf16>>();
                let case = format!("len {len}, K = {modalities}, past the cache: {past_cache}");
                let one = |run| bits(run, list, modalities, past_cache);
                assert_eq!(one(best()), one(portable), "{}, {case}", DType::F32);
                let one = |run| bits(run, half, modalities, past_cache);
                assert_eq!(one(best()), one(portable), "{}, {case}", DType::F16);
                let one = |run| bits(run, brain, modalities, past_cache);
                assert_eq!(one(best()), one(portable), "{}, {case}", DType::BF16);
            }
        }
    }
}

/// Every f16 and bf16 there is, and the f32 halfway between neighbours and beside it, round the same way.
#[test]
fn conversions_agree_for_every_half() {
    for bits16 in 0..=u16::MAX {
        let half = f16::from_bits(bits16);
        let brain = bf16::from_bits(bits16);
        for x in [half.to_f32(), brain.to_f32()].into_iter().filter(|x| x.is_finite()) {
            for x in [x, f32::from_bits(x.to_bits() | 0x1000), f32::from_bits(x.to_bits() | 0x8000)] {
                assert_eq!(f16::from_f32_const(x).to_bits(), f16::from_f32(x).to_bits());
                assert_eq!(bf16::from_f32_const(x).to_bits(), bf16::from_f32(x).to_bits());
            }
        }
    }
}
