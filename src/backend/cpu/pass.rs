//! One pass over the gradients of a span: dot, blend, or both. Each element is read once.
//!
//! A chunk is processed in blocks of 1,024 elements, and in a block the modality gradients in tiles of four: eight
//! accumulators, t, g and the products fit in sixteen vector registers. From the second tile on, t and g are read again
//! from the first-level cache, not from memory. A lane adds 1,024 / 8 = 128 products in f32 before its sum is added in
//! f64. With one rounding for a product and one for t - g that is 130 roundings of 2^-24, half of the guaranteed 2^-16.

use half::{bf16, f16};

use crate::abi::{Chunk, MAX_MODALITIES, TensorRecord};
use crate::tensor::DType;

use super::convert::{LINE, narrow, narrow_non_temporal, widen};
use super::modalities::{Modalities, Sorted};
use super::vector::{Isa, LANES, NON_TEMPORAL_ALIGNMENT, Portable, VectorElement};

/// Elements of a block: 4 KiB of each f32 buffer, so that a block stays in the first-level cache.
const BLOCK: usize = 1024;
/// Least size in bytes of a chunk that non-temporal stores are used for: at 400 bytes they double the time of a blend, at
/// 4,000 they save a tenth (100,000 tensors, an EPYC with 2 cores; `cargo run -p gradblend-lab`).
const MIN_NON_TEMPORAL_BYTES: usize = 2048;
/// Modality gradients of a tile, whose accumulators stay in registers.
const TILE: usize = 4;

/// How far ahead of its use each buffer is prefetched, in bytes: the processor's own prefetching stops at every page and
/// does not suffice for six buffers at once.
///
/// Throughput over that of plain reading of the same bytes, 1 GB moved, K = 4, 2 threads of a Xeon, two runs each on a
/// machine with other load, by distance:
///
/// | | none | 512 | 1024 | 4096 |
/// |---|---|---|---|---|
/// | dot, f32 | 1.00, 1.01 | 1.28, 1.21 | 1.23, 1.22 | 1.12, 1.13 |
/// | dot, bf16 | 0.99, 0.97 | 1.11, 1.15 | 1.19, 1.17 | 1.10, 1.10 |
/// | step, f32 | 1.04, 1.01 | 1.14, 1.22 | 1.21, 1.24 | 1.15, 1.14 |
/// | step, bf16 | 0.95, 0.88 | 1.08, 1.06 | 1.05, 1.04 | 1.04, 0.99 |
const PREFETCH_DISTANCE: usize = 1024;

/// What one pass does, and the tensors of a plan.
#[derive(Clone, Copy, Debug)]
pub(super) struct SpanPass<'a> {
    pub(super) modalities: usize,
    pub(super) tensors: &'a [TensorRecord],
    pub(super) addresses: &'a [u64],
    pub(super) indices: &'a [u32],
    pub(super) weights: &'a [f32; MAX_MODALITIES],
    pub(super) dot: bool,
    pub(super) blend: bool,
    pub(super) accumulate: bool,
    /// Write the blended gradient by non-temporal stores.
    pub(super) non_temporal: bool,
}

/// Sums c_k and d_k of a span.
pub(super) type Sums = [[f64; 2]; MAX_MODALITIES];

/// Runs a pass over chunks and adds to the sums.
///
/// # Safety
/// - the addresses in `pass` are valid, as the contract of `Backend::pass` says;
/// - nothing else accesses the blended elements of `chunks` during the call.
pub(super) type Kernel = unsafe fn(pass: &SpanPass<'_>, chunks: &[Chunk], sums: &mut Sums);

/// The fastest [`Kernel`] of this processor.
pub(super) fn best() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    if super::vector::Avx2::detected() {
        return avx2;
    }
    portable
}

/// [`Kernel`] for every processor.
///
/// # Safety
/// As [`Kernel`].
pub(super) unsafe fn portable(pass: &SpanPass<'_>, chunks: &[Chunk], sums: &mut Sums) {
    // SAFETY: the caller fulfils the contract of `Kernel`; `Portable` needs no instruction set.
    unsafe { run::<Portable>(pass, chunks, sums) }
}

