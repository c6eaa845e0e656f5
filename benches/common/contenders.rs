//! The contenders: this crate, plain reading, the naive way, ndarray; and the oracle that checks them first.

use std::ffi::c_void;

use gradblend::{Average, Blender, Config, DType, Device, Plan, Stream, TensorGrads};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::Operation;
use super::cases::Case;
use super::lists::{Lists, Real};

/// Who is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// Plain reading of the bytes of the floor, one after the other: what a pass writes is read, too.
    Read,
    /// The same bytes at four places at a time, with a prefetch. Beyond the cache it is up to a fifth faster.
    Abreast,
    /// This crate.
    Ours,
    /// t - g into a buffer, two dots a modality, then axpys: plain Rust, rayon over pieces.
    Naive,
    /// The naive way with ndarray's operations.
    Ndarray,
}

impl Contender {
    pub(crate) const ALL: [Contender; 5] =
        [Contender::Read, Contender::Ours, Contender::Abreast, Contender::Naive, Contender::Ndarray];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Contender::Read => "read",
            Contender::Abreast => "read abreast",
            Contender::Ours => "gradblend",
            Contender::Naive => "naive",
            Contender::Ndarray => "ndarray",
        }
    }

    pub(crate) fn takes(self, dtype: DType) -> bool {
        self != Contender::Ndarray || dtype == DType::F32
    }
}

/// Sums c_k and d_k.
type Sums = Vec<[f64; 2]>;

/// All contenders on the same gradients.
pub(crate) struct Contenders<T: Real> {
    operation: Operation,
    threads: usize,
    pool: ThreadPool,
    blender: Blender,
    /// Of raw addresses, as the naive way writes to the same blended gradient in its turn.
    plan: Plan<'static>,
    weights: Vec<f32>,
    /// Room for t - g of the largest tensor, used again for each: kinder than allocating it.
    difference: Vec<T>,
    /// Pieces of all lists, one list after another.
    pieces: Vec<Piece>,
    lists: Lists<T>,
}

/// Some bytes of `lists`, which owns them, so they cannot be borrowed beside it.
struct Piece(*const [u8]);

// SAFETY: nothing writes to the lists while pieces are read.
unsafe impl Sync for Piece {}

/// Elements of a piece of the naive way: below, an operation is not worth a second thread.
const PIECE: usize = 1 << 16;

/// Bytes that reading abreast asks for before it uses them.
const READ_AHEAD: usize = 1024;

/// Bytes of a piece of plain reading. Rayon hands out runs of them. 256 KiB is no faster or slower.
const READ_PIECE: usize = 1 << 22;

impl<T: Real> Contenders<T> {
    /// Makes the gradients and checks what every contender makes of them against f64.
    pub(crate) fn checked(operation: Operation, case: &Case) -> Self {
        let lists = Lists::<T>::random(&case.lens, case.modalities);
        let config =
            Config { average: Average::Mean, threads: case.threads as u32, ..Config::new(case.modalities as u32) };
        let mut blender = Blender::new(&Device::cpu(), config).expect("a blender");
        let weights: Vec<f32> = (0..case.modalities).map(|k| 0.125 + k as f32 / 16.0).collect();
        let wide: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
        blender.set_weights(&wide, Stream::default()).expect("weights");
        let plan = blender.plan(&grads(&lists, operation)).expect("a plan");
        let mut pieces = Vec::new();
        let mut all: Vec<&Vec<T>> = lists.modalities.iter().collect();
        if operation.dots() {
            all.extend([&lists.train, &lists.valid]);
        }
        if operation.blends() {
            all.push(&lists.blended);
        }
        for list in all {
            for piece in list.chunks(READ_PIECE / size_of::<T>()) {
                pieces.push(Piece(std::ptr::slice_from_raw_parts(piece.as_ptr().cast(), size_of_val(piece))));
            }
        }
        let pool = ThreadPoolBuilder::new().num_threads(case.threads).build().expect("threads");
        let longest = case.lens.iter().copied().max().unwrap_or(0);
        let difference = vec![T::from_f32(1.0); longest];
        let threads = case.threads;
        let mut ready = Contenders { operation, threads, pool, blender, plan, weights, difference, pieces, lists };
        ready.check(&case.name);
        ready
    }

