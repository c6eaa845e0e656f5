//! Pointers as C passes them, checked for what can be told of a pointer: whether it is NULL, and whether it is aligned.

use std::fmt::Display;

use super::status::{Fault, Outcome};

/// The record at `address`.
///
/// # Safety
/// `address` is NULL, or that of a `T` that can be read.
pub(super) unsafe fn record<T: Copy>(name: impl Display, address: *const T) -> Outcome<T> {
    check(name, address)?;
    // SAFETY: aligned, and the caller's promise.
    Ok(unsafe { address.read() })
}

/// The `len` numbers or records at `address`, which may be NULL if `len` is 0.
///
/// # Safety
/// `address` is NULL, or that of `len` `T`s that can be read and that nothing writes to while the slice is used.
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
    // SAFETY: aligned, within memory, and the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(address, len as usize) })
}

/// Whether there can be a `T` at `address`, as far as that can be told. Nothing is read or written.
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
