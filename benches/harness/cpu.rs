//! The CPU's contenders: this crate, plain reading, the naive way, ndarray.

use std::ffi::c_void;
use std::hint::black_box;

use std::time::{Duration, Instant};

use gradblend::{Average, Blender, Config, Plan, Stream, TensorGrads};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::cases::{Case, Tensor};
use super::heap;
use super::lists::{Lists, Real};
use super::naive::{Kernels, Naive};
use super::oracle::{Bound, Sums};
use super::record::Machine;
use super::{Contender, Made, Operation, Place, Role, Way};

/// The CPU, on as many threads as a case asks for.
pub(crate) struct Cpu;

/// A case in the host's memory.
pub(crate) struct Inputs<T> {
    operation: Operation,
    threads: usize,
    pool: ThreadPool,
    weights: Vec<f32>,
    lists: Lists<T>,
}

/// This crate's results: within guarantee 4 of the design, and rounded once.
pub(crate) const OURS: Bound = Bound { sums: 1.0 / 65536.0, roundings: 0.0, cancels: false, blend: 1.0 };

impl<T: Naive> Place<T> for Cpu {
    type Inputs = Inputs<T>;
    const ROUNDS: usize = 9;
    const TURN: Duration = Duration::from_millis(10);

    fn machine(&self) -> Machine {
        let about = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = about.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
        let name = format!("{}, {} threads", model.unwrap_or(std::env::consts::ARCH).trim(), all());
        Machine { device: "cpu", name, driver: None, cache_bytes: None, software: None }
    }

    fn threads(&self, case: &Case) -> usize {
        if case.threads == 0 { all() } else { case.threads }
    }

    fn free(&self) -> u64 {
        free()
    }

    fn load(
        &self,
        operation: Operation,
        case: &Case,
        lists: Lists<T>,
        weights: Vec<f32>,
        _: usize,
    ) -> Result<Inputs<T>, String> {
        let threads = Place::<T>::threads(self, case);
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| error.to_string())?;
        Ok(Inputs { operation, threads, pool, weights, lists })
    }

    fn contenders(&self, operation: Operation, case: &Case) -> Vec<Contender<Inputs<T>>> {
        let plain = Bound { roundings: 1.0, blend: case.modalities as f64 + 1.0, sums: 1.0 / 8192.0, ..OURS };
        let limit = |name, make| Contender { name, role: Role::Limit, bound: None, make };
        let ours = |name, make| Contender { name, role: Role::Ours, bound: Some(OURS), make };
        let peer = |name, make| Contender { name, role: Role::Peer, bound: Some(plain), make };
        let mut contenders = vec![
            limit("read", |inputs| Ok(Box::new(Read::new(inputs, false)))),
            ours("gradblend", |inputs| Ok(Box::new(Ours::new(inputs, false)?))),
            limit("read abreast", |inputs| Ok(Box::new(Read::new(inputs, true)))),
        ];
        if operation == Operation::Step {
            contenders.push(ours("gradblend, calls apart", |inputs| Ok(Box::new(Ours::new(inputs, true)?))));
        }
        contenders.push(peer("naive", |inputs| Ok(Box::new(Separately::new(inputs, &T::PLAIN)?))));
        if T::NDARRAY.is_some() {
            contenders.push(peer("ndarray", |inputs| {
                Ok(Box::new(Separately::new(inputs, T::NDARRAY.as_ref().ok_or("no kernels")?)?))
            }));
        }
        contenders
    }

    fn sets(&self, _: &Inputs<T>) -> usize {
        1
    }

    fn lists<'a>(&self, inputs: &'a mut Inputs<T>) -> &'a Lists<T> {
        &inputs.lists
    }

    fn poison(&self, inputs: &mut Inputs<T>) {
        inputs.lists.blended.par_iter_mut().for_each(|x| *x = T::from_f32(7.0));
    }

    fn prepare(&self, contender: &Contender<Inputs<T>>, inputs: &mut Inputs<T>) -> (Made<Inputs<T>>, u64) {
        heap::peak(|| {
            let mut way = (contender.make)(inputs)?;
            way.run(inputs, 0);
            Ok(way)
        })
    }

    fn seconds(&self, way: &mut dyn Way<Inputs<T>>, inputs: &mut Inputs<T>, repeats: usize) -> f64 {
        let start = Instant::now();
        for _ in 0..repeats {
            way.run(inputs, 0);
        }
        start.elapsed().as_secs_f64() / repeats as f64
    }

    fn host(&self, _: &mut dyn Way<Inputs<T>>, _: &mut Inputs<T>, _: usize) -> Option<Vec<f64>> {
        None
    }

    fn counts(&self, way: &mut dyn Way<Inputs<T>>, inputs: &mut Inputs<T>) -> [Option<u64>; 2] {
        let before = heap::calls();
        way.run(inputs, 0);
        [None, Some(heap::calls() - before)]
    }
}