    /// Does the operation once; returns something that depends on all of it.
    pub(crate) fn run(&mut self, contender: Contender) -> f64 {
        match contender {
            Contender::Read => self.read(false) as f64,
            Contender::Abreast => self.read(true) as f64,
            Contender::Ours => {
                let done = match self.operation {
                    Operation::Dot => self.blender.dot(&self.plan, Stream::default()),
                    Operation::Blend => self.blender.blend(&self.plan, Stream::default()),
                    Operation::Step => self.blender.step(&self.plan, Stream::default()),
                };
                done.expect("the operation");
                0.0
            }
            Contender::Naive => self.separately(&T::PLAIN)[0][0],
            Contender::Ndarray => T::NDARRAY.map_or(0.0, |kernels| self.separately(&kernels)[0][0]),
        }
    }

    fn read(&self, abreast: bool) -> u64 {
        // SAFETY: a piece of `lists`, which is alive and not written to meanwhile.
        let sum = |piece: &Piece| read(unsafe { &*piece.0 }, abreast);
        if self.threads == 1 {
            return self.pieces.iter().map(sum).fold(0, u64::wrapping_add);
        }
        let pieces = &self.pieces;
        self.pool.install(|| pieces.par_iter().map(sum).reduce(|| 0, u64::wrapping_add))
    }

    /// t - g, then two dots a modality, then a product and axpys, each operation over a whole tensor.
    fn separately(&mut self, kernels: &Kernels<T>) -> Sums {
        let Contenders { lists, difference, weights, operation, pool, threads, .. } = self;
        let threads = *threads;
        let mut all = || {
            let mut sums = vec![[0.0; 2]; weights.len()];
            for tensor in &lists.tensors {
                let range = tensor.clone();
                let (t, g) = (&lists.train[range.clone()], &lists.valid[range.clone()]);
                if operation.dots() {
                    let difference = &mut difference[..range.len()];
                    write(threads, difference, [t, g], |out, [t, g]| (kernels.difference)(t, g, out));
                    for (sums, v) in sums.iter_mut().zip(&lists.modalities) {
                        let v = &v[range.clone()];
                        sums[0] += dot(threads, g, v, kernels.dot);
                        sums[1] += dot(threads, difference, v, kernels.dot);
                    }
                }
                if operation.blends() {
                    let blended = &mut lists.blended[range.clone()];
                    for (k, (v, w)) in lists.modalities.iter().zip(weights.iter()).enumerate() {
                        // The first needs no zeros to add to: a list less than K axpys.
                        let kernel = if k == 0 { kernels.scale } else { kernels.axpy };
                        let v = &v[range.clone()];
                        write(threads, blended, [v, v], |out, [v, _]| kernel(*w, v, out));
                    }
                }
            }
            sums
        };
        if threads == 1 { all() } else { pool.install(all) }
    }

    /// Runs each contender once and compares with sums and blends in f64.
    fn check(&mut self, case: &str) {
        let exact = self.exact();
        for contender in [Contender::Ours, Contender::Naive, Contender::Ndarray] {
            if contender == Contender::Ndarray && T::NDARRAY.is_none() {
                continue;
            }
            self.lists.blended.par_iter_mut().for_each(|x| *x = T::from_f32(7.0));
            let (sums, signed) = match contender {
                Contender::Ours => self.ours(),
                Contender::Naive => (self.separately(&T::PLAIN), true),
                _ => (T::NDARRAY.map_or_else(Vec::new, |kernels| self.separately(&kernels)), true),
            };
            // The naive way rounds t - g to the dtype.
            let rounded = if contender == Contender::Ours { 0.0 } else { T::EPSILON };
            if self.operation.dots() {
                assert_eq!(sums.len(), exact.len());
                for (k, (got, (want, size))) in sums.iter().zip(&exact).enumerate() {
                    for (i, slack) in [0.0, rounded].into_iter().enumerate() {
                        let bound = size[i] * (slack + 1.0 / 65536.0);
                        let want = if signed || i == 0 { want[i] } else { want[i].abs() };
                        let off = (got[i] - want).abs();
                        assert!(off <= bound, "{case}: {contender:?} sum {i} of modality {k}: {} for {want}", got[i]);
                    }
                }
            }
            if self.operation.blends() {
                self.check_blend(case, contender);
            }
        }
    }

