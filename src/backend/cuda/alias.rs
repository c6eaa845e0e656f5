//! A second name for a library that is loaded, for whoever loads it by that name.
//!
//! The loader takes a library that is loaded already if its name (DT_SONAME) is the wanted one. So an empty library with that
//! name, which needs the other one, leads to it: a lookup in a library goes on in those that it needs.

use std::path::Path;

/// Loads an empty library called `name` that needs the library at `path`. It stays loaded.
///
/// # Errors
/// Why that failed.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn load(name: &str, path: &Path) -> Result<(), String> {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::ffi::OsStrExt;

    // SAFETY: the name is a string that ends with 0.
    let descriptor = unsafe { libc::memfd_create(c"gradblend-alias".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    // SAFETY: the descriptor is open, and nobody else has it.
    let mut file = unsafe { File::from_raw_fd(descriptor) };
    file.write_all(&empty_library(name.as_bytes(), path.as_os_str().as_bytes())).map_err(|error| error.to_string())?;
    // SAFETY: the library has no code.
    let loaded = unsafe { libloading::Library::new(format!("/proc/self/fd/{}", file.as_raw_fd())) };
    let library = loaded.map_err(|error| error.to_string())?;
    std::mem::forget(library);
    // Stays open, so that no other file gets the name that the loader knows this one by.
    std::mem::forget(file);
    Ok(())
}

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(super) fn load(_: &str, _: &Path) -> Result<(), String> {
    Err("this system has no second names for libraries".into())
}

/// The bytes of a shared library without code, with a name and the path of one library that it needs. The records are
/// those of the ELF specification (System V ABI, chapters 4 and 5) for 64 bits.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn empty_library(name: &[u8], needed: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const SEGMENT: u64 = 56;
    const DYNAMIC: u64 = HEADER + 3 * SEGMENT;
    const DYNAMIC_BYTES: u64 = 8 * 16;
    /// The one symbol that each table has, which is undefined.
    const SYMBOLS: u64 = DYNAMIC + DYNAMIC_BYTES;
    const SYMBOL: u64 = 24;
    /// A hash table of one bucket, which is empty.
    const HASHES: u64 = SYMBOLS + SYMBOL;
    const STRINGS: u64 = HASHES + 16;
    const MACHINE: u16 = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
    const PAGE: u64 = 0x10000;
    const READ_WRITE: u32 = 6;

    let strings = [b"\0", name, b"\0", needed, b"\0"].concat();
    let needed_offset = name.len() as u64 + 2;
    let length = STRINGS + strings.len() as u64;
    let mut bytes = Vec::with_capacity(length as usize);
    let mut words = |words: &[u64]| bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
    // 64 bits, little-endian, version 1; a shared library of version 1; segments after the header, no sections.
    let sizes = HEADER << 32 | SEGMENT << 48;
    words(&[u64::from_le_bytes(*b"\x7fELF\x02\x01\x01\0"), 0, 3 | u64::from(MACHINE) << 16 | 1 << 32]);
    words(&[0, HEADER, 0, sizes, 3]);
    // PT_LOAD of the whole file: the loader writes addresses into the dynamic segment.
    words(&[pair(1, READ_WRITE), 0, 0, 0, length, length, PAGE]);
    // PT_DYNAMIC.
    words(&[pair(2, READ_WRITE), DYNAMIC, DYNAMIC, DYNAMIC, DYNAMIC_BYTES, DYNAMIC_BYTES, 8]);
    // PT_GNU_STACK: without it, the loader would make stacks executable.
    words(&[pair(0x6474_e551, READ_WRITE), 0, 0, 0, 0, 0, 16]);
    // DT_SONAME, DT_NEEDED, DT_STRTAB, DT_STRSZ, DT_SYMTAB, DT_SYMENT, DT_HASH, DT_NULL.
    words(&[14, 1, 1, needed_offset, 5, STRINGS, 10, strings.len() as u64]);
    words(&[6, SYMBOLS, 11, SYMBOL, 4, HASHES, 0, 0]);
    words(&[0; (SYMBOL / 8) as usize]);
    words(&[pair(1, 1), 0]);
    bytes.extend(strings);
    bytes
}
