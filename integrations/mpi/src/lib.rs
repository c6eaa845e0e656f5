#![doc = include_str!("../README.md")]

mod error;

use std::ffi::c_int;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::time::{Duration, Instant};
use std::{fmt, thread};

use gradblend::{EngineError, Ranks, Sums};
use mpi::ffi;
use mpi::traits::Communicator;

pub use error::Error;

/// The default of torch.distributed for engines other than NCCL: another rank may be writing a checkpoint or loading data.
const TIME_OUT: Duration = Duration::from_secs(30 * 60);
/// It polls without sleeping for this long: ranks that compute alike call within it, and a sleep is longer than an exchange.
const SPIN: Duration = Duration::from_millis(1);
/// After that it sleeps between polls, for this part of the time waited: a sum after a long wait is at most 1/32 later.
const PART: u32 = 32;
/// Upper limit of a sleep. A wait of 5 s took 31 ms of CPU time with Open MPI 4.1, 0.6 %; sleeps of 0.1 ms took 13 %.
const LONGEST_SLEEP: Duration = Duration::from_millis(10);

/// Adds numbers up over the ranks of an MPI communicator: the engine for [`gradblend::Blender::reduce`].
///
/// It is not `Send`: by the thread level that MPI was initialized with, other threads may not call MPI.
pub struct Mpi {
    /// A duplicate, so that the exchange never meets messages of the trainer's own.
    communicator: ffi::MPI_Comm,
    count: usize,
    rank: usize,
    time_out: Duration,
    /// Once set, the communicator is not used again: an exchange may be pending on it for ever.
    failure: Option<Error>,
    /// `MPI_Comm` is an integer in some MPI libraries.
    not_send: PhantomData<*const ()>,
}

