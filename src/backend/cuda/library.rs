//! Finds the driver's library, and makes cudarc use the same one.

use std::env;
use std::ffi::{c_int, c_uint};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::driver::sys::CUresult;
use libloading::Library;

use super::alias;
use crate::error::{Error, Result};
use crate::process::Process;

/// Names of the library. The driver installs the first; a toolkit has a stub with the second, for linking.
const NAMES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
/// The names that cudarc tries, as far as there are such libraries.
const CUDARC_NAMES: &[&str] = if cfg!(windows) { NAMES } else { &["libcuda.so", "libcuda.so.1"] };
/// Where drivers are: of distributions, of WSL, of containers.
const FOLDERS: [&str; 6] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/lib/wsl/lib",
    "/usr/local/nvidia/lib64",
];

/// Every driver function that this crate calls. cudarc panics at a missing one, so a library has to have all of them.
const FUNCTIONS: &[&str] = &[
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGetErrorName",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuPointerGetAttribute",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
];

/// Finds the library once for the process. It stays loaded.
///
/// # Errors
/// [`Error::NoDriver`], with all libraries that were tried; [`Error::Forked`] in a process whose parent has found it.
pub(super) fn load() -> Result<()> {
    static LOADED: OnceLock<(Process, std::result::Result<(), String>)> = OnceLock::new();
    let current = Process::current()?;
    let (process, loaded) = LOADED.get_or_init(|| (current, find()));
    match loaded {
        Ok(()) if process.is_current() => Ok(()),
        Ok(()) => Err(Error::Forked { what: "CUDA driver was initialised" }),
        Err(reason) => Err(Error::NoDriver { reason: reason.clone() }),
    }
}

/// Loads the first library that is a driver, and makes cudarc use it.
fn find() -> std::result::Result<(), String> {
    let mut reasons = Vec::new();
    for candidate in candidates() {
        match open(&candidate) {
            Ok(library) => {
                let path = path(&library).unwrap_or(candidate);
                let used = make_cudarc_use(&library, &path);
                std::mem::forget(library);
                return used;
            }
            Err(reason) if reasons.contains(&reason) => {}
            Err(reason) => reasons.push(reason),
        }
    }
    Err(reasons.join("; "))
}

/// Libraries that are loaded; the one that the loader finds; then all files in the folders that it searches, as its search
/// ends at the first file, which can be a stub. The second name comes last: the loader would remember it of a stub.
fn candidates() -> Vec<PathBuf> {
    let searched = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let searched = searched.to_string_lossy();
    // An empty part is the current folder.
    let searched = searched.split([':', ';']).filter(|_| !searched.is_empty());
    let in_folder =
        |folder| NAMES.iter().filter_map(move |name| std::path::absolute(Path::new(folder).join(name)).ok());
    let paths = searched.flat_map(in_folder).chain(cached()).chain(FOLDERS.into_iter().flat_map(in_folder));
    let mut names = NAMES.iter().map(PathBuf::from);
    let first = loaded().into_iter().chain(names.next());
    first.chain(paths.filter(|path| path.exists())).chain(names).collect()
}

/// Files of a name of the driver, or such a name with a version, that this process has loaded.
fn loaded() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let files = maps.lines().filter_map(|line| line.find('/').map(|start| PathBuf::from(&line[start..])));
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libcuda.so"));
    let mut files: Vec<PathBuf> = files.filter(named).collect();
    files.dedup();
    files
}

/// Files of the driver's names in the loader's cache, which has the paths of all libraries as strings that end with 0.
fn cached() -> Vec<PathBuf> {
    let cache = fs::read("/etc/ld.so.cache").unwrap_or_default();
    let strings = cache.split(|byte| *byte == 0).filter_map(|string| std::str::from_utf8(string).ok());
    let paths = strings.filter(|string| string.starts_with('/')).map(PathBuf::from);
    paths.filter(|path| NAMES.iter().any(|name| path.file_name().is_some_and(|file| file == *name))).collect()
}

