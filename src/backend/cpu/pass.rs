//! One pass over the gradients of a span: dot, blend, or both, reading each element once.
//!
//! A chunk is taken in blocks of 1,024 elements. Inside a block, modality gradients are taken four at a time, so that
//! their eight accumulators, t, g and the products stay in sixteen vector registers; from the fifth on, t and g come from
//! the first-level cache again, not from memory. A lane adds 1,024 / 8 = 128 products in f32 before it is folded into
//! f64: with a rounding for the product and one for t - g that is 130 roundings of 2^-24, half of the 2^-16 that
//! is promised.

use half::{bf16, f16};

use crate::abi::{Chunk, MAX_MODALITIES, TensorRecord};
use crate::tensor::DType;

use super::vector::{Isa, LANES, Load, PAST_ALIGNMENT, Portable};

/// Elements that are in the first-level cache together: 4 KiB a list in f32.
const BLOCK: usize = 1024;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a chunk below which nothing is written past the cache: at 400, a blend takes twice as long that way
/// (`cargo bench --bench blend -- "100000 tensors"`, an EPYC of 2 cores), at 4,000 a tenth less.
const SHORT: usize = 2048;
/// Modality gradients that are in registers together.
const TILE: usize = 4;

/// Bytes of each list that are asked for before they are used: the processor's own prefetching stops at every page and
/// is not enough for six lists at once.
///
/// Share of reading one list after the other, 1 GB moved, K = 4, 2 threads of a Xeon, two runs each on a machine that was
/// not idle:
///
/// | | none | 512 | 1024 | 4096 |
/// |---|---|---|---|---|
/// | dot, f32 | 1.00, 1.01 | 1.28, 1.21 | 1.23, 1.22 | 1.12, 1.13 |
/// | dot, bf16 | 0.99, 0.97 | 1.11, 1.15 | 1.19, 1.17 | 1.10, 1.10 |
/// | step, f32 | 1.04, 1.01 | 1.14, 1.22 | 1.21, 1.24 | 1.15, 1.14 |
/// | step, bf16 | 0.95, 0.88 | 1.08, 1.06 | 1.05, 1.04 | 1.04, 0.99 |
const AHEAD: usize = 1024;

/// What one pass does to the tensors of a span.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work<'a> {
    pub(super) modalities: usize,
    pub(super) tensors: &'a [TensorRecord],
    pub(super) addresses: &'a [u64],
    pub(super) indices: &'a [u32],
    pub(super) weights: &'a [f32; MAX_MODALITIES],
    pub(super) dot: bool,
    pub(super) blend: bool,
    pub(super) accumulate: bool,
    /// Write the blend past the cache.
    pub(super) past_cache: bool,
}

/// Sums c_k and d_k of a span.
pub(super) type Sums = [[f64; 2]; MAX_MODALITIES];

/// Runs a pass over chunks, adding to the sums.
///
/// # Safety
/// The addresses in `work` are those of a plan whose maker vouches for them, and nothing else uses the blended
/// elements of `chunks` meanwhile.
pub(super) type Run = unsafe fn(work: &Work<'_>, chunks: &[Chunk], sums: &mut Sums);

/// The fastest [`Run`] of this processor.
pub(super) fn best() -> Run {
    #[cfg(target_arch = "x86_64")]
    if super::vector::Avx2::detected() {
        return avx2;
    }
    portable
}

/// [`Run`] for every processor.
///
/// # Safety
/// As [`Run`].
pub(super) unsafe fn portable(work: &Work<'_>, chunks: &[Chunk], sums: &mut Sums) {
    // SAFETY: as the caller's; `Portable` needs nothing of the processor.
    unsafe { run::<Portable>(work, chunks, sums) }
}

/// [`Run`] for processors with AVX2 and F16C.
///
/// # Safety
/// As [`Run`], and the processor has AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn avx2(work: &Work<'_>, chunks: &[Chunk], sums: &mut Sums) {
    // SAFETY: as the caller's.
    unsafe { run::<super::vector::Avx2>(work, chunks, sums) }
}

#[inline(always)]
unsafe fn run<I: Isa>(work: &Work<'_>, chunks: &[Chunk], sums: &mut Sums) {
    for chunk in chunks {
        // SAFETY: as the caller's; the dtype was written by a plan.
        unsafe {
            match work.tensors[chunk.tensor as usize].dtype {
                code if code == DType::F32 as u32 => elements::<I, f32>(work, chunk, sums),
                code if code == DType::F16 as u32 => elements::<I, f16>(work, chunk, sums),
                _ => elements::<I, bf16>(work, chunk, sums),
            }
        }
    }
    // SAFETY: as the caller's.
    unsafe { I::fence() };
}

#[inline(always)]
unsafe fn elements<I: Isa, T: Load>(work: &Work<'_>, chunk: &Chunk, sums: &mut Sums) {
    let record = &work.tensors[chunk.tensor as usize];
    let dot = work.dot && record.train != 0 && record.present != 0;
    let blend = work.blend && record.blended != 0 && (record.present != 0 || !work.accumulate);
    // SAFETY: as the caller's.
    unsafe {
        match (dot, blend) {
            (true, true) => blocks::<I, T, true, true>(work, chunk, sums),
            (true, false) => blocks::<I, T, true, false>(work, chunk, sums),
            (false, true) => blocks::<I, T, false, true>(work, chunk, sums),
            (false, false) => {}
        }
    }
}

