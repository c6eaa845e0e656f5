//! The CPU: plain reading, gradblend, the naive loops, ndarray.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use gradblend::{DType, Device, Stream};
use gradblend_testkit::Sample;
use rayon::prelude::*;

use crate::backend::{Backend, Entry, Implementation, Prepared};
use crate::case::Operation;
use crate::heap;
use crate::inputs::{Inputs, with_dtype};
use crate::naive::{NDARRAY, Naive, PLAIN};
use crate::oracle::{NAIVE, Sums};
use crate::ours::Calls;
use crate::record::{self, Machine};

/// All threads of the CPU.
pub(crate) struct Cpu;

impl Backend for Cpu {
    type Inputs = Inputs;
    const ROUNDS: usize = 9;
    const ROUND: Duration = Duration::from_millis(10);

    fn machine(&self) -> Machine {
        let facts = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = facts.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
        let (model, threads) = (model.unwrap_or(std::env::consts::ARCH).trim(), rayon::current_num_threads());
        let rustc = record::output("rustc", &["--version"]).unwrap_or_default();
        Machine {
            device: "cpu".into(),
            name: format!("{model}, {threads} threads"),
            driver: None,
            cache_bytes: None,
            software: rustc,
        }
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(heap::free_bytes())
    }

    fn load(&self, inputs: Inputs, _: usize) -> Result<Inputs> {
        Ok(inputs)
    }

    fn sets(&self, _: &Inputs) -> usize {
        1
    }

    fn entries(&self, operation: Operation, dtype: DType) -> Vec<Entry<Inputs>> {
        let mut entries = vec![Entry::limit("read", |inputs, operation| Read::new(inputs, operation, false))];
        entries.extend(Entry::ours(operation, Ours::new));
        entries.push(Entry::limit("read, 4 streams", |inputs, operation| Read::new(inputs, operation, true)));
        entries.push(with_dtype!(dtype, T => Entry::baseline("naive", NAIVE, |inputs, operation| {
            Naive::<T>::new(inputs, operation, &PLAIN)
        })));
        if dtype == DType::F32 {
            entries.push(Entry::baseline("ndarray", NAIVE, |inputs, operation| {
                Naive::<f32>::new(inputs, operation, &NDARRAY)
            }));
        }
        entries
    }

    fn poison(&self, inputs: &mut Inputs) -> Result<()> {
        fn fill<T: Sample>(blended: &mut [T]) {
            blended.par_iter_mut().for_each(|x| *x = T::round(7.0));
        }
        with_dtype!(inputs.dtype, T => fill::<T>(inputs.blended_mut()));
        Ok(())
    }

    fn host<'a>(&self, inputs: &'a mut Inputs) -> Result<&'a Inputs> {
        Ok(inputs)
    }

    fn prepare(&self, entry: &Entry<Inputs>, operation: Operation, inputs: &mut Inputs) -> Result<Prepared<Inputs>> {
        let (made, bytes) = heap::peak(|| -> Result<_> {
            let mut implementation = (entry.make)(inputs, operation)?;
            implementation.run(inputs, 0)?;
            Ok(implementation)
        });
        Ok((made?, bytes))
    }

    fn time(
        &self,
        implementation: &mut dyn Implementation<Inputs>,
        inputs: &mut Inputs,
        repeats: usize,
    ) -> Result<f64> {
        let start = Instant::now();
        for _ in 0..repeats {
            implementation.run(inputs, 0)?;
        }
        Ok(start.elapsed().as_secs_f64() / repeats as f64)
    }
}

struct Ours(Calls);

impl Ours {
    fn new(inputs: &mut Inputs, operation: Operation, three_calls: bool) -> Result<Self> {
        let mut calls = Calls::new(&Device::cpu(), inputs, operation, three_calls)?;
        let addresses = inputs.addresses();
        // SAFETY: the inputs outlive every implementation, and implementations run one after another.
        unsafe { calls.plan(inputs, |buffer| addresses[inputs.index(buffer)]) }?;
        Ok(Ours(calls))
    }
}

impl Implementation<Inputs> for Ours {
    fn run(&mut self, _: &mut Inputs, set: usize) -> Result<()> {
        self.0.run(set, Stream::default())
    }

