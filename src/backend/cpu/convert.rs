//! Conversions between a block of f32 and elements of a tensor.

use super::vector::{Isa, LANES, VectorElement};

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Converts a block to f32.
///
/// # Safety
/// The processor has the instruction set `I`, and as many elements as `to` has are readable at `from`.
#[inline(always)]
pub(super) unsafe fn widen<I: Isa, T: VectorElement>(from: *const T, to: &mut [f32]) {
    let whole = to.len() - to.len() % LANES;
    // SAFETY: `from` is valid for as many elements as `to` has.
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

/// Rounds a block of f32 once, to the tensor's dtype.
///
/// # Safety
/// The processor has the instruction set `I`, and as many elements as `from` has are writable at `to`.
#[inline(always)]
pub(super) unsafe fn narrow<I: Isa, T: VectorElement>(from: &[f32], to: *mut T) {
    let whole = from.len() - from.len() % LANES;
    // SAFETY: `to` may be written for as many elements as `from` has.
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

/// [`narrow`] with non-temporal stores of whole cache lines, which are then not read first.
///
/// # Safety
/// As [`narrow`].
#[inline(always)]
pub(super) unsafe fn narrow_non_temporal<I: Isa, T: VectorElement>(from: &[f32], to: *mut T) {
    let line = LINE / size_of::<T>();
    let head = to.align_offset(LINE).min(from.len());
    let whole = (from.len() - head) / line * line;
    // SAFETY: `to` may be written for as many elements as `from` has; after `head` elements it is aligned to a line.
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
