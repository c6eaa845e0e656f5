//! Errors of any face, and the one comparison of them with what a test expects.

use std::ffi::CStr;
use std::fmt;

use gradblend::{Error, ffi};

/// Result of a call of any face.
pub type Result<T> = std::result::Result<T, Failure>;

/// A call that failed: the error of the Rust API, or the status and the message of the C functions.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The status as C has it.
    pub status: i32,
    /// The message.
    pub message: String,
    /// The error, where the call was of the Rust API.
    pub error: Option<Error>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", name(self.status), self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { status: status(&error), message: error.to_string(), error: Some(error) }
    }
}

impl Failure {
    /// Whether a call of the C functions succeeded; if not, with this thread's last message.
    pub fn check(status: i32) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let mut buffer = [0_u8; 512];
        // SAFETY: the buffer has as many bytes as the call is told.
        let len = unsafe { ffi::gradblend_last_error(buffer.as_mut_ptr().cast(), buffer.len()) };
        let message = String::from_utf8_lossy(&buffer[..len.min(buffer.len() - 1)]).into_owned();
        Err(Failure { status, message, error: None })
    }
}

/// The name that C has for a status.
pub fn name(status: i32) -> &'static str {
    // SAFETY: the library returns a string that lives as long as the library.
    unsafe { CStr::from_ptr(ffi::gradblend_status_name(status)) }.to_str().unwrap_or("")
}

/// The status that the C header promises for an error; this is a second statement of it, not the library's own.
fn status(error: &Error) -> i32 {
    match error {
        Error::NotBuilt { .. } => 2,
        Error::NoDriver { .. } => 3,
        Error::NoDevice { .. } => 4,
        Error::UnsupportedDevice { .. } => 5,
        Error::OutOfMemory { .. } => 6,
        Error::Threads { threads, .. } if *threads <= 4096 => 6,
        Error::Cuda { .. } => 7,
        Error::CorruptState { .. } => 8,
        _ => 1,
    }
}

/// Checks that a call was rejected with the error `want`, whose message has each of the `words`, separated by `|`.
///
/// The Rust API returns `want` itself; C the status of `want` and the same message.
#[track_caller]
pub fn rejected<T: fmt::Debug>(result: std::result::Result<T, impl Into<Failure>>, want: &Error, words: &str) {
    let got = rejected_as(result.map_err(Into::into), status(want), words);
    assert_eq!(got.message, want.to_string());
    // A NaN inside an error differs from itself; its text does not.
    assert!(got.error.is_none_or(|error| format!("{error:?}") == format!("{want:?}")), "{want:?}");
}

/// Checks that a call was rejected with this status and a message that has each of the `words`, and returns the failure.
#[track_caller]
pub fn rejected_as<T: fmt::Debug>(result: Result<T>, status: i32, words: &str) -> Failure {
    let got = match result {
        Ok(got) => Failure { status: 0, message: format!("{got:?}"), error: None },
        Err(failure) => failure,
    };
    assert_eq!(got.status, status, "{got}");
    for word in words.split('|') {
        assert!(got.message.contains(word), "{:?} does not say {word:?}", got.message);
    }
    got
}