fn all() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory that the system can give, where it says so.
pub(crate) fn free() -> u64 {
    let about = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = about.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    // Some is left to the contenders.
    kilobytes.map_or(u64::MAX, |kilobytes| kilobytes * 1024 / 10 * 9)
}

/// This crate.
struct Ours {
    operation: Operation,
    apart: bool,
    blender: Blender,
    /// Of raw addresses, as other contenders write to the same blended gradient in their turn.
    plan: Plan<'static>,
}

impl Ours {
    fn new<T: Real>(inputs: &Inputs<T>, apart: bool) -> Result<Self, String> {
        let config = Config { threads: inputs.threads as u32, ..config(inputs.lists.modalities.len()) };
        let blender = blender(&gradblend::Device::cpu(), config, &inputs.weights)?;
        let list = |list: &[T], start: usize| list[start..].as_ptr().cast::<c_void>();
        let lists = &inputs.lists;
        let grads: Vec<TensorGrads<'static>> = (lists.tensors.iter())
            .map(|(tensor, range)| {
                let at = |which: Which| match which {
                    Which::Train => list(&lists.train, range.start),
                    Which::Valid => list(&lists.valid, range.start),
                    Which::Modality(k) => list(&lists.modalities[k], range.start),
                    Which::Blended => list(&lists.blended, range.start),
                };
                // SAFETY: the lists live longer than the plan and nothing writes to them while an operation runs.
                unsafe { grads::<T>(inputs.operation, tensor, inputs.weights.len(), at) }
            })
            .collect();
        let plan = blender.plan(&grads).map_err(|error| error.to_string())?;
        Ok(Ours { operation: inputs.operation, apart, blender, plan })
    }
}

/// A list of a tensor.
#[derive(Clone, Copy)]
pub(crate) enum Which {
    Train,
    Valid,
    Modality(usize),
    Blended,
}

/// A tensor as this crate takes it, with the lists that take part at the addresses that `at` gives.
///
/// # Safety
/// As of [`TensorGrads::from_raw`].
pub(crate) unsafe fn grads<T: Real>(
    operation: Operation,
    tensor: &Tensor,
    modalities: usize,
    at: impl Fn(Which) -> *const c_void,
) -> TensorGrads<'static> {
    let there = |is: bool, which: Which| if is { at(which) } else { std::ptr::null() };
    let v: Vec<_> = (0..modalities).map(|k| there(tensor.present(k), Which::Modality(k))).collect();
    let dots = tensor.dots(operation);
    let (t, g) = (there(dots, Which::Train), there(dots, Which::Valid));
    let blended = there(operation.blends(), Which::Blended).cast_mut();
    // SAFETY: as the caller's.
    unsafe { TensorGrads::from_raw(tensor.len as u64, T::DTYPE, t, g, &v, blended) }
}

pub(crate) fn config(modalities: usize) -> Config {
    Config { average: Average::Mean, ..Config::new(modalities as u32) }
}

/// A blender with these weights in force.
pub(crate) fn blender(device: &gradblend::Device, config: Config, weights: &[f32]) -> Result<Blender, String> {
    let mut blender = Blender::new(device, config).map_err(|error| error.to_string())?;
    let weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
    blender.set_weights(&weights, Stream::default()).map_err(|error| error.to_string())?;
    Ok(blender)
}

/// Puts an operation on a stream; `step` as its three calls if `apart`.
pub(crate) fn call(
    operation: Operation,
    apart: bool,
    blender: &mut Blender,
    plan: &Plan<'_>,
    stream: Stream,
) -> gradblend::Result<()> {
    match operation {
        Operation::Dot => blender.dot(plan, stream),
        Operation::Blend => blender.blend(plan, stream),
        Operation::Step if apart => {
            blender.dot(plan, stream)?;
            blender.blend(plan, stream)?;
            blender.observe(stream)
        }
        Operation::Step => blender.step(plan, stream),
    }
}

/// The sums of a blender's only observation: S_kk is d_k squared.
pub(crate) fn observed(blender: &mut Blender, stream: Stream) -> Sums {
    let report = blender.report(stream).expect("a report");
    assert_eq!(report.observed, 1, "the sums are asked for after one run");
    Sums { c: report.mean, d: report.second_moment.iter().map(|s| s.sqrt()).collect(), unsigned: true }
}