    fn sums(&mut self, _: &mut Inputs) -> Result<Option<Sums>> {
        let read = |pending: *const f64, out: &mut [f64]| {
            // SAFETY: `out` is as long as the pending sums, which live in the blender; no operation runs.
            out.copy_from_slice(unsafe { std::slice::from_raw_parts(pending, out.len()) });
            Ok(())
        };
        self.0.sums(Stream::default(), read).map(Some)
    }
}

/// Bytes of a piece of plain reading. Pieces of 256 KiB are neither faster nor slower.
const READ_PIECE: usize = 1 << 22;
/// Bytes below which one thread reads faster than it wakes others.
const READ_SINGLE: usize = 1 << 20;
/// How far ahead of a load its prefetch is, in bytes.
const PREFETCH: usize = 1024;

/// Reads the bytes of the minimum traffic; a buffer that an operation writes is read, too.
struct Read {
    /// Index of the buffer, first byte, bytes.
    pieces: Vec<(usize, usize, usize)>,
    single: bool,
    /// Four addresses at a time with a prefetch, which is up to a fifth faster beyond the cache.
    streams: bool,
}

impl Read {
    /// Buffers from their start: where gradients are absent, only as many bytes as the others have.
    fn new(inputs: &Inputs, operation: Operation, streams: bool) -> Result<Self> {
        let mut left = inputs.minimum_traffic(operation);
        let single = left <= READ_SINGLE;
        let mut pieces = Vec::new();
        for index in inputs.indices(operation) {
            for start in (0..inputs.buffer_bytes).step_by(READ_PIECE) {
                let bytes = left.min(READ_PIECE).min(inputs.buffer_bytes - start);
                left -= bytes;
                pieces.push((index, start, bytes));
            }
        }
        Ok(Read { pieces, single, streams })
    }
}

impl Implementation<Inputs> for Read {
    fn run(&mut self, inputs: &mut Inputs, _: usize) -> Result<()> {
        let buffers: Vec<&[u8]> = inputs.buffers().collect();
        let sum =
            |(index, start, bytes): &(usize, usize, usize)| read(&buffers[*index][*start..][..*bytes], self.streams);
        black_box(if self.single {
            self.pieces.iter().map(sum).fold(0, u64::wrapping_add)
        } else {
            self.pieces.par_iter().map(sum).reduce(|| 0, u64::wrapping_add)
        });
        Ok(())
    }
}

/// Adds up the bytes as u64 in 32 sums: of one address after another, or of four addresses far apart with a prefetch.
#[inline(always)]
fn read_words(bytes: &[u8], streams: bool, prefetch: impl Fn(*const u64)) -> u64 {
    const SUMS: usize = 32;
    const STREAMS: usize = 4;
    const LINE: usize = SUMS / STREAMS;
    let words: &[u64] = bytemuck::cast_slice(&bytes[..bytes.len() / 8 * 8]);
    let lines = words.chunks_exact(SUMS);
    let mut sums = [0_u64; SUMS];
    let rest = lines.remainder();
    if streams {
        let part = (words.len() - rest.len()) / STREAMS;
        for at in (0..part).step_by(LINE) {
            for stream in 0..STREAMS {
                prefetch(words.as_ptr().wrapping_add(stream * part + at + PREFETCH / 8));
            }
            for stream in 0..STREAMS {
                for i in 0..LINE {
                    // SAFETY: `part` is a multiple of LINE, and STREAMS * part words exist.
                    let word = unsafe { *words.get_unchecked(stream * part + at + i) };
                    sums[stream * LINE + i] = sums[stream * LINE + i].wrapping_add(word);
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
    sums.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}

/// [`read_words`] in the widest vectors that gradblend uses.
fn read(bytes: &[u8], streams: bool) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        #[target_feature(enable = "avx2")]
        #[allow(unused_unsafe, reason = "a prefetch is unsafe in older compilers")]
        fn avx2(bytes: &[u8], streams: bool) -> u64 {
            // SAFETY: a prefetch may name any address.
            read_words(bytes, streams, |at| unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) })
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { avx2(bytes, streams) };
        }
    }
    read_words(bytes, streams, |_| {})
}
