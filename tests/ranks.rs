//! Several ranks: threads of this program, each with a blender of its own.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use gradblend::{Average, Blender, Cadence, Config, EngineError, Error, Flags, Pass, Policy, Ranks, Stream, Sums};
use gradblend_testkit::{Face, Input, Outcome, Random, Sums as Oracle, Tensor, bits64};

/// How long a rank waits for the others.
const PATIENCE: Duration = Duration::from_millis(700);

/// Tests on the CPU, and on a CUDA device where there is one.
macro_rules! on_devices {
    ($($name:ident),+ $(,)?) => {
        mod cpu { $(#[test] fn $name() -> super::Outcome { gradblend_testkit::cpu(super::$name) })+ }
        #[cfg(feature = "cuda")]
        mod cuda { $(#[test] fn $name() -> super::Outcome { gradblend_testkit::cuda(super::$name) })+ }
    };
}

on_devices! {
    shards,
    no_drift,
    nan,
    each_rank_is_an_observation,
    ranks_that_differ,
    ranks_that_differ_later,
    groups_that_are_none,
    a_missing_rank,
}

/// What threads add up, and who has come.
#[derive(Default)]
struct Meeting {
    number: u64,
    arrived: usize,
    sums: Vec<f64>,
    /// Whether a rank came with another number of numbers.
    odd: bool,
    /// Those of the meeting before.
    latest: Vec<f64>,
}

/// A rank that is a thread. `rank` and `count` are what it claims.
#[derive(Clone)]
struct Thread {
    rank: usize,
    count: usize,
    /// Threads that take part.
    members: usize,
    meeting: Arc<(Mutex<Meeting>, Condvar)>,
}

impl Thread {
    /// Adds up the numbers of all threads, once they have come.
    fn add(&self, numbers: &mut [f64]) -> Result<(), EngineError> {
        let (meeting, changed) = &*self.meeting;
        let mut guard = meeting.lock().unwrap_or_else(PoisonError::into_inner);
        let meeting = &mut *guard;
        meeting.odd |= meeting.arrived > 0 && meeting.sums.len() != numbers.len();
        meeting.sums.resize(numbers.len(), 0.0);
        meeting.sums.iter_mut().zip(&*numbers).for_each(|(sum, number)| *sum += number);
        meeting.arrived += 1;
        let number = meeting.number;
        if meeting.arrived == self.members {
            (meeting.number, meeting.arrived) = (number + 1, 0);
            meeting.latest = std::mem::take(&mut meeting.sums);
            changed.notify_all();
        }
        let waited = changed.wait_timeout_while(guard, PATIENCE, |meeting| meeting.number == number);
        let (meeting, late) = waited.unwrap_or_else(PoisonError::into_inner);
        if late.timed_out() {
            return Err("a rank did not come".into());
        }
        if meeting.odd {
            return Err("ranks came with different numbers of numbers".into());
        }
        numbers.copy_from_slice(&meeting.latest);
        Ok(())
    }
}

impl Ranks for Thread {
    fn count(&self) -> usize {
        self.count
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn sum(&mut self, sums: Sums<'_>) -> Result<(), EngineError> {
        on_host(sums, |numbers| self.add(numbers))
    }
}

/// A group of one, which keeps what it adds up.
struct Alone(Vec<f64>);

impl Ranks for Alone {
    fn count(&self) -> usize {
        1
    }

    fn rank(&self) -> usize {
        0
    }

    fn sum(&mut self, sums: Sums<'_>) -> Result<(), EngineError> {
        on_host(sums, |numbers| {
            self.0 = numbers.to_vec();
            Ok(())
        })
    }
}

/// Runs `add` on numbers where the host can read them.
fn on_host(sums: Sums<'_>, add: impl FnOnce(&mut [f64]) -> Result<(), EngineError>) -> Result<(), EngineError> {
    match sums {
        Sums::Host(numbers) => add(numbers),
        #[cfg(feature = "cuda")]
        Sums::Device { address, count, .. } => {
            // SAFETY: the blender's sums, on the default stream; no other work uses them.
            let mut numbers = unsafe { gradblend_testkit::cuda::read(address, count) };
            add(&mut numbers)?;
            // SAFETY: as many numbers as were read, on the default stream.
            unsafe { gradblend_testkit::cuda::write(address, &numbers) };
            Ok(())
        }
        #[cfg(not(feature = "cuda"))]
        Sums::Device { .. } => Err("no CUDA".into()),
    }
}

/// Runs `body` on each of `members` ranks, and returns what they return.
fn on_ranks<R: Send>(members: usize, body: impl Fn(Thread) -> R + Sync) -> Vec<R> {
    let meeting: Arc<(Mutex<Meeting>, Condvar)> = Arc::default();
    std::thread::scope(|scope| {
        let ranks = (0..members).map(|rank| Thread { rank, count: members, members, meeting: meeting.clone() });
        let body = &body;
        let threads: Vec<_> = ranks.map(|rank| scope.spawn(move || body(rank))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn config(k: u32) -> Config {
    Config { threads: 1, cadence: Cadence::EveryObservation, ..Config::new(k) }
}

fn blender(face: Face, config: Config) -> Result<Blender, Box<dyn std::error::Error + Send + Sync>> {
    Ok(Blender::new(&face.device().map_err(|error| format!("{error:?}"))?, config)?)
}

/// Runs one pass on a blender of its own plan.
fn pass(face: Face, blender: &mut Blender, tensors: &mut [Tensor<f32>], what: Pass) -> gradblend::Result<()> {
    let mut uploaded = face.upload(tensors);
    let plan = blender.plan(uploaded.inputs().into_iter().map(Input::grads))?;
    blender.pass(&plan, what, Stream::default())?;
    drop(plan);
    uploaded.fetch();
    Ok(())
}

/// The pending sums.
fn sums_of(blender: &mut Blender) -> gradblend::Result<Vec<f64>> {
    let mut alone = Alone(Vec::new());
    blender.reduce(&mut alone, Stream::default())?;
    Ok(alone.0)
}

/// Part `rank` of `count` of a tensor. Parts are uneven, and the first is empty.
fn part(tensor: &Tensor<f32>, rank: usize, count: usize) -> Tensor<f32> {
    let at = |rank: usize| tensor.len() * rank * rank.saturating_sub(1) / (count * count.saturating_sub(1)).max(1);
    let range = if count == 1 { 0..tensor.len() } else { at(rank)..at(rank + 1) };
    let mut part = tensor.clone();
    part.buffers().for_each(|buffer| *buffer = buffer[range.clone()].to_vec().into());
    part
}

/// Ranks with parts of each tensor, and one without any, have the products of the whole tensors.
fn shards(face: Face) -> Outcome {
    for count in [1, 2, 4] {
        let whole: Vec<Tensor<f32>> = {
            let mut random = Random(5);
            [0, 1, 7, 70_000, 3_001].map(|len| Tensor::random(&mut random, len, 3, 0, 3)).into()
        };
        let (mut alone, mut all) = (blender(face, config(3)).map_err(|e| e.to_string())?, whole.clone());
        pass(face, &mut alone, &mut all, Pass::DOT | Pass::BLEND)?;
        let one = sums_of(&mut alone)?;
        alone.observe(Stream::default())?;
        let ranks = on_ranks(count, |mut rank| -> Result<_, EngineError> {
            let mut blender = blender(face, config(3))?;
            let mut own: Vec<_> = whole.iter().map(|tensor| part(tensor, rank.rank, count)).collect();
            own.retain(|tensor| count == 1 || rank.rank > 0 || !tensor.is_empty());
            pass(face, &mut blender, &mut own, Pass::DOT | Pass::BLEND)?;
            blender.reduce(&mut rank, Stream::default())?;
            let mut alone = Alone(Vec::new());
            blender.pending_sums_mut(Stream::default()).map(|sums| alone.sum(sums))??;
            blender.observe(Stream::default())?;
            Ok((alone.0, blender.save(Stream::default())?, blender.report(Stream::default())?.weights))
        });
        for rank in ranks {
            let (sums, state, weights) = rank.map_err(|error| error.to_string())?;
            Oracle::of(3, &whole).check(&sums, &format!("{count} ranks"));
            Oracle::of(3, &whole).check(&one, "one process");
            let expected = alone.report(Stream::default())?.weights;
            assert!(weights.iter().zip(&expected).all(|(w, e)| (w - e).abs() < 1e-3), "{weights:?} {expected:?}");
            assert!(count > 1 || state == alone.save(Stream::default())?);
        }
    }
    Ok(())
}

/// Ten thousand observations (few on the emulator, where each takes long): the same states, bit for bit.
fn no_drift(face: Face) -> Outcome {
    let steps = if face.cuda { 20 } else { 10_000 };
    let states = on_ranks(3, |mut rank| -> Result<_, EngineError> {
        let (mut blender, mut random) = (blender(face, config(2))?, Random(rank.rank as u64));
        let mut tensors = vec![Tensor::<f32>::random(&mut random, 9 + rank.rank, 2, 0, 0)];
        for step in 0..steps {
            tensors[0].scale(if step % 2 == 0 { 0.7 } else { 1.0 / 0.7 });
            pass(face, &mut blender, &mut tensors, Pass::DOT)?;
            blender.reduce(&mut rank, Stream::default())?;
            blender.observe(Stream::default())?;
        }
        assert_eq!(blender.report(Stream::default())?.observed, steps);
        Ok(blender.save(Stream::default())?)
    });
    let states = states.into_iter().collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    assert!(states.iter().all(|state| *state == states[0]));
    Ok(())
}

/// A NaN of one rank: all skip the observation, and know the rank.
fn nan(face: Face) -> Outcome {
    let found = on_ranks(3, |mut rank| -> Result<_, EngineError> {
        let mut blender = blender(face, config(2))?;
        let mut tensors = vec![Tensor::<f32>::random(&mut Random(1), 100, 2, 0, 0)];
        assert_eq!(blender.nonfinite_ranks(&mut rank, Stream::default())?, []);
        if let (1, Some(v)) = (rank.rank, &mut tensors[0].modalities[1]) {
            v[7] = f32::NAN;
        }
        pass(face, &mut blender, &mut tensors, Pass::DOT)?;
        blender.reduce(&mut rank, Stream::default())?;
        blender.observe(Stream::default())?;
        let report = blender.report(Stream::default())?;
        assert!(report.flags.contains(Flags::NONFINITE) && report.skipped == 1 && report.observed == 0);
        let found = blender.nonfinite_ranks(&mut rank, Stream::default())?;
        pass(face, &mut blender, &mut tensors, Pass::DOT)?;
        assert_eq!(blender.observe_each(&mut rank, Stream::default())?, found);
        let report = blender.report(Stream::default())?;
        assert_eq!((report.observed, report.skipped), (2, 2));
        Ok(found)
    });
    for found in found {
        assert_eq!(found.map_err(|error| error.to_string())?, [1]);
    }
    Ok(())
}

/// Each rank's sums are an observation, but those of rank 2, which has no batch.
fn each_rank_is_an_observation(face: Face) -> Outcome {
    let mut alone = blender(face, config(3)).map_err(|error| error.to_string())?;
    let tensors = |rank: usize| vec![Tensor::<f32>::random(&mut Random(rank as u64), 1000, 3, 0, 4)];
    for rank in [0, 1, 3] {
        pass(face, &mut alone, &mut tensors(rank), Pass::DOT | Pass::OBSERVE)?;
    }
    let states = on_ranks(4, |mut rank| -> Result<_, EngineError> {
        let mut blender = blender(face, config(3))?;
        if rank.rank != 2 {
            pass(face, &mut blender, &mut tensors(rank.rank), Pass::DOT)?;
        }
        assert_eq!(blender.observe_each(&mut rank, Stream::default())?, []);
        Ok(blender.save(Stream::default())?)
    });
    for state in states {
        assert_eq!(state.map_err(|error| error.to_string())?, alone.save(Stream::default())?);
    }
    Ok(())
}

/// The error of each rank, and its pending sums before and after.
fn errors(
    face: Face,
    members: usize,
    claim: impl Fn(&mut Thread) -> gradblend::Result<Blender> + Sync,
    stays: impl Fn(&Thread) -> bool + Sync,
) -> Result<Vec<Option<Error>>, String> {
    let found = on_ranks(members, |mut rank| -> Result<_, EngineError> {
        let mut blender = claim(&mut rank)?;
        let k = blender.config().modalities as usize;
        pass(face, &mut blender, &mut [Tensor::random(&mut Random(3), 10, k, 0, 0)], Pass::DOT)?;
        let before = blender.save(Stream::default())?;
        if !stays(&rank) {
            return Ok(None);
        }
        let error = blender.reduce(&mut rank, Stream::default()).err();
        assert!(error.is_some() && before == blender.save(Stream::default())?, "an error, and nothing has changed");
        Ok(error)
    });
    found.into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())
}

fn ranks_that_differ(face: Face) -> Outcome {
    let device = face.device()?;
    let decay = Average::Ema { decay: 0.5 };
    let floors = Policy { min_weight: [0.1; 32], ..Policy::default() };
    let others: [(&'static str, Config); 4] = [
        ("number of modalities", config(4)),
        ("configuration", Config { average: decay, ..config(3) }),
        ("configuration", Config { cadence: Cadence::OnRequest, ..config(3) }),
        ("configuration", Config { policy: Policy { damping: 1e-3, ..floors }, ..config(3) }),
    ];
    for (what, other) in others {
        let other = Config { policy: Policy { min_weight: [0.0; 32], ..other.policy }, ..other };
        let of_rank = |rank: &mut Thread| Blender::new(&device, if rank.rank == 2 { other } else { config(3) });
        for error in errors(face, 4, of_rank, |_| true)? {
            let want = Error::RankDiffers { rank: 2, what };
            assert_eq!(error, Some(want));
        }
    }
    let observed = |rank: &mut Thread| {
        let mut blender = Blender::new(&device, Config { threads: 1 + rank.rank as u32, ..config(3) })?;
        if rank.rank == 1 {
            blender.observe(Stream::default())?;
        }
        Ok(blender)
    };
    for error in errors(face, 3, observed, |_| true)? {
        assert_eq!(error, Some(Error::RankDiffers { rank: 1, what: "state" }));
    }
    Ok(())
}

/// What makes states differ after the first exchange is found in the next.
fn ranks_that_differ_later(face: Face) -> Outcome {
    type Change = fn(&mut Blender, usize) -> gradblend::Result<()>;
    let sets_weights: Change = |blender, rank| {
        let weights = if rank == 1 { [0.25, 0.75] } else { [0.75, 0.25] };
        blender.set_weights(&weights, Stream::default())
    };
    let loads: Change = |blender, rank| {
        let saved = blender.save(Stream::default())?;
        if rank == 1 {
            blender.observe(Stream::default())?;
        }
        let saved = if rank == 1 { blender.save(Stream::default())? } else { saved };
        blender.load(&saved, Stream::default())
    };
    for change in [sets_weights, loads] {
        let found = on_ranks(3, |mut rank| -> Result<_, EngineError> {
            let mut blender = blender(face, config(2))?;
            blender.reduce(&mut rank, Stream::default())?;
            blender.observe(Stream::default())?;
            change(&mut blender, rank.rank)?;
            Ok(blender.reduce(&mut rank, Stream::default()).err())
        });
        for error in found {
            let error = error.map_err(|error| error.to_string())?;
            assert_eq!(error, Some(Error::RankDiffers { rank: 1, what: "state" }));
        }
    }
    // A rank that makes its blender anew compares it, while the others exchange products: also with two modalities, where
    // both could be four numbers.
    for k in [2, 3] {
        let found = on_ranks(2, |mut rank| -> Result<_, EngineError> {
            let mut first = blender(face, config(k))?;
            first.reduce(&mut rank, Stream::default())?;
            let mut again = if rank.rank == 1 { blender(face, config(k))? } else { first };
            Ok(again.reduce(&mut rank, Stream::default()).err())
        });
        for error in found {
            let error = error.map_err(|error| error.to_string())?;
            assert_eq!(error, Some(Error::Exchange { reason: "ranks came with different numbers of numbers".into() }));
        }
    }
    // Another group is compared anew.
    let pairs: [Arc<(Mutex<Meeting>, Condvar)>; 2] = Default::default();
    let found = on_ranks(4, |mut rank| -> Result<_, EngineError> {
        let mut blender = blender(face, config(2))?;
        blender.reduce(&mut rank, Stream::default())?;
        if rank.rank == 3 {
            blender.observe(Stream::default())?;
        }
        let mut pair = Thread { rank: rank.rank % 2, count: 2, members: 2, meeting: pairs[rank.rank / 2].clone() };
        Ok(blender.reduce(&mut pair, Stream::default()).err())
    });
    let found = found.into_iter().collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    let differs = Some(Error::RankDiffers { rank: 1, what: "state" });
    assert_eq!(found, [None, None, differs.clone(), differs]);
    Ok(())
}

fn groups_that_are_none(face: Face) -> Outcome {
    let device = face.device()?;
    type Claim = fn(&mut Thread);
    let claims: [(Claim, &str); 3] = [
        (|rank| rank.count += usize::from(rank.rank == 1), "it has 3 ranks"),
        (|rank| rank.rank += 3 * usize::from(rank.rank == 0), "a rank has a number above 2"),
        (|rank| rank.rank = rank.rank.max(1), "not one rank, but 0, has the number 0"),
    ];
    for (claim, words) in claims {
        let of_rank = |rank: &mut Thread| {
            claim(rank);
            Blender::new(&device, config(2))
        };
        for error in errors(face, 3, of_rank, |_| true)? {
            let said = error.as_ref().map(ToString::to_string).unwrap_or_default();
            assert!(matches!(error, Some(Error::Group { .. })) && said.contains(words), "{said}");
        }
    }
    Ok(())
}

/// The others get the engine's error, and their own sums are pending again.
fn a_missing_rank(face: Face) -> Outcome {
    let device = face.device()?;
    let found = errors(face, 3, |_| Blender::new(&device, config(2)), |rank| rank.rank != 1)?;
    let want = Error::Exchange { reason: "a rank did not come".into() };
    assert_eq!(found, [Some(want.clone()), None, Some(want.clone())]);
    // After the first exchange, where the check has passed.
    let later = on_ranks(2, |mut rank| -> Result<_, EngineError> {
        let mut blender = blender(face, config(2))?;
        blender.reduce(&mut rank, Stream::default())?;
        blender.observe(Stream::default())?;
        pass(face, &mut blender, &mut [Tensor::random(&mut Random(3), 10, 2, 0, 0)], Pass::DOT)?;
        let before = blender.save(Stream::default())?;
        if rank.rank == 1 {
            return Ok(None);
        }
        let error = blender.reduce(&mut rank, Stream::default()).err();
        assert_eq!(bits64(&sums_of(&mut blender)?).len(), 4);
        assert_eq!(before, blender.save(Stream::default())?);
        Ok(error)
    });
    let later = later.into_iter().collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    assert_eq!(later, [Some(want), None]);
    Ok(())
}
