//! Threads that wait for a blender's next pass.
//!
//! Our own because a run call must not allocate: the job queues of the common pools grow on the heap as work is pushed.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::config::MAX_CPU_THREADS;
use crate::error::{Error, Result};

/// The caller's thread and `workers.len()` more.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    turn: Mutex<Turn>,
    start: Condvar,
    done: Condvar,
}

#[derive(Debug)]
struct Turn {
    /// Counts the jobs, so that no worker takes one twice.
    number: u64,
    job: Option<Job>,
    /// Workers that have not finished the job yet.
    busy: usize,
    /// Of the first worker that panicked on the job.
    panic: Option<Box<dyn Any + Send>>,
    quit: bool,
}

/// A borrowed closure whose lifetime `Pool::run` enforces by waiting.
#[derive(Clone, Copy, Debug)]
struct Job {
    data: *const (),
    call: unsafe fn(*const ()),
}

// SAFETY: `Pool::run` makes jobs of `Sync` closures only, so their address may be used from any thread.
unsafe impl Send for Job {}

impl Pool {
    /// A pool of `threads` threads, the caller's among them; 0 is one for each core that this process may use.
    pub(super) fn new(threads: u32) -> Result<Self> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            threads => threads,
        };
        if threads > MAX_CPU_THREADS {
            return Err(Error::Threads { threads, reason: format!("expected at most {MAX_CPU_THREADS}") });
        }
        let turn = Turn { number: 0, job: None, busy: 0, panic: None, quit: false };
        let shared = Arc::new(Shared { turn: Mutex::new(turn), start: Condvar::new(), done: Condvar::new() });
        let mut pool = Pool { shared, workers: Vec::new() };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            // On an error the pool is dropped, which ends the threads that were started.
            let worker = std::thread::Builder::new()
                .name(format!("gradblend-{thread}"))
                .spawn(move || shared.work())
                .map_err(|error| Error::Threads { threads, reason: error.to_string() })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Calls `job` once on each thread and returns when all calls have. Panics as one of them did.
    pub(super) fn run<F: Fn() + Sync>(&mut self, job: &F) {
        if self.workers.is_empty() {
            return job();
        }
        unsafe fn call<F: Fn()>(data: *const ()) {
            // SAFETY: `data` is the address of the `F` that `run` borrows until no worker is busy.
            unsafe { (*data.cast::<F>())() }
        }
        let mut turn = self.shared.lock();
        turn.number += 1;
        turn.job = Some(Job { data: std::ptr::from_ref(job).cast(), call: call::<F> });
        turn.busy = self.workers.len();
        turn.panic = None;
        drop(turn);
        self.shared.start.notify_all();
        // Waits even if `job` panics on this thread: the workers still borrow it.
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
        let mut turn = self.0.lock();
        while turn.busy > 0 {
            turn = self.0.done.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        turn.job = None;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut seen = 0;
        loop {
            let mut turn = self.lock();
            while !turn.quit && turn.number == seen {
                turn = self.start.wait(turn).unwrap_or_else(PoisonError::into_inner);
            }
            if turn.quit {
                return;
            }
            seen = turn.number;
            let job = turn.job;
            drop(turn);
            // A worker that did not come back would be waited for at the next job.
            let panicked = job.and_then(|job| {
                // SAFETY: `run` waits until this worker is no longer busy before it gives up its borrow of the closure.
                catch_unwind(AssertUnwindSafe(|| unsafe { (job.call)(job.data) })).err()
            });
            let mut turn = self.lock();
            turn.busy -= 1;
            turn.panic = turn.panic.take().or(panicked);
            if turn.busy == 0 {
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
            // It catches the panics of jobs, and has none of its own.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A panic on any thread is the caller's, and the threads are there for the next job.
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
