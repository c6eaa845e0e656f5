//! Checks of C pointers: NULL and alignment, which is all that can be checked of a pointer.

use std::fmt::Display;

use super::status::{Fault, Outcome};

/// The record at `address`.
///
/// # Safety
/// `address` is NULL or valid for reads of a `T`.
pub(super) unsafe fn read<T: Copy>(name: impl Display, address: *const T) -> Outcome<T> {
    check(name, address)?;
    // SAFETY: `check` has seen that the address is not NULL and aligned; the caller guarantees the rest.
    Ok(unsafe { address.read() })
}

/// The `len` numbers or records at `address`, which may be NULL if `len` is 0.
///
/// # Safety
/// `address` is NULL or valid for reads of `len` `T`s, to which nothing writes while the slice is used.
pub(super) unsafe fn array<'a, T>(name: impl Display, address: *const T, len: u64) -> Outcome<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    check(&name, address)?;
    let bytes = len.checked_mul(size_of::<T>() as u64).and_then(|bytes| usize::try_from(bytes).ok());
    let end = bytes.filter(|bytes| *bytes <= isize::MAX as usize).and_then(|bytes| address.addr().checked_add(bytes));
    if end.is_none() {
        return Err(Fault::Argument(format!("{name} at {address:?} with {len} entries reach past the end of memory")));
    }
    // SAFETY: the address is not NULL and aligned, and the range does not overflow; the caller guarantees the rest.
    Ok(unsafe { std::slice::from_raw_parts(address, len as usize) })
}

/// Rejects an address that is NULL or not aligned to a `T`. Accesses no memory.
pub(super) fn check<T>(name: impl Display, address: *const T) -> Outcome {
    if address.is_null() {
        return Err(Fault::Argument(format!("{name} is NULL")));
    }
    if !address.is_aligned() {
        let alignment = align_of::<T>();
        return Err(Fault::Argument(format!("{name} at {address:?} is not aligned to {alignment} bytes")));
    }
    Ok(())
}