/// Opens a library, if it is a driver with all functions.
fn open(name: &Path) -> std::result::Result<Library, String> {
    // SAFETY: loading runs the initialisers of the driver, which every CUDA program runs.
    let library = unsafe { Library::new(name) }.map_err(|error| {
        // The message of the dynamic linker starts with the name.
        let why = std::error::Error::source(&error).map(ToString::to_string);
        why.unwrap_or_else(|| format!("{}: {error}", name.display()))
    })?;
    let path = path(&library).unwrap_or_else(|| name.into());
    // Before the others: a stub, too, can lack functions.
    // SAFETY: the function of this name has this type in every driver. Initialising twice has no effect.
    let result = unsafe {
        let init = library.get::<unsafe extern "system" fn(c_uint) -> c_int>("cuInit");
        init.map(|init| init(0)).map_err(|_| format!("{} has no cuInit", path.display()))?
    };
    if result == CUresult::CUDA_ERROR_STUB_LIBRARY as c_int {
        return Err(format!("{} is the stub of a toolkit, not a driver", path.display()));
    }
    if let Some(function) = FUNCTIONS.iter().find(|name| address(&library, name).is_none()) {
        return Err(format!("{} has no {function}", path.display()));
    }
    Ok(library)
}

/// Address of a function.
fn address(library: &Library, name: &str) -> Option<*const ()> {
    // SAFETY: the symbol is only looked up, not called.
    unsafe { library.get::<*const ()>(name) }.ok().map(|symbol| *symbol)
}

/// The file of a library.
#[cfg(unix)]
fn path(library: &Library) -> Option<PathBuf> {
    use std::ffi::{CStr, OsStr};
    use std::os::unix::ffi::OsStrExt;
    let inside = address(library, "cuInit")?;
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: the address is only looked up. `info` is a valid out-pointer, and all its fields may be zero.
    let info = unsafe { (libc::dladdr(inside.cast(), info.as_mut_ptr()) != 0).then(|| info.assume_init()) };
    let name = info.map(|info| info.dli_fname).filter(|name| !name.is_null())?;
    // SAFETY: the loader's name of the library is a string that lives as long as the library, which is borrowed here.
    Some(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()).into())
}

#[cfg(not(unix))]
fn path(_: &Library) -> Option<PathBuf> {
    None
}

/// Makes cudarc use this library, as far as cudarc loads one and is not linked to it.
fn make_cudarc_use(library: &Library, path: &Path) -> std::result::Result<(), String> {
    // Before anybody asks the loader for this name: it would remember the name of a stub that it finds.
    let made = alias::load(CUDARC_NAMES[0], path);
    // SAFETY: cudarc loads the same.
    let other = CUDARC_NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
    if other.as_ref().is_some_and(|other| address(other, "cuInit") == address(library, "cuInit")) {
        return Ok(());
    }
    let (path, why) = (path.display(), made.err().unwrap_or_else(|| "it was loaded before".into()));
    let other = other.as_ref().and_then(self::path).unwrap_or_default();
    Err(format!("{} would be used instead of the driver {path}: {why}", other.display()))
}

#[cfg(test)]
mod tests {
    /// Every function that is called is looked up first, because cudarc panics at one that a driver lacks.
    #[test]
    fn every_call_is_looked_up() {
        let own = [
            include_str!("driver.rs"),
            include_str!("context.rs"),
            include_str!("queue.rs"),
            include_str!("memory.rs"),
            include_str!("mod.rs"),
        ];
        let mut calls: Vec<&str> = own
            .into_iter()
            .flat_map(|source| source.split("call!(").skip(1).chain(source.split("sys::cu").skip(1)))
            .map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or(""))
            .map(|name| name.trim_start_matches("cu"))
            .filter(|name| name.starts_with(char::is_uppercase))
            .collect();
        calls.sort_unstable();
        calls.dedup();
        let listed: Vec<&str> = super::FUNCTIONS.iter().map(|name| name.trim_start_matches("cu")).collect();
        assert_eq!(calls, listed);
    }
}