impl<T: Real> Way<Inputs<T>> for Ours {
    fn run(&mut self, _: &mut Inputs<T>, _: usize) {
        let done = call(self.operation, self.apart, &mut self.blender, &self.plan, Stream::default());
        done.expect("the operation");
    }

    fn sums(&mut self, inputs: &mut Inputs<T>) -> Option<Sums> {
        if self.operation == Operation::Step {
            return Some(observed(&mut self.blender, Stream::default()));
        }
        let modalities = inputs.weights.len();
        // SAFETY: 2K sums that are there for the blender's life, and no call on it runs.
        let pending = unsafe { std::slice::from_raw_parts(self.blender.pending_sums(), 2 * modalities) };
        let (c, d) = pending.split_at(modalities);
        Some(Sums { c: c.to_vec(), d: d.to_vec(), unsigned: false })
    }
}

/// t - g, then two dots a modality, then a product and axpys, each operation over a whole tensor.
struct Separately<T: 'static> {
    kernels: &'static Kernels<T>,
    /// Room for t - g of the largest tensor, used again for each: kinder than allocating it.
    difference: Vec<T>,
    /// Nothing is shared out, so a pool's threads would only have to be woken.
    alone: bool,
    sums: Sums,
}

impl<T: Real> Separately<T> {
    fn new(inputs: &Inputs<T>, kernels: &'static Kernels<T>) -> Result<Self, String> {
        let dots = inputs.operation.dots();
        let longest = inputs.lists.tensors.iter().map(|(tensor, _)| tensor.len).max().unwrap_or(0);
        let alone = inputs.threads == 1 || longest <= PIECE;
        let longest = if dots { longest } else { 0 };
        let needed = (longest * size_of::<T>()) as u64;
        if needed > free() {
            return Err(format!("needs {:.1} GB for t - g", needed as f64 / 1e9));
        }
        Ok(Separately { kernels, difference: vec![T::from_f32(1.0); longest], alone, sums: Sums::default() })
    }
}

impl<T: Real> Way<Inputs<T>> for Separately<T> {
    fn run(&mut self, inputs: &mut Inputs<T>, _: usize) {
        let Inputs { operation, threads, pool, weights, lists } = inputs;
        let (operation, threads) = (*operation, *threads);
        let mut all = || {
            let mut sums = Sums { c: vec![0.0; weights.len()], d: vec![0.0; weights.len()], unsigned: false };
            for (tensor, range) in &lists.tensors {
                let here = |list: &'_ [T]| -> *const [T] { &raw const list[range.clone()] };
                // SAFETY: of lists that are alive and not written to meanwhile.
                let v = |k: usize| unsafe { &*here(&lists.modalities[k]) };
                let present = || (0..weights.len()).filter(|k| tensor.present(*k));
                if tensor.dots(operation) {
                    let (t, g) = (&lists.train[range.clone()], &lists.valid[range.clone()]);
                    let difference = &mut self.difference[..range.len()];
                    write(threads, difference, [t, g], |out, [t, g]| (self.kernels.difference)(t, g, out));
                    for k in present() {
                        sums.c[k] += dot(threads, g, v(k), self.kernels.dot);
                        sums.d[k] += dot(threads, difference, v(k), self.kernels.dot);
                    }
                }
                if operation.blends() {
                    let blended = &mut lists.blended[range.clone()];
                    for (nth, k) in present().enumerate() {
                        // The first needs no zeros to add to: a list less than K axpys.
                        let kernel = if nth == 0 { self.kernels.scale } else { self.kernels.axpy };
                        write(threads, blended, [v(k), v(k)], |out, [v, _]| kernel(weights[k], v, out));
                    }
                }
            }
            sums
        };
        self.sums = black_box(if self.alone { all() } else { pool.install(all) });
    }

    fn sums(&mut self, _: &mut Inputs<T>) -> Option<Sums> {
        Some(self.sums.clone())
    }
}

/// Elements of a piece of the naive way: below, an operation is not worth a second thread.
const PIECE: usize = 1 << 16;

fn dot<T: Real>(threads: usize, a: &[T], b: &[T], kernel: fn(&[T], &[T]) -> f32) -> f64 {
    let piece = |(a, b): (&[T], &[T])| f64::from(kernel(a, b));
    if threads == 1 || a.len() <= PIECE {
        a.chunks(PIECE).zip(b.chunks(PIECE)).map(piece).sum()
    } else {
        a.par_chunks(PIECE).zip(b.par_chunks(PIECE)).map(piece).sum()
    }
}

fn write<T: Real>(threads: usize, out: &mut [T], [a, b]: [&[T]; 2], kernel: impl Fn(&mut [T], [&[T]; 2]) + Sync) {
    if threads == 1 || out.len() <= PIECE {
        kernel(out, [a, b]);
    } else {
        let inputs = a.par_chunks(PIECE).zip(b.par_chunks(PIECE));
        out.par_chunks_mut(PIECE).zip(inputs).for_each(|(out, (a, b))| kernel(out, [a, b]));
    }
}