/// [`Kernel`] for processors with AVX2 and F16C.
///
/// # Safety
/// As [`Kernel`], and the processor has AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn avx2(pass: &SpanPass<'_>, chunks: &[Chunk], sums: &mut Sums) {
    // SAFETY: the caller fulfils the contract of `Kernel` and guarantees AVX2 and F16C.
    unsafe { run::<super::vector::Avx2>(pass, chunks, sums) }
}

/// [`Kernel`] for an instruction set.
///
/// # Safety
/// As [`Kernel`], and the processor has the instruction set `I`.
#[inline(always)]
unsafe fn run<I: Isa>(pass: &SpanPass<'_>, chunks: &[Chunk], sums: &mut Sums) {
    for chunk in chunks {
        // SAFETY: the caller fulfils the contract of `Kernel`; a table wrote the dtype of the record.
        unsafe {
            match DType::of_record(pass.tensors[chunk.tensor as usize].dtype) {
                DType::F32 => elements::<I, f32>(pass, chunk, sums),
                DType::F16 => elements::<I, f16>(pass, chunk, sums),
                DType::BF16 => elements::<I, bf16>(pass, chunk, sums),
            }
        }
    }
    // SAFETY: the caller fulfils the contract of `Kernel`.
    unsafe { I::fence() };
}

/// Runs the parts of a pass that apply to a chunk's tensor, whose elements are `T`.
///
/// # Safety
/// As [`run`], for this chunk.
#[inline(always)]
unsafe fn elements<I: Isa, T: VectorElement>(pass: &SpanPass<'_>, chunk: &Chunk, sums: &mut Sums) {
    let tensor = chunk.tensor as usize;
    let record = &pass.tensors[tensor];
    let slots = tensor * pass.modalities..tensor * pass.modalities + record.present as usize;
    let present = Modalities { addresses: &pass.addresses[slots.clone()], indices: &pass.indices[slots] };
    let (dot, blend) = record.parts(pass.dot, pass.blend, pass.accumulate);
    let mut sorted = Sorted::default();
    let (unweighted, weighted) =
        if blend { present.split(pass.weights, &mut sorted) } else { (present, Modalities::default()) };
    // Nothing is added to the blended gradient.
    let blend = blend && !(pass.accumulate && weighted.is_empty());
    // SAFETY: the caller fulfils the contract of `Kernel`.
    unsafe {
        match (dot, blend) {
            (true, true) => blocks::<I, T, true, true>(pass, chunk, unweighted, weighted, sums),
            (true, false) => blocks::<I, T, true, false>(pass, chunk, unweighted, weighted, sums),
            (false, true) => blocks::<I, T, false, true>(pass, chunk, unweighted, weighted, sums),
            (false, false) => {}
        }
    }
}

/// Address of an element of a buffer.
#[inline(always)]
fn at<T>(address: u64, offset: usize) -> *mut T {
    std::ptr::with_exposed_provenance_mut::<T>(address as usize).wrapping_add(offset)
}

