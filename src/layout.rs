//! Constants and records that every backend shares. Imports nothing of this crate.
//!
//! The records are `repr(C)` and hold addresses as 64-bit numbers, so that the same bytes mean the same thing to host
//! code and to a kernel.

/// Largest number of modalities K that a [`Blender`](crate::Blender) takes.
pub const MAX_MODALITIES: usize = 32;

/// Most CPU threads that a blender starts. No machine has more cores: a larger number is a mistake, better told than tried.
pub(crate) const MAX_CPU_THREADS: u32 = 4096;

/// Bytes of a kernel's widest load, and so the alignment that it takes.
pub(crate) const ALIGNMENT: u64 = 16;

// ---- Tuning. docs/tuning.md has the reckoning behind each number, and what has been measured. `CHUNK`, `SPAN`, `THREADS` and
// `SMALL` decide in which order products are added, and so their last bits; the others change no bit. ----

/// Elements in a chunk, the unit of work that never crosses a tensor.
///
/// 64 Ki elements of f32 in six lists are 1.5 MiB: long enough that its overhead vanishes, short enough that two
/// threads share a 25-million-element model evenly. On a GPU: not measured yet.
pub(crate) const CHUNK: u64 = 1 << 16;

/// Elements that one CPU thread claims at a time, at the least (the last claim of a plan may hold fewer).
///
/// A claim (a *span*) is a run of whole chunks with one partial sum of its own, so a thousand tiny tensors cost one
/// partial and one claim, not a thousand.
pub(crate) const SPAN: u64 = CHUNK;

/// Threads of a block. Unit u of a block's chunk belongs to thread u mod `THREADS`; that of a warp's chunk to lane u mod 32.
///
/// Not measured yet.
#[cfg(feature = "cuda")]
pub(crate) const THREADS: u64 = 256;

/// Longest chunk that a warp takes alone, where a block has several.
///
/// A thread keeps two sums, so a warp has 64 of them and a block 512: 8,192 and 65,536 elements are 128 in each.
#[cfg(feature = "cuda")]
pub(crate) const SMALL: u64 = CHUNK / (THREADS / 32);

/// Blocks that a multiprocessor holds: the compiler leaves each thread its share of the registers.
///
/// With 256 threads that is 128 registers, of which a step with 4 modalities needs all. Not measured yet.
#[cfg(feature = "cuda")]
#[allow(dead_code, reason = "for the kernels alone")]
pub(crate) const RESIDENT: u64 = 2;

/// Loads of [`ALIGNMENT`] bytes that a thread has on their way at once, at the least.
///
/// 8 of 512 threads are 64 KiB a multiprocessor: what CUB's tuning asks for on a B200, the most of any GPU that it names.
/// Not measured yet.
#[cfg(feature = "cuda")]
#[allow(dead_code, reason = "for the kernels alone")]
pub(crate) const LOADS: u64 = 8;

/// Loads of two partial sums that a thread has on their way at once when the last block adds them all up.
///
/// 16 of 256 threads are 64 KiB, as `LOADS` has it: one latency for up to 1,360 spans at K = 3. Not measured yet.
#[cfg(feature = "cuda")]
#[allow(dead_code, reason = "for the kernels alone")]
pub(crate) const FOLD: u64 = 16;

/// Bits of `Pass`.
pub(crate) const DOT: u32 = 1;
pub(crate) const BLEND: u32 = 2;
pub(crate) const ACCUMULATE: u32 = 4;
pub(crate) const OBSERVE: u32 = 8;

/// Bits of `Flags`.
pub(crate) const HELD: u32 = 1;
pub(crate) const NONFINITE: u32 = 2;
pub(crate) const CLAMPED: u32 = 4;

/// What a plan knows of one tensor. Its modalities stand beside it, in tables of K slots a tensor, present ones first.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct TensorRecord {
    /// Address of the train gradient t, 0 when absent.
    pub(crate) train: u64,
    /// Address of the validation gradient g, 0 when absent.
    pub(crate) valid: u64,
    /// Address of the blended gradient, 0 when the tensor is not blended.
    pub(crate) blended: u64,
    /// Elements.
    pub(crate) len: u64,
    /// A `DType` as its code.
    pub(crate) dtype: u32,
    /// How many modalities are present.
    pub(crate) present: u32,
    /// What all its addresses are a multiple of, at most [`ALIGNMENT`].
    pub(crate) alignment: u32,
    /// Nothing; keeps the size a multiple of 8.
    pub(crate) reserved: u32,
}

