//! What the ranks add up.

use gradblend::{Blender, Cadence, Config, Device, Stream};
use gradblend_mpi::Mpi;
use mpi::topology::SimpleCommunicator;
use mpi::traits::Communicator;

use crate::shards::{Tensor, dot, part, pending, pending_bytes, reaches, tensors};
use crate::{K, all, assert_same, config};

const LENGTHS: [usize; 9] = [0, 1, 7, 65_537 + 3, 2, 65_535, 3, 131_072, 0];

/// The sums and what bounds their error, by a loop in f64: 2^-16 of the sum of the products' amounts.
fn oracle(tensors: &[Tensor]) -> ([f64; 2 * K], [f64; 2 * K]) {
    let (mut sums, mut bounds) = ([0.0; 2 * K], [0.0; 2 * K]);
    for (p, lists) in tensors.iter().enumerate() {
        for k in (0..K).filter(|&k| reaches(k, p)) {
            for (i, v) in lists[k + 2].iter().enumerate() {
                let [t, g, v] = [lists[0][i], lists[1][i], *v].map(f64::from);
                for (at, product) in [(k, g * v), (K + k, (t - g) * v)] {
                    sums[at] += product;
                    bounds[at] += product.abs() / 65_536.0;
                }
            }
        }
    }
    (sums, bounds)
}

/// After `reduce` the sums are those of a single process within the bound, and the same bits on all ranks.
pub(crate) fn of_parts_are_sums_of_the_whole(world: &SimpleCommunicator) {
    let (rank, count) = (world.rank() as usize, world.size() as usize);
    let mut mpi = Mpi::new(world).unwrap();
    for (seed, idle) in [(1, false), (2, true)] {
        let tensors = tensors(&LENGTHS, seed);
        let (expected, bounds) = oracle(&tensors);
        let mut single = Blender::new(&Device::cpu(), config()).unwrap();
        dot(&mut single, &tensors, |_, len| 0..len);
        let mut blender = Blender::new(&Device::cpu(), config()).unwrap();
        dot(&mut blender, &tensors, |p, len| part(len, p, rank, count, idle));
        let own = pending(&mut blender).to_vec();
        assert_eq!(count > 1 && idle && rank == 0, own.iter().all(|sum| *sum == 0.0), "rank {rank} is idle");
        blender.reduce(&mut mpi, Stream::default()).unwrap();
        let sums = pending(&mut blender).to_vec();
        for (i, sum) in sums.iter().enumerate() {
            let error = (sum - expected[i]).abs();
            assert!(error <= bounds[i], "sum {i} is {sum}, expected {}", expected[i]);
            assert!((sum - pending(&mut single)[i]).abs() <= 2.0 * bounds[i], "sum {i} is not that of one process");
        }
        assert_same(world, &pending_bytes(&mut blender));
    }
}

/// 10^4 observations, each followed by a solution for the weights, end in the same state on all ranks.
pub(crate) fn states_stay_equal(world: &SimpleCommunicator) {
    const OBSERVATIONS: u64 = 10_000;
    let (rank, count) = (world.rank() as usize, world.size() as usize);
    let mut mpi = Mpi::new(world).unwrap();
    let config = Config { cadence: Cadence::EveryObservation, ..config() };
    let mut blender = Blender::new(&Device::cpu(), config).unwrap();
    for seed in 0..OBSERVATIONS {
        let tensors = tensors(&[17, 1, 0, 40], seed);
        dot(&mut blender, &tensors, |p, len| part(len, p, rank, count, false));
        blender.reduce(&mut mpi, Stream::default()).unwrap();
        blender.observe(Stream::default()).unwrap();
        if seed % 1000 == 0 {
            assert_same(world, &blender.save(Stream::default()).unwrap());
        }
    }
    let report = blender.report(Stream::default()).unwrap();
    assert_eq!((report.observed, report.skipped), (OBSERVATIONS, 0));
    assert!(report.weights.iter().any(|weight| (weight - 1.0 / K as f64).abs() > 0.01), "{:?}", report.weights);
    assert_same(world, &blender.save(Stream::default()).unwrap());
}

/// `observe_each` equals observing the sums of each rank, in their order, on one blender.
pub(crate) fn observing_each_is_observing_in_order(world: &SimpleCommunicator) {
    let stream = Stream::default();
    let (rank, count) = (world.rank() as usize, world.size() as usize);
    let mut mpi = Mpi::new(world).unwrap();
    let config = Config { cadence: Cadence::EveryObservation, ..config() };
    let [mut blender, mut single] = [0, 1].map(|_| Blender::new(&Device::cpu(), config).unwrap());
    for round in 0..20_usize {
        // A batch of each rank's own.
        let mut tensors = tensors(&[33, 1, 8], (round * count + rank) as u64);
        let culprit = (round % 3 == 2).then_some(round % count);
        if culprit == Some(rank) {
            tensors[0][1][5] = f32::INFINITY;
        }
        dot(&mut blender, &tensors, |_, len| 0..len);
        for sums in all(world, &pending_bytes(&mut blender)) {
            let sums = sums.chunks_exact(8).map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap()));
            pending(&mut single).iter_mut().zip(sums).for_each(|(pending, sum)| *pending = sum);
            single.observe(stream).unwrap();
        }
        let skipped = blender.observe_each(&mut mpi, stream).unwrap();
        assert_eq!(skipped, culprit.into_iter().collect::<Vec<_>>(), "round {round}");
        assert!(blender.save(stream).unwrap() == single.save(stream).unwrap(), "round {round}");
    }
    let report = blender.report(stream).unwrap();
    assert_eq!((report.observed, report.skipped), (20 * count as u64 - 6, 6));
    assert_same(world, &blender.save(stream).unwrap());
}
