//! Threads that wait for a blender's next pass.
//!
//! Our own because a run call must not allocate: the job queues of the common pools grow on the heap as work is pushed.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::error::{Error, Result};

/// More than any machine has cores: a larger number is a mistake, better told than tried.
const MAX_THREADS: u32 = 4096;

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
        if threads > MAX_THREADS {
            return Err(Error::Threads { threads, reason: format!("expected at most {MAX_THREADS}") });
        }
        let turn = Turn { number: 0, job: None, busy: 0, quit: false };
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

    /// Calls `job` once on each thread and returns when all calls have.
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
        drop(turn);
        self.shared.start.notify_all();
        // Waits even if `job` panics on this thread: the workers still borrow it.
        let _wait = Wait(&self.shared);
        job();
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
            let _finish = Finish(self);
            if let Some(job) = job {
                // SAFETY: `run` waits until this worker is no longer busy before it gives up its borrow of the closure.
                unsafe { (job.call)(job.data) }
            }
        }
    }
}

struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut turn = self.0.lock();
        turn.busy -= 1;
        if turn.busy == 0 {
            self.0.done.notify_one();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.start.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has already said so on standard error.
            let _ = worker.join();
        }
    }
}