/// Processes a chunk in blocks: the products of all modalities, and the blend of `weighted`.
///
/// # Safety
/// As [`elements`]. With DOT, t and g are present; with BLEND, the blended gradient.
#[inline(always)]
unsafe fn blocks<I: Isa, T: VectorElement, const DOT: bool, const BLEND: bool>(
    pass: &SpanPass<'_>,
    chunk: &Chunk,
    unweighted: Modalities<'_>,
    weighted: Modalities<'_>,
    sums: &mut Sums,
) {
    let record = &pass.tensors[chunk.tensor as usize];
    let mut blend = [0.0_f32; BLOCK];
    // A gradient that is blended in place was just read, so its lines are in the cache already. A short chunk is mostly
    // partial lines.
    let in_place = [unweighted, weighted].iter().any(|list| list.addresses.contains(&record.blended));
    let long = chunk.len as usize * size_of::<T>() >= MIN_NON_TEMPORAL_BYTES;
    let non_temporal = pass.non_temporal && long && !pass.accumulate && !in_place;
    // DIRECT: all modalities that are blended fit in one tile, so a blended vector is complete in its register and is
    // stored from there. Non-temporal stores, which need alignment, then alternate with arithmetic: an EPYC with 2 cores
    // runs a step at 0.95 of plain reading; when a block is stored at once, at 0.70.
    let aligned = record.blended.is_multiple_of(NON_TEMPORAL_ALIGNMENT);
    let direct = BLEND && (1..=TILE).contains(&weighted.len()) && !pass.accumulate && (aligned || !non_temporal);
    let (start, len) = (chunk.start as usize, chunk.len as usize);
    let mut done = 0;
    while done < len {
        let count = BLOCK.min(len - done);
        let offset = start + done;
        // SAFETY: the addresses are valid for all elements of the chunk. `to` is aligned where `tile` stores to it by
        // non-temporal stores: `direct` says so, and a block's length is a multiple of that alignment.
        unsafe {
            if BLEND && !direct {
                if pass.accumulate {
                    widen::<I, T>(at(record.blended, offset), &mut blend[..count]);
                } else {
                    blend[..count].fill(0.0);
                }
            }
            let (t, g) = (at::<T>(record.train, offset), at::<T>(record.valid, offset));
            let to = at(record.blended, offset);
            let block = Block { t, g, to, non_temporal, offset, count, left: len - done, weights: pass.weights };
            // Before the blend, which may be stored over one of these gradients.
            if DOT {
                tiles::<I, T, DOT, false, false>(&block, unweighted, &mut blend, sums);
            }
            if direct {
                tiles::<I, T, DOT, BLEND, BLEND>(&block, weighted, &mut blend, sums);
            } else if BLEND {
                tiles::<I, T, DOT, BLEND, false>(&block, weighted, &mut blend, sums);
            }
            if BLEND && !direct {
                if non_temporal {
                    narrow_non_temporal::<I, T>(&blend[..count], to);
                } else {
                    narrow::<I, T>(&blend[..count], to);
                }
            }
        }
        done += count;
    }
}

/// A block of a chunk.
struct Block<'a, T> {
    t: *const T,
    g: *const T,
    /// Where the blended gradient goes, and whether by non-temporal stores.
    to: *mut T,
    non_temporal: bool,
    offset: usize,
    count: usize,
    /// Elements from `offset` to the end of the chunk.
    left: usize,
    weights: &'a [f32; MAX_MODALITIES],
}

/// Processes modalities of a block, one tile after the other.
///
/// # Safety
/// As [`tile`], but for any number of modalities; with DIRECT, of one tile.
#[inline(always)]
unsafe fn tiles<I: Isa, T: VectorElement, const DOT: bool, const BLEND: bool, const DIRECT: bool>(
    block: &Block<'_, T>,
    modalities: Modalities<'_>,
    blend: &mut [f32; BLOCK],
    sums: &mut Sums,
) {
    let mut rest = modalities;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(TILE.min(rest.len()));
        // SAFETY: the caller fulfils the contract of `tile` for all modalities.
        unsafe {
            match now.len() {
                1 => tile::<I, T, 1, DOT, BLEND, DIRECT>(block, now, blend, sums),
                2 => tile::<I, T, 2, DOT, BLEND, DIRECT>(block, now, blend, sums),
                3 => tile::<I, T, 3, DOT, BLEND, DIRECT>(block, now, blend, sums),
                _ => tile::<I, T, TILE, DOT, BLEND, DIRECT>(block, now, blend, sums),
            }
        }
        rest = later;
    }
}

