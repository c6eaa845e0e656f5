//! What a call returns: its status, and this thread's last message.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::environment::Environment;
use crate::config::MAX_CPU_THREADS;
use crate::error::Error;

/// As `gradblend_status` in the header.
pub type Status = i32;

pub(super) const OK: Status = 0;
pub(super) const INVALID_ARGUMENT: Status = 1;
pub(super) const NOT_BUILT: Status = 2;
pub(super) const NO_DRIVER: Status = 3;
pub(super) const NO_DEVICE: Status = 4;
pub(super) const UNSUPPORTED_DEVICE: Status = 5;
pub(super) const OUT_OF_MEMORY: Status = 6;
pub(super) const CUDA: Status = 7;
pub(super) const CORRUPT_STATE: Status = 8;
pub(super) const INTERNAL: Status = 9;

/// The name of each status, at its place.
pub(super) const NAMES: [&CStr; 10] = [
    c"GRADBLEND_OK",
    c"GRADBLEND_INVALID_ARGUMENT",
    c"GRADBLEND_NOT_BUILT",
    c"GRADBLEND_NO_DRIVER",
    c"GRADBLEND_NO_DEVICE",
    c"GRADBLEND_UNSUPPORTED_DEVICE",
    c"GRADBLEND_OUT_OF_MEMORY",
    c"GRADBLEND_CUDA",
    c"GRADBLEND_CORRUPT_STATE",
    c"GRADBLEND_INTERNAL",
];

pub(super) fn name(status: Status) -> &'static CStr {
    usize::try_from(status).ok().and_then(|status| NAMES.get(status)).unwrap_or(&c"unknown")
}

/// The status of each error. Without a wildcard: a new error does not compile until it has one.
fn status(error: &Error) -> Status {
    match error {
        Error::NotBuilt { .. } => NOT_BUILT,
        Error::NoDriver { .. } => NO_DRIVER,
        Error::NoDevice { .. } => NO_DEVICE,
        Error::UnsupportedDevice { .. } => UNSUPPORTED_DEVICE,
        Error::OutOfMemory { .. } => OUT_OF_MEMORY,
        // So many can be asked for, but the operating system has no room for them.
        Error::Threads { threads, .. } if *threads <= MAX_CPU_THREADS => OUT_OF_MEMORY,
        Error::Cuda { .. } => CUDA,
        Error::CorruptState { .. } => CORRUPT_STATE,
        Error::Threads { .. }
        | Error::Modalities { .. }
        | Error::Decay { .. }
        | Error::Damping { .. }
        | Error::UnknownMemory { .. }
        | Error::Dlpack { .. }
        | Error::NoArray
        | Error::UnknownScale { .. }
        | Error::Capturing { .. }
        | Error::DType { .. }
        | Error::ModalityCount { .. }
        | Error::Length { .. }
        | Error::MixedDTypes { .. }
        | Error::Unpaired { .. }
        | Error::Misaligned { .. }
        | Error::OutOfRange { .. }
        | Error::Overlap { .. }
        | Error::PlanTensors { .. }
        | Error::ForeignPlan
        | Error::ReleasedPlan
        | Error::Pass { .. }
        | Error::Count { .. }
        | Error::Weight { .. }
        | Error::Numerator { .. }
        | Error::SecondMoment { .. }
        | Error::Loss { .. }
        | Error::Schedule { .. }
        | Error::MisalignedScale { .. }
        | Error::Scale { .. }
        | Error::StateMismatch { .. } => INVALID_ARGUMENT,
    }
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The crate refused it.
    Refused(Error),
    /// An argument that Rust's types rule out, and only C can pass.
    Argument(String),
    /// A call panicked, this one or an earlier one on the same handle.
    Panicked(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Fault::Refused(error)
    }
}

impl Fault {
    fn told(self) -> (Status, String) {
        match self {
            Fault::Refused(error) => (status(&error), error.to_string()),
            Fault::Argument(message) => (INVALID_ARGUMENT, message),
            Fault::Panicked(message) => (INTERNAL, format!("a bug of gradblend: {message}")),
        }
    }
}

/// What a call with these arguments comes to.
pub(super) type Outcome<T = ()> = Result<T, Fault>;

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs a call's body. No panic goes further than this.
pub(super) fn call(body: impl FnOnce() -> Outcome) -> Status {
    let _environment = Environment::enter();
    // What a panic may leave half done is behind a lock taken for writing. That is poisoned then, and never used again.
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Fault::Panicked(said(&*panic))));
    let Err(fault) = outcome else { return OK };
    let (status, message) = fault.told();
    // A thread that is ending may have no place for the message any more.
    let _ = LAST.try_with(|last| *last.borrow_mut() = message);
    status
}

fn said(panic: &(dyn Any + Send)) -> String {
    let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    said.unwrap_or("panicked").into()
}

/// The length of this thread's last message; as much of it as fits is copied to `buffer`, and a 0 after it.
///
/// # Safety
/// `buffer` is NULL or has room for `bytes` bytes.
pub(super) unsafe fn last(buffer: *mut c_char, bytes: usize) -> usize {
    let copy = |message: &str| {
        if let Some(room) = bytes.checked_sub(1).filter(|_| !buffer.is_null()) {
            let copied = (0..=room.min(message.len())).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
            // SAFETY: at most `bytes` bytes in all, by the caller's promise.
            unsafe {
                buffer.copy_from_nonoverlapping(message.as_ptr().cast(), copied);
                buffer.add(copied).write(0);
            }
        }
        message.len()
    };
    LAST.try_with(|last| copy(&last.borrow())).unwrap_or_else(|_| copy(""))
}
