//! Constants and records that the host and the kernels share. Imports nothing of this crate.
//!
//! This file is their only definition: `kernels/header.rs` generates the kernels' header from it. Records are `repr(C)`
//! without padding and hold addresses as 64-bit numbers, so the same bytes mean the same to the host and to a device.
#![allow(dead_code, reason = "some constants and records are for kernels alone")]

use bytemuck::{Pod, Zeroable};

/// Declares constants, and lists their names and values in `CONSTANTS`.
macro_rules! constants {
    ($($(#[$doc:meta])* $visibility:vis $name:ident: $type:ty = $value:expr;)+) => {
        $($(#[$doc])* $visibility const $name: $type = $value;)+
        /// Name and value of each constant.
        pub(crate) const CONSTANTS: &[(&str, u64)] = &[$((stringify!($name), $name as u64)),+];
    };
}

constants! {
    /// Largest number of modalities K of a `Blender`.
    pub MAX_MODALITIES: usize = 32;

    /// Bytes of the widest load of a kernel, and the alignment that this load needs.
    pub(crate) ALIGNMENT: u64 = 16;

    // ---- Tuning. docs/performance.md gives the reasons and the measurements. `CHUNK`, `SPAN`, `THREADS_PER_BLOCK` and
    // `WARP_CHUNK` fix the order of additions, and so the last bits of sums; the other constants change no bit. ----

    /// Most elements of a chunk, the unit of work. A chunk belongs to one tensor.
    ///
    /// 128 products for each accumulator of a thread block; twice as many would exceed the error bound. 64 Ki f32 elements of
    /// six buffers are 1.5 MiB: enough to hide the cost of a chunk, few enough to share a model of 25 million elements evenly
    /// among threads. Not yet measured on a GPU.
    pub(crate) CHUNK: u64 = 1 << 16;

    /// Least number of elements that a CPU thread claims at a time; the last span of a plan can have fewer.
    ///
    /// A span is a run of whole chunks with one partial sum, so a thousand tiny tensors cost one claim, not a thousand.
    pub(crate) SPAN: u64 = CHUNK;

    /// Threads of a thread block. Unit u (16 bytes) of a chunk that a block shares belongs to thread
    /// u mod `THREADS_PER_BLOCK`; unit u of a warp's chunk belongs to lane u mod 32. Not yet measured on a GPU.
    pub(crate) THREADS_PER_BLOCK: u64 = 256;

    /// Most elements of a chunk that one warp processes alone.
    ///
    /// A thread has two accumulators, so a warp has 64 and a block 512: 8,192 elements of a warp and 65,536 of a block
    /// are both 128 elements an accumulator.
    pub(crate) WARP_CHUNK: u64 = CHUNK / (THREADS_PER_BLOCK / 32);

    /// `min_blocks_per_sm` of `__launch_bounds__`: 2 blocks of 256 threads leave 128 registers a thread, all of which a
    /// step with 4 modalities uses. Not yet measured on a GPU.
    pub(crate) MIN_BLOCKS_PER_SM: u64 = 2;

    /// Least number of loads of [`ALIGNMENT`] bytes that a thread keeps in flight.
    ///
    /// 8 loads of 512 threads are 64 KiB an SM: what CUB's tuning asks for on a B200, the most of all GPUs that it names.
    /// Not yet measured on a GPU.
    pub(crate) LOADS_IN_FLIGHT: u64 = 8;

    /// Loads of two partial sums that a thread keeps in flight while the last block adds up the partial sums.
    ///
    /// 16 loads of 256 threads are 64 KiB: one latency for up to 1,360 spans at K = 3. Not yet measured on a GPU.
    pub(crate) PARTIALS_IN_FLIGHT: u64 = 16;

    /// A derivative of the solver counts as 0 below 2^-this of the sum of its absolute terms: 128 roundings of 2^-53, for
    /// sums of up to 32 products.
    pub(crate) DERIVATIVE_BITS: u64 = 46;

    /// A pivot of the solver below 2^-this of the terms of its diagonal, of a singular matrix, is raised to it: 32 roundings,
    /// which changes Q by no more than rounding does.
    pub(crate) PIVOT_BITS: u64 = 48;

    /// A pivot below -2^-this of the terms of its diagonal is not of a positive semidefinite matrix with rounding errors.
    pub(crate) INDEFINITE_BITS: u64 = 42;

    /// Most variables that enter the solver's active set, per modality. The random problems of `tests/minimum.rs` need up to
    /// 1.3.
    pub(crate) ENTRIES: u64 = 8;

    /// Codes of `DType`.
    pub(crate) F32: u32 = 0;
    pub(crate) F16: u32 = 1;
    pub(crate) BF16: u32 = 2;

    /// Bits of `Pass`.
    pub(crate) DOT: u32 = 1;
    pub(crate) BLEND: u32 = 2;
    pub(crate) ACCUMULATE: u32 = 4;
    pub(crate) OBSERVE: u32 = 8;

    /// Bits of `Flags`.
    pub(crate) HELD: u32 = 1;
    pub(crate) NONFINITE: u32 = 2;
    pub(crate) CLAMPED: u32 = 4;
    pub(crate) FLOORED: u32 = 8;
    pub(crate) INEXACT: u32 = 16;

    /// Codes of `Average`.
    pub(crate) MEAN: u32 = 0;
    pub(crate) EMA: u32 = 1;

    /// Codes of `Overfitting`.
    pub(crate) UNCORRELATED: u32 = 0;
    pub(crate) CORRELATED: u32 = 1;

    /// Codes of `Negative`.
    pub(crate) CLAMP: u32 = 0;
    pub(crate) SIGNED: u32 = 1;

    /// Codes of `Cadence`.
    pub(crate) ON_REQUEST: u32 = 0;
    pub(crate) EVERY_OBSERVATION: u32 = 1;
}

/// Declares records, and describes them in `RECORDS`.
macro_rules! records {
    ($($(#[$doc:meta])* $record:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)+ })+) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Pod, Zeroable)]
            #[repr(C)]
            pub(crate) struct $record { $($(#[$field_doc])* pub(crate) $field: $type,)+ }
        )+
        /// Description of each record.
        pub(crate) const RECORDS: &[Record] = &[$(Record {
            name: stringify!($record),
            bytes: size_of::<$record>(),
            fields: &[$((stringify!($field), stringify!($type), std::mem::offset_of!($record, $field))),+],
        }),+];
    };
}

/// Description of a record: what the kernels' header is generated from.
pub(crate) struct Record {
    pub(crate) name: &'static str,
    pub(crate) bytes: usize,
    /// Name, Rust type and offset in bytes of each field.
    pub(crate) fields: &'static [(&'static str, &'static str, usize)],
}

records! {
    /// One tensor of a plan. Its modalities stand in tables of K slots a tensor, the present ones first.
    TensorRecord {
        /// Address of the train gradient t; 0 if absent.
        train: u64,
        /// Address of the validation gradient g; 0 if absent.
        valid: u64,
        /// Address of the blended gradient; 0 if the tensor is not blended.
        blended: u64,
        /// Elements.
        len: u64,
        /// Code of the `DType`.
        dtype: u32,
        /// Number of modalities present.
        present: u32,
        /// Largest power of two, at most [`ALIGNMENT`], that divides all addresses.
        alignment: u32,
        /// Padding.
        reserved: u32,
    }

    /// A run of elements of one tensor.
    Chunk {
        /// First element.
        start: u64,
        /// Index of the tensor.
        tensor: u32,
        /// Elements, at most [`CHUNK`].
        len: u32,
    }

    /// A run of chunks: what one thread or thread block claims at a time. It has one partial sum.
    Span {
        /// First chunk.
        first: u32,
        /// One past the last chunk.
        end: u32,
    }

    /// Counters of a running launch; zero between launches.
    Progress {
        /// Spans that thread blocks claimed after their first.
        claimed: u32,
        /// Thread blocks that have finished.
        finished: u32,
    }

    /// State of a blender: all that it keeps between calls.
    State {
        /// Pending sums: c_0 .. c_K-1, then d_0 .. d_K-1, without a gap.
        pending: [f64; 2 * MAX_MODALITIES],
        /// Weights in force, rounded to f32: the factors of `blend`.
        weights_f32: [f32; MAX_MODALITIES],
        /// Weights in force.
        weights: [f64; MAX_MODALITIES],
        /// Running mean of c_k, before division by `normaliser`.
        mean: [f64; MAX_MODALITIES],
        /// Running mean of c_k^2, before division by `normaliser`. Infinite where it is unknown: after a c_k whose square
        /// overflows, and after a saved state of version 1.
        mean_square: [f64; MAX_MODALITIES],
        /// Running mean of d_j d_k, row-major with K columns, before division by `normaliser`.
        second_moment: [f64; MAX_MODALITIES * MAX_MODALITIES],
        /// Total weight of the observations: 1 - b^n for an EMA of decay b, 1 for a mean, 0 before the first.
        normaliser: f64,
        /// n: observations in the moments.
        observed: u64,
        /// Observations skipped because a product was not finite.
        skipped: u64,
        /// Bits of `Flags`.
        flags: u32,
        /// Bit k: modality k made the latest observation not finite.
        nonfinite: u32,
        /// Bit k: the latest reweight gave modality k its least weight, which is above 0.
        floored: u32,
        /// Padding.
        reserved: u32,
    }

    /// Kernel parameter: the table of a plan. All addresses are of device memory.
    TableArgs {
        /// Address of the [`TensorRecord`]s.
        tensors: u64,
        /// Address of the modalities' addresses, K slots a tensor.
        addresses: u64,
        /// Address of the modalities' indices, K slots a tensor.
        indices: u64,
        /// Address of the [`Chunk`]s.
        chunks: u64,
        /// Address of the [`Span`]s.
        spans: u64,
        /// Number of spans.
        count: u64,
        /// Address of the partial sums, 2K f64 a span.
        partials: u64,
    }

    /// Kernel parameter: a blender's memory and configuration.
    BlenderArgs {
        /// Address of the [`State`].
        state: u64,
        /// Address of the [`Progress`].
        progress: u64,
        /// Address of [`ALIGNMENT`] zero bytes, aligned to [`ALIGNMENT`].
        zeros: u64,
        /// Decay b of an EMA; 0 for a mean.
        decay: f64,
        /// Factor of trace(S) / K on the diagonal of S.
        damping: f64,
        /// K.
        modalities: u32,
        /// Code of `Average`.
        average: u32,
        /// Code of `Overfitting`.
        overfitting: u32,
        /// Code of `Negative`.
        negative: u32,
        /// Code of `Cadence`.
        cadence: u32,
        /// Padding.
        reserved: u32,
        /// Least weights.
        min_weight: [f64; MAX_MODALITIES],
    }

    /// Kernel parameter: the gradient scale of an observation.
    ObservationArgs {
        /// Address of the scale, one f32; 0 if `scale` holds it.
        scale_address: u64,
        /// The scale.
        scale: f32,
        /// Padding.
        reserved: u32,
    }

    /// Kernel parameter of `set_weights`.
    Weights {
        /// K weights; the rest is not used.
        values: [f64; MAX_MODALITIES],
    }
}