/// Where one block of a list starts.
#[inline(always)]
fn at<T>(address: u64, offset: usize) -> *mut T {
    std::ptr::with_exposed_provenance_mut::<T>(address as usize).wrapping_add(offset)
}

#[inline(always)]
unsafe fn blocks<I: Isa, T: Load, const DOT: bool, const BLEND: bool>(work: &Work<'_>, chunk: &Chunk, sums: &mut Sums) {
    let tensor = chunk.tensor as usize;
    let record = &work.tensors[tensor];
    let present = record.present as usize;
    let slots = tensor * work.modalities..tensor * work.modalities + present;
    let addresses = &work.addresses[slots.clone()];
    let indices = &work.indices[slots];
    let mut blend = [0.0_f32; BLOCK];
    // In place, the block was just read and is in the cache anyway. And the ends of a short one would be parts of lines.
    let long = chunk.len as usize * size_of::<T>() >= SHORT;
    let past = work.past_cache && long && !work.accumulate && !addresses.contains(&record.blended);
    // Then the sum is whole before it leaves its register, and the processor has something to compute between stores past
    // the cache, which must be aligned. In bursts of a block, an EPYC of 2 cores takes them at 0.70 of plain reading, and
    // so at 0.95 (`cargo bench --bench step -- 1e8/K4/f32`).
    let aligned = record.blended.is_multiple_of(PAST_ALIGNMENT);
    let straight = BLEND && (1..=TILE).contains(&present) && !work.accumulate && (aligned || !past);
    let (start, len) = (chunk.start as usize, chunk.len as usize);
    let mut done = 0;
    while done < len {
        let count = BLOCK.min(len - done);
        let offset = start + done;
        // SAFETY: the plan's maker vouches for all elements of the chunk.
        unsafe {
            if BLEND && !straight {
                if work.accumulate {
                    widen::<I, T>(at(record.blended, offset), &mut blend[..count]);
                } else {
                    blend[..count].fill(0.0);
                }
            }
            let (t, g) = (at::<T>(record.train, offset), at::<T>(record.valid, offset));
            let to = at(record.blended, offset);
            let mut first = 0;
            while first < present {
                let addresses = &addresses[first..];
                let indices = &indices[first..];
                let (left, weights) = (len - done, work.weights);
                let block = Block { t, g, to, past, offset, count, left, addresses, indices, weights };
                match (present - first, straight) {
                    (1, true) => tile::<I, T, 1, DOT, BLEND, BLEND>(&block, &mut blend, sums),
                    (2, true) => tile::<I, T, 2, DOT, BLEND, BLEND>(&block, &mut blend, sums),
                    (3, true) => tile::<I, T, 3, DOT, BLEND, BLEND>(&block, &mut blend, sums),
                    (_, true) => tile::<I, T, TILE, DOT, BLEND, BLEND>(&block, &mut blend, sums),
                    (1, false) => tile::<I, T, 1, DOT, BLEND, false>(&block, &mut blend, sums),
                    (2, false) => tile::<I, T, 2, DOT, BLEND, false>(&block, &mut blend, sums),
                    (3, false) => tile::<I, T, 3, DOT, BLEND, false>(&block, &mut blend, sums),
                    (_, false) => tile::<I, T, TILE, DOT, BLEND, false>(&block, &mut blend, sums),
                }
                first += TILE;
            }
            if BLEND && !straight {
                if past {
                    narrow_past_cache::<I, T>(&blend[..count], to);
                } else {
                    narrow::<I, T>(&blend[..count], to);
                }
            }
        }
        done += count;
    }
}

/// A block and the modalities still to be taken of it.
struct Block<'a, T> {
    t: *const T,
    g: *const T,
    /// Where the blend goes, and whether past the cache.
    to: *mut T,
    past: bool,
    offset: usize,
    count: usize,
    /// Elements from `offset` to the end of the chunk.
    left: usize,
    addresses: &'a [u64],
    indices: &'a [u32],
    weights: &'a [f32; MAX_MODALITIES],
}

