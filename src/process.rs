//! Which process made a value. A forked process has no threads of its parent and no device context, so it must not use
//! values that need them.

use std::mem::ManuallyDrop;
#[cfg(unix)]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};

/// Number of forks since the first value was made. A fork handler counts them, because asking for the process id would cost
/// as much as the rest of a call.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// A process, by its number of forks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process(u32);

impl Process {
    /// The process that runs this.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if forks cannot be counted.
    pub(crate) fn current() -> Result<Self> {
        if count_forks() {
            return Ok(Process(FORKS.load(Ordering::Relaxed)));
        }
        Err(Error::OutOfMemory { what: "a fork handler", bytes: size_of::<Process>() as u64 })
    }

    /// Whether this process runs the call, and not one that was forked from it.
    pub(crate) fn is_current(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }
}

/// Starts to count forks, and returns whether that worked: it allocates.
#[cfg(unix)]
fn count_forks() -> bool {
    unsafe extern "C" fn forked() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }
    static COUNTED: OnceLock<bool> = OnceLock::new();
    // SAFETY: handlers may be NULL, and `forked` only changes an atomic, which is allowed after a fork.
    *COUNTED.get_or_init(|| unsafe { libc::pthread_atfork(None, None, Some(forked)) } == 0)
}

/// Without forks there is nothing to count.
#[cfg(not(unix))]
fn count_forks() -> bool {
    true
}

/// A value that only the process that made it can use and drop.
#[derive(Debug)]
pub(crate) struct InProcess<T> {
    /// What the value is, and how it was made, for the error.
    what: &'static str,
    process: Process,
    value: ManuallyDrop<T>,
}

impl<T> InProcess<T> {
    /// A value of this process.
    pub(crate) fn new(what: &'static str, value: T) -> Result<Self> {
        Ok(InProcess { what, process: Process::current()?, value: ManuallyDrop::new(value) })
    }

    fn check(&self) -> Result<()> {
        if self.process.is_current() { Ok(()) } else { Err(Error::Forked { what: self.what }) }
    }

    pub(crate) fn get(&self) -> Result<&T> {
        self.check()?;
        Ok(&self.value)
    }

    pub(crate) fn get_mut(&mut self) -> Result<&mut T> {
        self.check()?;
        Ok(&mut self.value)
    }

    /// The value in any process, for what needs no thread and no device.
    pub(crate) fn in_any_process(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for InProcess<T> {
    /// Does nothing in a forked process: a drop would wait for threads and work that do not exist there.
    fn drop(&mut self) {
        if self.process.is_current() {
            // SAFETY: the value is dropped once, here, and not used again.
            unsafe { ManuallyDrop::drop(&mut self.value) }
        }
    }
}
