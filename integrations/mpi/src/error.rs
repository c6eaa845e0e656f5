//! Errors of the engine.

/// Why the ranks have no sum.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The numbers are in memory of a CUDA device. Ranks that hold them there get this at once; the group stays usable.
    #[error("the numbers are in memory of a CUDA device, and this engine reads host memory alone")]
    DeviceMemory,
    /// Not all ranks called within the time: one is gone, or slower. The group has failed.
    #[error("no sum within {seconds} s: a rank is gone or did not call")]
    TimeOut {
        /// The time-out.
        seconds: f64,
    },
    /// An earlier call failed, and this one did nothing.
    #[error("the group failed in an earlier call: {first}")]
    Failed {
        /// The error of that call.
        first: Box<Error>,
    },
    /// An MPI function returned an error. The group has failed.
    #[error("{call} failed: {message} ({code})")]
    Mpi {
        /// Name of the function.
        call: &'static str,
        /// Its error code, whose meaning is the MPI library's.
        code: i32,
        /// The MPI library's text for the code.
        message: String,
    },
    /// MPI was finalized: the `Universe` was dropped.
    #[error("MPI is finalized")]
    Finalized,
    /// The communicator connects two groups, so an all-reduce would give the sums of the other one.
    #[error("expected a communicator of one group, got an inter-communicator")]
    InterCommunicator,
    /// There are more numbers than an MPI count can say.
    #[error("expected at most {} numbers, got {got}", i32::MAX)]
    Count {
        /// How many there are.
        got: usize,
    },
}
