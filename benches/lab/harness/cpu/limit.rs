//! Reading, and nothing else.

use std::hint::black_box;

use rayon::prelude::*;

use super::super::Way;
use super::super::lists::Real;
use super::Inputs;

/// Bytes that reading abreast asks for before it uses them.
const READ_AHEAD: usize = 1024;

/// Bytes of a piece of plain reading. Rayon hands out runs of them. 256 KiB is no faster or slower.
const READ_PIECE: usize = 1 << 22;

/// Plain reading of the bytes of the floor: what a pass writes is read, too.
pub(super) struct Read {
    pieces: Vec<Piece>,
    /// By one thread: so few bytes that to wake another takes longer.
    alone: bool,
    /// Four places at a time, with a prefetch. Beyond the cache it is up to a fifth faster.
    abreast: bool,
}

/// Some bytes of the inputs' lists, which cannot be borrowed beside them.
#[derive(Clone, Copy)]
struct Piece(*const [u8]);

// SAFETY: nothing writes to the lists while pieces are read.
unsafe impl Sync for Piece {}

impl Read {
    /// The lists from end to end: where some are absent, as many bytes from the start.
    pub(super) fn new<T: Real>(inputs: &Inputs<T>, abreast: bool) -> Self {
        let floor = inputs.bytes as usize;
        let mut left = floor;
        let mut pieces = Vec::new();
        for list in inputs.lists.all() {
            for piece in list.chunks(READ_PIECE / size_of::<T>()) {
                let bytes = left.min(size_of_val(piece));
                left -= bytes;
                pieces.push(Piece(std::ptr::slice_from_raw_parts(piece.as_ptr().cast(), bytes)));
            }
        }
        const FEW: usize = 1 << 20;
        Read { pieces, alone: inputs.threads == 1 || floor <= FEW, abreast }
    }
}

impl<T: Real> Way<Inputs<T>> for Read {
    fn run(&mut self, inputs: &mut Inputs<T>, _: usize) {
        let abreast = self.abreast;
        // SAFETY: a piece of the lists, which are alive and not written to meanwhile.
        let sum = |piece: &Piece| read(unsafe { &*piece.0 }, abreast);
        let pieces = &self.pieces;
        black_box(if self.alone {
            pieces.iter().map(sum).fold(0, u64::wrapping_add)
        } else {
            inputs.pool.install(|| pieces.par_iter().map(sum).reduce(|| 0, u64::wrapping_add))
        });
    }
}
/// Adds bytes up as u64: 32 sums side by side, of one place in memory, or of four far apart with a prefetch.
#[inline(always)]
fn read_plainly(bytes: &[u8], abreast: bool, prefetch: impl Fn(*const u64)) -> u64 {
    const SUMS: usize = 32;
    const PARTS: usize = 4;
    const LINE: usize = SUMS / PARTS;
    // SAFETY: any bytes are u64.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    let ends = [head, tail].into_iter().flatten().map(|byte| u64::from(*byte)).sum::<u64>();
    let lines = words.chunks_exact(SUMS);
    let mut sums = [0_u64; SUMS];
    let rest = lines.remainder();
    if abreast {
        let part = (words.len() - rest.len()) / PARTS;
        for at in (0..part).step_by(LINE) {
            for p in 0..PARTS {
                prefetch(words.as_ptr().wrapping_add(p * part + at + READ_AHEAD / 8));
            }
            for p in 0..PARTS {
                for i in 0..LINE {
                    // SAFETY: a line of a part: `part` is a multiple of LINE, and the parts are within `words`.
                    let word = unsafe { *words.get_unchecked(p * part + at + i) };
                    sums[p * LINE + i] = sums[p * LINE + i].wrapping_add(word);
                }
            }
        }
    } else {
        for line in lines {
            for i in 0..SUMS {
                sums[i] = sums[i].wrapping_add(line[i]);
            }
        }
    }
    sums.iter().chain(rest).fold(ends, |sum, word| sum.wrapping_add(*word))
}

/// [`read_plainly`] in the widest vectors that this crate uses.
fn read(bytes: &[u8], abreast: bool) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        #[target_feature(enable = "avx2")]
        #[allow(unused_unsafe, reason = "a prefetch needs it in older compilers only")]
        fn avx2(bytes: &[u8], abreast: bool) -> u64 {
            // SAFETY: a prefetch may name any address.
            read_plainly(bytes, abreast, |at| unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) })
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { avx2(bytes, abreast) };
        }
    }
    read_plainly(bytes, abreast, |_| {})
}