/// The next N modalities of a block: adds to their sums if DOT, to `blend` if BLEND. STRAIGHT: these are all there are,
/// and their blend goes where it belongs.
#[inline(always)]
unsafe fn tile<I: Isa, T: Load, const N: usize, const DOT: bool, const BLEND: bool, const STRAIGHT: bool>(
    block: &Block<'_, T>,
    blend: &mut [f32; BLOCK],
    sums: &mut Sums,
) {
    let count = block.count;
    let index: [usize; N] = std::array::from_fn(|n| block.indices[n] as usize);
    let v: [*const T; N] = std::array::from_fn(|n| at::<T>(block.addresses[n], block.offset).cast_const());
    let blend = blend.as_mut_ptr();
    // SAFETY: `count` elements are there in each list and at `to`, which is aligned if it must be; and BLOCK in `blend`.
    unsafe {
        let weights: [I::Lanes; N] = std::array::from_fn(|n| I::splat(block.weights[index[n]]));
        let mut c = [I::splat(0.0); N];
        let mut d = [I::splat(0.0); N];
        let whole = count - count % LANES;
        let (line, ahead) = (LINE / size_of::<T>(), AHEAD / size_of::<T>());
        let mut i = 0;
        while i < whole {
            // Not past the chunk: what follows there is not ours to read, or another thread's.
            if i % line == 0 && i + ahead < block.left {
                for v in v {
                    I::prefetch(v.add(i + ahead).cast());
                }
                if DOT {
                    I::prefetch(block.t.add(i + ahead).cast());
                    I::prefetch(block.g.add(i + ahead).cast());
                }
            }
            let x = std::array::from_fn(|n| T::load::<I>(v[n].add(i)));
            let (t, g) = if DOT {
                (T::load::<I>(block.t.add(i)), T::load::<I>(block.g.add(i)))
            } else {
                (I::splat(0.0), I::splat(0.0))
            };
            let before = if BLEND && !STRAIGHT { I::load_f32(blend.add(i)) } else { I::splat(0.0) };
            let sum = lanes::<I, N, DOT, BLEND>(t, g, &x, &weights, &mut c, &mut d, before);
            if STRAIGHT && block.past {
                T::store::<I, true>(block.to.add(i), sum);
            } else if STRAIGHT {
                T::store::<I, false>(block.to.add(i), sum);
            } else if BLEND {
                I::store_f32::<false>(blend.add(i), sum);
            }
            i += LANES;
        }
        if whole < count {
            // The rest is padded with zeros, which change no sum.
            let rest = count - whole;
            let padded = |from: *const T| {
                let mut padded = [T::ZERO; LANES];
                std::ptr::copy_nonoverlapping(from.add(whole), padded.as_mut_ptr(), rest);
                T::load::<I>(padded.as_ptr())
            };
            let x = std::array::from_fn(|n| padded(v[n]));
            let (t, g) = if DOT { (padded(block.t), padded(block.g)) } else { (I::splat(0.0), I::splat(0.0)) };
            // `whole` + LANES is at most BLOCK, a multiple of LANES.
            let before = if BLEND && !STRAIGHT { I::load_f32(blend.add(whole)) } else { I::splat(0.0) };
            let sum = lanes::<I, N, DOT, BLEND>(t, g, &x, &weights, &mut c, &mut d, before);
            if STRAIGHT {
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
    // SAFETY: the caller vouches for the instruction set.
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

/// Reads a block as f32.
#[inline(always)]
unsafe fn widen<I: Isa, T: Load>(from: *const T, to: &mut [f32]) {
    let whole = to.len() - to.len() % LANES;
    // SAFETY: as many elements as `to` has are there.
    unsafe {
        let mut i = 0;
        while i < whole {
            I::store_f32::<false>(to.as_mut_ptr().add(i), T::load::<I>(from.add(i)));
            i += LANES;
        }
        let (mut narrow, mut wide) = ([T::ZERO; LANES], [0.0; LANES]);
        let rest = &mut to[whole..];
        std::ptr::copy_nonoverlapping(from.add(whole), narrow.as_mut_ptr(), rest.len());
        I::store_f32::<false>(wide.as_mut_ptr(), T::load::<I>(narrow.as_ptr()));
        rest.copy_from_slice(&wide[..rest.len()]);
    }
}

/// Rounds f32 to the tensor's dtype, once.
#[inline(always)]
unsafe fn narrow<I: Isa, T: Load>(from: &[f32], to: *mut T) {
    let whole = from.len() - from.len() % LANES;
    // SAFETY: as many elements as `from` has may be written.
    unsafe {
        let mut i = 0;
        while i < whole {
            T::store::<I, false>(to.add(i), I::load_f32(from.as_ptr().add(i)));
            i += LANES;
        }
        let (mut wide, mut narrow) = ([0.0; LANES], [T::ZERO; LANES]);
        wide[..from.len() - whole].copy_from_slice(&from[whole..]);
        T::store::<I, false>(narrow.as_mut_ptr(), I::load_f32(wide.as_ptr()));
        std::ptr::copy_nonoverlapping(narrow.as_ptr(), to.add(whole), from.len() - whole);
    }
}

/// [`narrow`], but whole cache lines go to memory without being read first.
#[inline(always)]
unsafe fn narrow_past_cache<I: Isa, T: Load>(from: &[f32], to: *mut T) {
    let line = LINE / size_of::<T>();
    let head = to.align_offset(LINE).min(from.len());
    let whole = (from.len() - head) / line * line;
    // SAFETY: as many elements as `from` has may be written; past `head`, `to` is aligned to a cache line.
    unsafe {
        narrow::<I, T>(&from[..head], to);
        let mut i = head;
        while i < head + whole {
            T::store::<I, true>(to.add(i), I::load_f32(from.as_ptr().add(i)));
            i += LANES;
        }
        narrow::<I, T>(&from[i..], to.add(i));
    }
}