/// A run of elements of one tensor.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Chunk {
    /// First element.
    pub(crate) start: u64,
    /// The tensor's place in the list.
    pub(crate) tensor: u32,
    /// Elements, at most [`CHUNK`].
    pub(crate) len: u32,
}

/// A run of chunks: one claim of one thread or block, one partial sum.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Span {
    /// First chunk.
    pub(crate) first: u32,
    /// One past the last chunk.
    pub(crate) end: u32,
}

/// How far a launch has come; zero between launches.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Progress {
    /// Spans that blocks have asked for after their first.
    pub(crate) taken: u32,
    /// Blocks that are done.
    pub(crate) done: u32,
}

/// Everything a blender remembers between calls.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct State {
    /// Pending sums: c_0..c_K, then d_0..d_K, without a gap.
    pub(crate) pending: [f64; 2 * MAX_MODALITIES],
    /// The weights in force, rounded to f32: what `blend` multiplies by.
    pub(crate) weights_f32: [f32; MAX_MODALITIES],
    /// The weights in force.
    pub(crate) weights: [f64; MAX_MODALITIES],
    /// Running mean of c_k, not yet divided by `normaliser`.
    pub(crate) mean: [f64; MAX_MODALITIES],
    /// Running mean of d_j d_k, row-major with K columns, not yet divided by `normaliser`.
    pub(crate) second_moment: [f64; MAX_MODALITIES * MAX_MODALITIES],
    /// Weight of all observations so far: 1 - b^n for an EMA of decay b, 1 for a mean; 0 before the first.
    pub(crate) normaliser: f64,
    /// Observations that entered the moments.
    pub(crate) observed: u64,
    /// Observations that did not, for a product that was not finite.
    pub(crate) skipped: u64,
    /// `Flags` as bits.
    pub(crate) flags: u32,
    /// Bit k: modality k made the latest observation not finite.
    pub(crate) nonfinite: u32,
}

/// What a kernel is launched with. Addresses are the device's.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Launch {
    /// Of the [`TensorRecord`]s.
    pub(crate) tensors: u64,
    /// Of the modalities' addresses, K slots a tensor.
    pub(crate) addresses: u64,
    /// Of the modalities' numbers, K slots a tensor.
    pub(crate) indices: u64,
    /// Of the [`Chunk`]s.
    pub(crate) chunks: u64,
    /// Of the [`Span`]s.
    pub(crate) spans: u64,
    /// Spans.
    pub(crate) count: u64,
    /// Of the partial sums, 2K f64 a span.
    pub(crate) partials: u64,
    /// Of the [`State`].
    pub(crate) state: u64,
    /// Of the [`Progress`].
    pub(crate) progress: u64,
    /// Of [`ALIGNMENT`] bytes of zeros, aligned to as many.
    pub(crate) zeros: u64,
    /// Of the gradient scale, an f32; 0 where `scale` has it.
    pub(crate) scale_address: u64,
    /// b of an EMA.
    pub(crate) decay: f64,
    /// Times trace(S) / K, added to the diagonal of S.
    pub(crate) damping: f64,
    /// The gradient scale.
    pub(crate) scale: f32,
    /// K.
    pub(crate) modalities: u32,
    /// `Pass` as bits.
    pub(crate) what: u32,
    /// 0: mean, 1: EMA.
    pub(crate) average: u32,
    /// 0: uncorrelated, 1: correlated.
    pub(crate) overfitting: u32,
    /// 0: clamp, 1: signed.
    pub(crate) negative: u32,
    /// 0: on request, 1: at every observation.
    pub(crate) cadence: u32,
    /// Nothing; keeps the size a multiple of 8.
    pub(crate) reserved: u32,
}

/// Weights to put in force, the second argument of the kernel `set_weights`.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Weights {
    /// K of them.
    pub(crate) values: [f64; MAX_MODALITIES],
}
