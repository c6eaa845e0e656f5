//! NCCL as the engine of a group of ranks, each with a CUDA device of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{CudaStream, DevicePtrMut, DeviceSlice, SyncOnDrop};
use cudarc::nccl::{Comm, Id, ReduceOp, result::NcclError, sys};

use crate::error::{Error, Result};
use crate::ranks::{EngineError, Ranks, Sums};

use super::context::Context;

/// How often a time-out is checked: no longer than a small all-reduce takes.
const POLL: Duration = Duration::from_micros(20);

/// A rank of a group that adds numbers up by NCCL. Not yet run on a GPU.
///
/// All work is submitted to the stream that the rank was made with, and the blender's calls take the same stream. Nothing
/// waits for an exchange of pending sums, unless there is a [`time_out`](Self::time_out).
#[derive(Debug)]
pub struct Nccl {
    /// None after a time-out.
    comm: Option<Comm>,
    stream: Arc<CudaStream>,
    rank: usize,
    count: usize,
    time_out: Option<Duration>,
}

impl Nccl {
    /// The identifier of a new group. One rank makes it, and sends it to the others by other means.
    ///
    /// # Errors
    /// [`Error::Exchange`] if NCCL is not installed or fails.
    pub fn id() -> Result<[u8; 128]> {
        installed()?;
        Ok(Id::new().map_err(failed)?.internal().map(|byte| byte as u8))
    }

    /// Rank `rank` of `count` in the group `id`, on the device of `stream`. Waits until all ranks have called it.
    ///
    /// # Errors
    /// [`Error::Group`] for a number that no rank can have; [`Error::Exchange`] if NCCL is not installed or fails.
    pub fn new(stream: &Arc<CudaStream>, rank: usize, count: usize, id: [u8; 128]) -> Result<Self> {
        installed()?;
        if rank >= count || i32::try_from(count).is_err() {
            return Err(Error::Group { reason: format!("there is no rank {rank} of {count}") });
        }
        let context = Context::of(stream.context().ordinal() as i32)?;
        let _current = context.enter_relaxed()?;
        let comm =
            Comm::from_rank(stream.clone(), rank, count, Id::uninit(id.map(|byte| byte as _))).map_err(failed)?;
        Ok(Nccl { comm: Some(comm), stream: stream.clone(), rank, count, time_out: None })
    }

    /// Makes each exchange wait for the stream, and fail after `limit`: NCCL alone waits for a missing rank for ever. The
    /// group is of no more use then.
    #[must_use]
    pub fn time_out(mut self, limit: Duration) -> Self {
        self.time_out = Some(limit);
        self
    }

    fn add(&mut self, numbers: &mut impl DevicePtrMut<f64>) -> std::result::Result<(), EngineError> {
        let comm = self.comm.as_ref().ok_or("the group has failed before")?;
        comm.all_reduce_in_place(numbers, &ReduceOp::Sum).map_err(failed)?;
        let Some(limit) = self.time_out else { return Ok(()) };
        let (done, start) = (self.stream.record_event(None)?, Instant::now());
        while !done.try_is_complete()? {
            if start.elapsed() > limit {
                let comm = self.comm.take();
                // Aborts the exchange. cudarc panics where NCCL cannot.
                let _ = catch_unwind(AssertUnwindSafe(|| drop(comm)));
                return Err(format!("rank {} of {} waited for {limit:?}", self.rank, self.count).into());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Ranks for Nccl {
    fn count(&self) -> usize {
        self.count
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn sum(&mut self, sums: Sums<'_>) -> std::result::Result<(), EngineError> {
        // cudarc sets the context of its stream; the guard restores the caller's.
        let context = Context::of(self.stream.context().ordinal() as i32)?;
        let _current = context.enter_relaxed()?;
        match sums {
            Sums::Host(numbers) => {
                let mut copy = self.stream.clone_htod(numbers)?;
                self.add(&mut copy)?;
                self.stream.memcpy_dtoh(&copy, numbers)?;
                Ok(self.stream.synchronize()?)
            }
            Sums::Device { stream, .. } if stream.as_raw() != self.stream.cu_stream().cast() => {
                Err(Error::ForeignStream.into())
            }
            Sums::Device { address, count, .. } => {
                let stream = self.stream.clone();
                self.add(&mut Lent { address: address.expose_provenance() as u64, count, stream })
            }
        }
    }
}

/// Pending sums of a blender, in the order of a stream.
struct Lent {
    address: u64,
    count: usize,
    stream: Arc<CudaStream>,
}

impl DeviceSlice<f64> for Lent {
    fn len(&self) -> usize {
        self.count
    }

    fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl DevicePtrMut<f64> for Lent {
    /// The stream orders all work on the sums: there is nothing to wait for, and nothing to record.
    fn device_ptr_mut<'a>(&'a mut self, _: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}

/// cudarc panics at a missing library.
fn installed() -> Result<()> {
    // SAFETY: loading the library runs NCCL's initialisers, which need nothing of this process.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => Err(Error::Exchange { reason: "NCCL is not installed: no libnccl was found".into() }),
    }
}

fn failed(error: NcclError) -> Error {
    Error::Exchange { reason: format!("NCCL: {error:?}") }
}