    /// This crate's sums, and whether the d_k have their sign: S_kk of one observation is d_k squared.
    fn ours(&mut self) -> (Sums, bool) {
        let modalities = self.weights.len();
        self.blender.reset(Stream::default()).expect("a reset");
        self.run(Contender::Ours);
        if self.operation == Operation::Step {
            let report = self.blender.report(Stream::default()).expect("a report");
            let squares = report.second_moment.iter().map(|s| s.sqrt());
            return (report.mean.iter().copied().zip(squares).map(|(c, d)| [c, d]).collect(), false);
        }
        let pending = self.blender.pending_sums();
        // SAFETY: 2K sums that are there for the blender's life, and no call on it runs.
        let pending = unsafe { std::slice::from_raw_parts(pending, 2 * modalities) };
        ((0..modalities).map(|k| [pending[k], pending[modalities + k]]).collect(), true)
    }

    /// In f64, of each modality: the two sums, and the sums of the absolute products.
    fn exact(&self) -> Vec<([f64; 2], [f64; 2])> {
        let sum = |v: &Vec<T>| {
            let product = |range: std::ops::Range<usize>| {
                let lists = self.lists.train[range.clone()].iter().zip(&self.lists.valid[range.clone()]);
                lists.zip(&v[range]).fold(([0.0; 2], [0.0; 2]), |(sum, size), ((t, g), v)| {
                    let (t, g, v) = (t.to_f64(), g.to_f64(), v.to_f64());
                    let (c, d) = (g * v, (t - g) * v);
                    ([sum[0] + c, sum[1] + d], [size[0] + c.abs(), size[1] + d.abs()])
                })
            };
            let pieces = self.lists.tensors.par_iter().flat_map(|tensor| {
                let (start, end) = (tensor.start, tensor.end);
                (start..end).into_par_iter().step_by(PIECE).map(move |at| at..end.min(at + PIECE))
            });
            let add = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
            pieces.map(product).reduce(Default::default, |a, b| (add(a.0, b.0), add(a.1, b.1)))
        };
        self.lists.modalities.iter().map(sum).collect()
    }

    fn check_blend(&self, case: &str, contender: Contender) {
        let (lists, modalities) = (&self.lists, self.weights.len() as f64);
        // The naive way rounds to the dtype at every axpy.
        let rounded = if contender == Contender::Ours { 1.0 } else { modalities + 1.0 };
        lists.tensors.par_iter().for_each(|tensor| {
            tensor.clone().into_par_iter().with_min_len(PIECE).for_each(|i| {
                let terms = || lists.modalities.iter().zip(&self.weights).map(|(v, w)| v[i].to_f64() * f64::from(*w));
                let (want, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                let f32s = (2.0 * modalities + 1.0) / f64::from(1 << 24);
                let bound = size * (f32s + rounded * T::EPSILON) + rounded / f64::from(1 << 25);
                let got = lists.blended[i].to_f64();
                assert!((got - want).abs() <= bound, "{case}: {contender:?} blend of element {i}: {got} for {want}");
            });
        });
    }
}

/// The kernels that the naive way is made of.
pub(crate) struct Kernels<T> {
    /// out = t - g
    pub(crate) difference: fn(&[T], &[T], &mut [T]),
    pub(crate) dot: fn(&[T], &[T]) -> f32,
    /// out = w v
    pub(crate) scale: fn(f32, &[T], &mut [T]),
    /// out += w v
    pub(crate) axpy: fn(f32, &[T], &mut [T]),
}

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

/// The gradients as this crate takes them.
fn grads<T: Real>(lists: &Lists<T>, operation: Operation) -> Vec<TensorGrads<'static>> {
    let at = |list: &[T], start: usize| list[start..].as_ptr().cast::<c_void>();
    let null = std::ptr::null();
    let one = |tensor: &std::ops::Range<usize>| {
        let start = tensor.start;
        let modalities: Vec<_> = lists.modalities.iter().map(|v| at(v, start)).collect();
        let (t, g) = if operation.dots() { (at(&lists.train, start), at(&lists.valid, start)) } else { (null, null) };
        let blended = if operation.blends() { at(&lists.blended, start).cast_mut() } else { std::ptr::null_mut() };
        // SAFETY: the lists live beside the plan and are as long, and nothing uses `blended` while an operation runs.
        unsafe { TensorGrads::from_raw(tensor.len() as u64, T::DTYPE, t, g, &modalities, blended) }
    };
    lists.tensors.iter().map(one).collect()
}