/// Bytes that reading abreast asks for before it uses them.
const READ_AHEAD: usize = 1024;

/// Bytes of a piece of plain reading. Rayon hands out runs of them. 256 KiB is no faster or slower.
const READ_PIECE: usize = 1 << 22;

/// Plain reading of the bytes of the floor: what a pass writes is read, too.
struct Read {
    pieces: Vec<Piece>,
    /// By one thread: so few bytes that to wake another takes longer.
    alone: bool,
    /// Four places at a time, with a prefetch. Beyond the cache it is up to a fifth faster.
    abreast: bool,
}

/// Some bytes of the inputs' lists, which cannot be borrowed beside them.
#[derive(Clone, Copy)]
struct Piece(*const [u8]);

// SAFETY: nothing writes to the lists while pieces are read.
unsafe impl Sync for Piece {}

impl Read {
    /// The lists from end to end: where some are absent, as many bytes from the start.
    fn new<T: Real>(inputs: &Inputs<T>, abreast: bool) -> Self {
        let lists = &inputs.lists;
        let floor: usize = (lists.tensors.iter())
            .map(|(tensor, range)| range.len() * tensor.lists(inputs.operation) as usize * size_of::<T>())
            .sum();
        let mut left = floor;
        let mut pieces = Vec::new();
        for list in lists.all() {
            for piece in list.chunks(READ_PIECE / size_of::<T>()) {
                let bytes = left.min(size_of_val(piece));
                left -= bytes;
                pieces.push(Piece(std::ptr::slice_from_raw_parts(piece.as_ptr().cast(), bytes)));
            }
        }
        const FEW: usize = 1 << 20;
        Read { pieces, alone: inputs.threads == 1 || floor <= FEW, abreast }
    }
}

impl<T: Real> Way<Inputs<T>> for Read {
    fn run(&mut self, inputs: &mut Inputs<T>, _: usize) {
        let abreast = self.abreast;
        // SAFETY: a piece of the lists, which are alive and not written to meanwhile.
        let sum = |piece: &Piece| read(unsafe { &*piece.0 }, abreast);
        let pieces = &self.pieces;
        black_box(if self.alone {
            pieces.iter().map(sum).fold(0, u64::wrapping_add)
        } else {
            inputs.pool.install(|| pieces.par_iter().map(sum).reduce(|| 0, u64::wrapping_add))
        });
    }
}
/// Adds bytes up as u64: 32 sums side by side, of one place in memory, or of four far apart with a prefetch.
#[inline(always)]
fn read_plainly(bytes: &[u8], abreast: bool, prefetch: impl Fn(*const u64)) -> u64 {
    const SUMS: usize = 32;
    const PARTS: usize = 4;
    const LINE: usize = SUMS / PARTS;
    // SAFETY: any bytes are u64.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    let ends = [head, tail].into_iter().flatten().map(|byte| u64::from(*byte)).sum::<u64>();
    let lines = words.chunks_exact(SUMS);
    let mut sums = [0_u64; SUMS];
    let rest = lines.remainder();
    if abreast {
        let part = (words.len() - rest.len()) / PARTS;
        for at in (0..part).step_by(LINE) {
            for p in 0..PARTS {
                prefetch(words.as_ptr().wrapping_add(p * part + at + READ_AHEAD / 8));
            }
            for p in 0..PARTS {
                for i in 0..LINE {
                    // SAFETY: a line of a part: `part` is a multiple of LINE, and the parts are within `words`.
                    let word = unsafe { *words.get_unchecked(p * part + at + i) };
                    sums[p * LINE + i] = sums[p * LINE + i].wrapping_add(word);
                }
            }
        }
    } else {
        for line in lines {
            for i in 0..SUMS {
                sums[i] = sums[i].wrapping_add(line[i]);
            }
        }
    }
    sums.iter().chain(rest).fold(ends, |sum, word| sum.wrapping_add(*word))
}

/// [`read_plainly`] in the widest vectors that this crate uses.
fn read(bytes: &[u8], abreast: bool) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        #[target_feature(enable = "avx2")]
        #[allow(unused_unsafe, reason = "a prefetch needs it in older compilers only")]
        fn avx2(bytes: &[u8], abreast: bool) -> u64 {
            // SAFETY: a prefetch may name any address.
            read_plainly(bytes, abreast, |at| unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) })
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { avx2(bytes, abreast) };
        }
    }
    read_plainly(bytes, abreast, |_| {})
}
