//! Ranks that differ, and ranks whose sums are not finite.

use gradblend::{Average, Blender, Config, Device, Error, Flags, Stream};
use gradblend_mpi::Mpi;
use mpi::topology::SimpleCommunicator;
use mpi::traits::Communicator;

use crate::shards::{dot, part, pending_bytes, tensors};
use crate::{assert_same, config};

const LENGTHS: [usize; 3] = [50, 40, 20];

/// All ranks skip the observation and know which rank had a NaN.
pub(crate) fn ranks_with_nan_are_named(world: &SimpleCommunicator) {
    let stream = Stream::default();
    let (rank, count) = (world.rank() as usize, world.size() as usize);
    let mut mpi = Mpi::new(world).unwrap();
    for culprit in 0..count {
        let mut blender = Blender::new(&Device::cpu(), config()).unwrap();
        let own = |p, len| part(len, p, rank, count, false);
        let mut tensors = tensors(&LENGTHS, 3);
        // Of tensor 0 the first rank holds nothing.
        let p = usize::from(culprit == 0);
        if rank == culprit {
            tensors[p][4][own(p, LENGTHS[p]).start] = f32::NAN;
        }
        dot(&mut blender, &tensors, own);
        blender.reduce(&mut mpi, stream).unwrap();
        blender.observe(stream).unwrap();
        let report = blender.report(stream).unwrap();
        assert!(report.flags.contains(Flags::NONFINITE), "{report:?}");
        assert_eq!((report.observed, report.skipped), (0, 1));
        assert_eq!(blender.nonfinite_ranks(&mut mpi, stream).unwrap(), [culprit]);
        assert_same(world, &blender.save(stream).unwrap());
    }
}

/// All ranks get the same error for ranks whose blenders differ, and go on once these are alike.
pub(crate) fn ranks_that_differ_are_named(world: &SimpleCommunicator) {
    let stream = Stream::default();
    let (rank, count) = (world.rank() as usize, world.size() as usize);
    let mut mpi = Mpi::new(world).unwrap();
    let other_k = Config { modalities: 4, ..config() };
    let other_decay = Config { average: Average::Ema { decay: 0.8 }, ..config() };
    let cases = [("number of modalities", other_k), ("configuration", other_decay), ("state", config())];
    for (expected, other) in cases {
        for culprit in 0..count {
            let config = if rank == culprit { other } else { config() };
            let mut blender = Blender::new(&Device::cpu(), config).unwrap();
            if rank == culprit && expected == "state" {
                blender.observe(stream).unwrap();
            }
            if expected != "number of modalities" {
                dot(&mut blender, &tensors(&LENGTHS, 4), |p, len| part(len, p, rank, count, false));
            }
            let before = pending_bytes(&mut blender);
            let outcome = blender.reduce(&mut mpi, stream);
            if count == 1 {
                outcome.unwrap();
                continue;
            }
            let first = if culprit == 0 { 1 } else { culprit };
            assert_eq!(outcome, Err(Error::RankDiffers { rank: first, what: expected }), "rank {culprit} differs");
            assert!(pending_bytes(&mut blender) == before, "the sums have changed");
            let mut blender = Blender::new(&Device::cpu(), self::config()).unwrap();
            blender.reduce(&mut mpi, stream).unwrap();
        }
    }
}
