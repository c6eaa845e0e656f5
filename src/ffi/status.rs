//! Status of a call, and the thread's last error message.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::environment::Environment;
use crate::config::MAX_CPU_THREADS;
use crate::error::Error;

/// As `gradblend_status` in the header.
pub type Status = i32;

/// Declares the statuses in the order of their codes, and lists their names in `NAMES`.
macro_rules! statuses {
    ($($name:ident = $code:literal,)+) => {
        $(pub(super) const $name: Status = $code;)+
        /// Name of each status, by code.
        pub(super) const NAMES: &[&CStr] = &[$(c_name(concat!("GRADBLEND_", stringify!($name), "\0"))),+];
    };
}

statuses! {
    OK = 0,
    INVALID_ARGUMENT = 1,
    NOT_BUILT = 2,
    NO_DRIVER = 3,
    NO_DEVICE = 4,
    UNSUPPORTED_DEVICE = 5,
    OUT_OF_MEMORY = 6,
    CUDA = 7,
    CORRUPT_STATE = 8,
    INTERNAL = 9,
}

const fn c_name(name: &str) -> &CStr {
    match CStr::from_bytes_with_nul(name.as_bytes()) {
        Ok(name) => name,
        Err(_) => c"",
    }
}

pub(super) fn name(status: Status) -> &'static CStr {
    usize::try_from(status).ok().and_then(|status| NAMES.get(status)).unwrap_or(&c"unknown")
}

/// Status of an error. There is no wildcard, so a new error does not compile without a status.
fn status(error: &Error) -> Status {
    match error {
        Error::NotBuilt { .. } => NOT_BUILT,
        Error::NoDriver { .. } => NO_DRIVER,
        Error::NoDevice { .. } => NO_DEVICE,
        Error::UnsupportedDevice { .. } => UNSUPPORTED_DEVICE,
        Error::OutOfMemory { .. } => OUT_OF_MEMORY,
        // The number is allowed, but the operating system could not start the threads.
        Error::Threads { threads, .. } if *threads <= MAX_CPU_THREADS => OUT_OF_MEMORY,
        Error::Cuda { .. } => CUDA,
        Error::CorruptState { .. } => CORRUPT_STATE,
        Error::Threads { .. }
        | Error::Forked { .. }
        | Error::Modalities { .. }
        | Error::Decay { .. }
        | Error::Damping { .. }
        | Error::MinWeight { .. }
        | Error::MinWeightSum { .. }
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
        | Error::ForeignStream
        | Error::DeviceMemory { .. }
        | Error::Every
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
        | Error::Group { .. }
        | Error::RankDiffers { .. }
        | Error::Exchange { .. }
        | Error::StateMismatch { .. } => INVALID_ARGUMENT,
    }
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// The crate rejected the call.
    Rejected(Error),
    /// An argument that Rust's types exclude, so that only C can pass it.
    Argument(String),
    /// This call, or an earlier one on the same handle, panicked.
    Panicked(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Fault::Rejected(error)
    }
}

impl Fault {
    fn status_and_message(self) -> (Status, String) {
        match self {
            Fault::Rejected(error) => (status(&error), error.to_string()),
            Fault::Argument(message) => (INVALID_ARGUMENT, message),
            Fault::Panicked(message) => (INTERNAL, format!("a bug of gradblend: {message}")),
        }
    }
}

/// Result of a call.
pub(super) type Outcome<T = ()> = Result<T, Fault>;

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs the body of a call, and keeps its error message. No panic crosses this function.
pub(super) fn call(body: impl FnOnce() -> Outcome) -> Status {
    let _environment = Environment::enter();
    // A panic can leave only a value behind a write lock inconsistent. The lock is then poisoned, and the value not used again.
    let outcome =
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(Fault::Panicked(panic_message(&*panic))));
    let Err(fault) = outcome else { return OK };
    let (status, message) = fault.status_and_message();
    // A thread that is ending may have dropped its message already.
    let _ = LAST.try_with(|last| *last.borrow_mut() = message);
    status
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    message.unwrap_or("panicked").into()
}

/// Copies as much of this thread's last message as fits, and a final 0, to `buffer`; returns the length of the message.
///
/// # Safety
/// `buffer` is NULL or valid for writes of `bytes` bytes.
pub(super) unsafe fn last(buffer: *mut c_char, bytes: usize) -> usize {
    let copy = |message: &str| {
        if let Some(room) = bytes.checked_sub(1).filter(|_| !buffer.is_null()) {
            let copied = (0..=room.min(message.len())).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
            // SAFETY: this writes at most `bytes` bytes, for which the caller guarantees `buffer`.
            unsafe {
                buffer.copy_from_nonoverlapping(message.as_ptr().cast(), copied);
                buffer.add(copied).write(0);
            }
        }
        message.len()
    };
    LAST.try_with(|last| copy(&last.borrow())).unwrap_or_else(|_| copy(""))
}