impl Mpi {
    /// Makes an engine for the ranks of `communicator`, with a time-out of 30 minutes.
    ///
    /// It duplicates the communicator, so all its ranks call this, and wait for each other without a time-out.
    ///
    /// # Errors
    /// [`Error::InterCommunicator`], [`Error::Finalized`], [`Error::Mpi`].
    pub fn new(communicator: &impl Communicator) -> Result<Self, Error> {
        if mpi::is_finalized() {
            return Err(Error::Finalized);
        }
        if communicator.test_inter() {
            return Err(Error::InterCommunicator);
        }
        let (count, rank) = (communicator.size().unsigned_abs(), communicator.rank().unsigned_abs());
        // SAFETY: RSMPI_COMM_NULL is a constant of the bindings.
        let mut duplicate = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: MPI is initialized and not finalized, or there were no communicator; the handle is a live one, and
        // `duplicate` is a valid out-pointer for one handle.
        check("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(communicator.as_raw(), &mut duplicate) })?;
        let engine = Mpi {
            communicator: duplicate,
            count: count as usize,
            rank: rank as usize,
            time_out: TIME_OUT,
            failure: None,
            not_send: PhantomData,
        };
        // By default MPI aborts the process at an error.
        // SAFETY: `duplicate` is a live communicator, RSMPI_ERRORS_RETURN a constant of the bindings.
        let code = unsafe { ffi::MPI_Comm_set_errhandler(duplicate, ffi::RSMPI_ERRORS_RETURN) };
        check("MPI_Comm_set_errhandler", code)?;
        Ok(engine)
    }

    /// Sets how long a sum waits for the other ranks. It should exceed the longest time by which ranks get apart, in an
    /// evaluation or a checkpoint by one rank for example.
    #[must_use]
    pub fn time_out(mut self, time_out: Duration) -> Self {
        self.time_out = time_out;
        self
    }

    /// The error by which the group failed, if it did. [`gradblend::Error::Exchange`] has its text alone.
    pub fn failure(&self) -> Option<&Error> {
        self.failure.as_ref()
    }

    fn sum_host(&mut self, numbers: &mut [f64]) -> Result<(), Error> {
        if let Some(first) = &self.failure {
            return Err(Error::Failed { first: Box::new(first.clone()) });
        }
        let count = c_int::try_from(numbers.len()).map_err(|_| Error::Count { got: numbers.len() })?;
        if mpi::is_finalized() {
            return Err(Error::Finalized);
        }
        // Copies, and leaked at an error: after a time-out MPI may still read the one and write the other.
        let own = ManuallyDrop::new(numbers.to_vec());
        let mut sums = ManuallyDrop::new(vec![0.0; numbers.len()]);
        if let Err(error) = self.exchange(own.as_ptr(), sums.as_mut_ptr(), count) {
            self.failure = Some(error.clone());
            return Err(error);
        }
        ManuallyDrop::into_inner(own);
        numbers.copy_from_slice(&ManuallyDrop::into_inner(sums));
        Ok(())
    }

    /// Adds up `count` numbers of each rank. After an error MPI may use the memory behind both pointers for ever.
    fn exchange(&self, own: *const f64, sums: *mut f64, count: c_int) -> Result<(), Error> {
        // SAFETY: RSMPI_REQUEST_NULL is a constant of the bindings.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: `own` and `sums` are `count` f64 each, do not overlap, and the caller, the only one, keeps them until the
        // request is complete, else for ever. The communicator is live: it is freed on drop alone, and MPI is not finalized.
        // `request` is a valid out-pointer.
        let code = unsafe {
            let (double, sum) = (ffi::RSMPI_DOUBLE, ffi::RSMPI_SUM);
            ffi::MPI_Iallreduce(own.cast(), sums.cast(), count, double, sum, self.communicator, &mut request)
        };
        check("MPI_Iallreduce", code)?;
        let start = Instant::now();
        loop {
            let mut complete = 0;
            // SAFETY: `request` is of the call above and not yet complete; `complete` is a valid out-pointer, and
            // RSMPI_STATUS_IGNORE is what MPI takes for no status.
            let code = unsafe { ffi::MPI_Test(&mut request, &mut complete, ffi::RSMPI_STATUS_IGNORE) };
            check("MPI_Test", code)?;
            if complete != 0 {
                return Ok(());
            }
            let waited = start.elapsed();
            let left = self.time_out.saturating_sub(waited);
            if left.is_zero() {
                return Err(Error::TimeOut { seconds: self.time_out.as_secs_f64() });
            }
            if waited < SPIN {
                thread::yield_now();
            } else {
                thread::sleep((waited / PART).min(LONGEST_SLEEP).min(left));
            }
        }
    }
}

impl Ranks for Mpi {
    fn count(&self) -> usize {
        self.count
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn sum(&mut self, sums: Sums<'_>) -> Result<(), EngineError> {
        match sums {
            Sums::Host(numbers) => Ok(self.sum_host(numbers)?),
            Sums::Device { .. } => Err(Error::DeviceMemory.into()),
        }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if self.failure.is_none() && !mpi::is_finalized() {
            // SAFETY: the communicator is a live duplicate of this engine's own, without a pending exchange, and MPI is not
            // finalized. If it fails, the communicator leaks.
            unsafe { ffi::MPI_Comm_free(&mut self.communicator) };
        }
    }
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mpi { count, rank, time_out, failure, .. } = self;
        write!(f, "Mpi {{ rank: {rank} of {count}, time_out: {time_out:?}, failure: {failure:?} }}")
    }
}

/// The error of an MPI function that returned `code`.
fn check(call: &'static str, code: c_int) -> Result<(), Error> {
    // By the standard, MPI_SUCCESS is 0.
    if code == 0 {
        return Ok(());
    }
    let mut text = [0_u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: the text has the MPI_MAX_ERROR_STRING bytes that MPI may write, and `length` is a valid out-pointer.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    let text = text.get(..length.unsigned_abs() as usize).unwrap_or_default();
    Err(Error::Mpi { call, code, message: String::from_utf8_lossy(text).into_owned() })
}
