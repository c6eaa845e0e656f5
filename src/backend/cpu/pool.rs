//! Thread pool of a blender.
//!
//! The common pools do not fit: their job queues allocate as jobs are pushed, and a run call must not allocate.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::config::MAX_CPU_THREADS;
use crate::error::{Error, Result};

/// A pool of the caller's thread and `workers.len()` more.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    round: Mutex<Round>,
    start: Condvar,
    done: Condvar,
}

#[derive(Debug)]
struct Round {
    /// Number of the job, so that no worker runs it twice.
    number: u64,
    job: Option<Job>,
    /// Workers that have not finished the job.
    busy: usize,
    /// Payload of the first worker that panicked.
    panic: Option<Box<dyn Any + Send>>,
    quit: bool,
}

/// A borrowed closure. `Pool::run` returns only after all workers have finished it, so the borrow stays valid.
#[derive(Clone, Copy, Debug)]
struct Job {
    data: *const (),
    call: unsafe fn(*const ()),
}

// SAFETY: `Pool::run` makes jobs of `Sync` closures only, which any thread may call.
unsafe impl Send for Job {}

impl Pool {
    /// A pool of `threads` threads, the caller's included; 0 is one for each core that this process may use.
    ///
    /// # Errors
    /// [`Error::Threads`].
    pub(super) fn new(threads: u32) -> Result<Self> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            threads => threads,
        };
        if threads > MAX_CPU_THREADS {
            return Err(Error::Threads { threads, reason: format!("expected at most {MAX_CPU_THREADS}") });
        }
        let round = Round { number: 0, job: None, busy: 0, panic: None, quit: false };
        let shared = Arc::new(Shared { round: Mutex::new(round), start: Condvar::new(), done: Condvar::new() });
        let mut pool = Pool { shared, workers: Vec::new() };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            // On an error the pool is dropped, which ends the threads started so far.
            let worker = std::thread::Builder::new()
                .name(format!("gradblend-{thread}"))
                .spawn(move || shared.work())
                .map_err(|error| Error::Threads { threads, reason: error.to_string() })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Calls `job` once on each thread and returns after all calls have returned. If one of them panics, so does this.
    pub(super) fn run<F: Fn() + Sync>(&mut self, job: &F) {
        if self.workers.is_empty() {
            return job();
        }
        unsafe fn call<F: Fn()>(data: *const ()) {
            // SAFETY: `data` is the address of the `F` that `run` borrows until no worker is busy.
            unsafe { (*data.cast::<F>())() }
        }
        let mut round = self.shared.lock();
        round.number += 1;
        round.job = Some(Job { data: std::ptr::from_ref(job).cast(), call: call::<F> });
        round.busy = self.workers.len();
        round.panic = None;
        drop(round);
        self.shared.start.notify_all();
        // The drop of `wait` waits even if `job` panics on this thread, because the workers still borrow it.
        let wait = Wait(&self.shared);
        job();
        drop(wait);
        if let Some(panic) = self.shared.lock().panic.take() {
            resume_unwind(panic);
        }
    }
}

struct Wait<'a>(&'a Shared);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut round = self.0.lock();
        while round.busy > 0 {
            round = self.0.done.wait(round).unwrap_or_else(PoisonError::into_inner);
        }
        round.job = None;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut seen = 0;
        loop {
            let mut round = self.lock();
            while !round.quit && round.number == seen {
                round = self.start.wait(round).unwrap_or_else(PoisonError::into_inner);
            }
            if round.quit {
                return;
            }
            seen = round.number;
            let job = round.job;
            drop(round);
            // A worker that ended by a panic would never finish the next job.
            let panicked = job.and_then(|job| {
                // SAFETY: `run` keeps its borrow of the closure until this worker is no longer busy.
                catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.data) })).err()
            });
            let mut round = self.lock();
            round.busy -= 1;
            round.panic = round.panic.take().or(panicked);
            if round.busy == 0 {
                self.done.notify_one();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.start.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of jobs and has none of its own, so there is no error to handle.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A panic on any thread reaches the caller, and all threads run the next job.
    #[test]
    fn panics() -> Result<()> {
        let mut pool = Pool::new(3)?;
        let caller = std::thread::current().id();
        for (on_caller, on_workers) in [(false, true), (true, true), (true, false)] {
            let job = || {
                let panics = if std::thread::current().id() == caller { on_caller } else { on_workers };
                if panics {
                    std::panic::panic_any("on purpose");
                }
            };
            let panic = catch_unwind(AssertUnwindSafe(|| pool.run(&job))).err();
            assert_eq!(panic.and_then(|panic| panic.downcast_ref().copied()), Some("on purpose"));
            let calls = AtomicUsize::new(0);
            pool.run(&|| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(calls.into_inner(), 3);
        }
        Ok(())
    }
}
