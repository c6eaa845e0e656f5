//! Ranks that do not call, ranks that die, and calls that cannot be served.

use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{env, fs, process, ptr, thread};

use gradblend::{Blender, Device, Error, Ranks, Stream, Sums};
use gradblend_mpi::{Error as MpiError, Mpi};
use mpi::topology::SimpleCommunicator;
use mpi::traits::Communicator;

use crate::config;
use crate::shards::{dot, pending_bytes, tensors};

const TIME_OUT: Duration = Duration::from_millis(1500);
/// How much later an error may come: processes wait for a core.
const LATE: Duration = Duration::from_secs(3);

/// The folder where each rank leaves a file once it passed.
fn folder() -> PathBuf {
    env::args().nth(2).unwrap().into()
}

/// Tells that this rank passed, and returns once all did: the end of one process ends the others.
fn pass(world: &SimpleCommunicator) {
    fs::write(folder().join(world.rank().to_string()), "").unwrap();
    while fs::read_dir(folder()).unwrap().count() < world.size() as usize {
        thread::sleep(Duration::from_millis(20));
    }
}

fn is_last(world: &SimpleCommunicator) -> bool {
    world.rank() == world.size() - 1
}

/// Where a rank does not call, the others get an error in time, and keep their sums.
fn silent_rank(world: &SimpleCommunicator, sums_before: usize) {
    let stream = Stream::default();
    let mut mpi = Mpi::new(world).unwrap().time_out(TIME_OUT);
    let mut blender = Blender::new(&Device::cpu(), config()).unwrap();
    for _ in 0..sums_before {
        blender.reduce(&mut mpi, stream).unwrap();
        blender.observe(stream).unwrap();
    }
    if !is_last(world) {
        dot(&mut blender, &tensors(&[9, 1], world.rank() as u64), |_, len| 0..len);
        let before = pending_bytes(&mut blender);
        let start = Instant::now();
        let outcome = blender.reduce(&mut mpi, stream);
        let waited = start.elapsed();
        let expected = MpiError::TimeOut { seconds: TIME_OUT.as_secs_f64() };
        assert_eq!(outcome, Err(Error::Exchange { reason: expected.to_string() }));
        assert_eq!(mpi.failure(), Some(&expected));
        assert!((TIME_OUT..TIME_OUT + LATE).contains(&waited), "{waited:?}");
        let start = Instant::now();
        let again = MpiError::Failed { first: Box::new(expected) };
        assert_eq!(blender.observe_each(&mut mpi, stream), Err(Error::Exchange { reason: again.to_string() }));
        assert!(start.elapsed() < TIME_OUT / 2, "{:?}", start.elapsed());
        assert!(pending_bytes(&mut blender) == before, "the sums have changed");
    }
    pass(world);
    // MPI cannot be finalized: an exchange is still pending.
    process::exit(0);
}

pub(crate) fn a_silent_rank_at_the_first_sum(world: &SimpleCommunicator) {
    silent_rank(world, 0);
}

pub(crate) fn a_silent_rank_at_a_later_sum(world: &SimpleCommunicator) {
    silent_rank(world, 3);
}

/// Where a rank dies, mpirun ends the others, long before their time-out.
pub(crate) fn a_rank_dies(world: &SimpleCommunicator) {
    let mut mpi = Mpi::new(world).unwrap();
    let mut blender = Blender::new(&Device::cpu(), config()).unwrap();
    blender.reduce(&mut mpi, Stream::default()).unwrap();
    pass(world);
    if is_last(world) {
        process::abort();
    }
    let outcome = blender.reduce(&mut mpi, Stream::default());
    panic!("a sum with a dead rank: {outcome:?}");
}

/// Device memory and no numbers at all: neither is a failure of the group.
pub(crate) fn misuse_is_an_error(world: &SimpleCommunicator) {
    let mut mpi = Mpi::new(world).unwrap();
    let device = Sums::Device { address: ptr::null_mut(), count: 2, stream: Stream::default() };
    let error = mpi.sum(device).unwrap_err().downcast::<MpiError>().unwrap();
    assert_eq!(*error, MpiError::DeviceMemory);
    mpi.sum(Sums::Host(&mut [])).unwrap();
    let mut numbers = [1.0, f64::from(world.rank())];
    mpi.sum(Sums::Host(&mut numbers)).unwrap();
    let count = f64::from(world.size());
    assert_eq!(numbers, [count, count * (count - 1.0) / 2.0]);
    assert_eq!(mpi.failure(), None);
}