/// Processes N modalities of a block: adds to their sums if DOT, to `blend` if BLEND. DIRECT: these are all modalities of
/// the blend, and the blended elements are stored to the block's destination.
///
/// # Safety
/// - the processor has the instruction set `I`;
/// - there are at least N modalities;
/// - `count` elements are readable at each of these addresses, and with DOT at `t` and `g`;
/// - with DIRECT, `count` elements are writable at `to`, which has the alignment of non-temporal stores if `non_temporal`.
#[inline(always)]
unsafe fn tile<I: Isa, T: VectorElement, const N: usize, const DOT: bool, const BLEND: bool, const DIRECT: bool>(
    block: &Block<'_, T>,
    modalities: Modalities<'_>,
    blend: &mut [f32; BLOCK],
    sums: &mut Sums,
) {
    let count = block.count;
    let index: [usize; N] = std::array::from_fn(|n| modalities.indices[n] as usize);
    let v: [*const T; N] = std::array::from_fn(|n| at::<T>(modalities.addresses[n], block.offset).cast_const());
    let blend = blend.as_mut_ptr();
    // SAFETY: the caller fulfils the contract of `tile`; `blend` has BLOCK elements, and `count` is at most BLOCK.
    unsafe {
        let weights: [I::Lanes; N] = std::array::from_fn(|n| I::splat(block.weights[index[n]]));
        let mut c = [I::splat(0.0); N];
        let mut d = [I::splat(0.0); N];
        let whole = count - count % LANES;
        let (line, distance) = (LINE / size_of::<T>(), PREFETCH_DISTANCE / size_of::<T>());
        let mut i = 0;
        while i < whole {
            // Only inside the chunk: what follows belongs to another thread or to nobody.
            if i % line == 0 && i + distance < block.left {
                for v in v {
                    I::prefetch(v.add(i + distance).cast());
                }
                if DOT {
                    I::prefetch(block.t.add(i + distance).cast());
                    I::prefetch(block.g.add(i + distance).cast());
                }
            }
            let x = std::array::from_fn(|n| T::load::<I>(v[n].add(i)));
            let (t, g) = if DOT {
                (T::load::<I>(block.t.add(i)), T::load::<I>(block.g.add(i)))
            } else {
                (I::splat(0.0), I::splat(0.0))
            };
            let before = if BLEND && !DIRECT { I::load_f32(blend.add(i)) } else { I::splat(0.0) };
            let sum = lanes::<I, N, DOT, BLEND>(t, g, &x, &weights, &mut c, &mut d, before);
            if DIRECT && block.non_temporal {
                T::store::<I, true>(block.to.add(i), sum);
            } else if DIRECT {
                T::store::<I, false>(block.to.add(i), sum);
            } else if BLEND {
                I::store_f32::<false>(blend.add(i), sum);
            }
            i += LANES;
        }
        if whole < count {
            // The last vector is padded with zeros, which change no sum.
            let rest = count - whole;
            let padded = |from: *const T| {
                let mut padded = [T::ZERO; LANES];
                std::ptr::copy_nonoverlapping(from.add(whole), padded.as_mut_ptr(), rest);
                T::load::<I>(padded.as_ptr())
            };
            let x = std::array::from_fn(|n| padded(v[n]));
            let (t, g) = if DOT { (padded(block.t), padded(block.g)) } else { (I::splat(0.0), I::splat(0.0)) };
            // `whole` + LANES is at most BLOCK, which is a multiple of LANES.
            let before = if BLEND && !DIRECT { I::load_f32(blend.add(whole)) } else { I::splat(0.0) };
            let sum = lanes::<I, N, DOT, BLEND>(t, g, &x, &weights, &mut c, &mut d, before);
            if DIRECT {
                let mut narrow = [T::ZERO; LANES];
                T::store::<I, false>(narrow.as_mut_ptr(), sum);
                std::ptr::copy_nonoverlapping(narrow.as_ptr(), block.to.add(whole), rest);
            } else if BLEND {
                I::store_f32::<false>(blend.add(whole), sum);
            }
        }
        if DOT {
            for n in 0..N {
                sums[index[n]][0] += I::fold(c[n]);
                sums[index[n]][1] += I::fold(d[n]);
            }
        }
    }
}

/// Adds the products of one vector of each gradient to the sums, and returns `blend` plus the weighted modalities.
///
/// # Safety
/// The processor has the instruction set `I`.
#[inline(always)]
unsafe fn lanes<I: Isa, const N: usize, const DOT: bool, const BLEND: bool>(
    t: I::Lanes,
    g: I::Lanes,
    x: &[I::Lanes; N],
    weights: &[I::Lanes; N],
    c: &mut [I::Lanes; N],
    d: &mut [I::Lanes; N],
    mut blend: I::Lanes,
) -> I::Lanes {
    // SAFETY: the caller guarantees the instruction set.
    unsafe {
        if DOT {
            let gap = I::sub(t, g);
            for n in 0..N {
                c[n] = I::add(c[n], I::mul(g, x[n]));
                d[n] = I::add(d[n], I::mul(gap, x[n]));
            }
        }
        if BLEND {
            for n in 0..N {
                blend = I::add(blend, I::mul(weights[n], x[n]));
            }
        }
    }
    blend
}
