// What the kernels share: the records of src/layout.rs, vector loads and stores, and sums over a warp. The only casts and
// shuffles are here.
//
// The sources use CUDA's own words and no inline PTX, so that a host compiler can build them too, given those words.
#pragma once

#include <stdint.h>
#include <string.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// ---- Records: src/layout.rs says what each field means, and the build hands its numbers over. ----

constexpr uint32_t MAX_MODALITIES = GRADBLEND_MAX_MODALITIES;
constexpr uint32_t CHUNK = GRADBLEND_CHUNK;
constexpr uint32_t ALIGNMENT = GRADBLEND_ALIGNMENT;
constexpr uint32_t THREADS = GRADBLEND_THREADS;
constexpr uint32_t RESIDENT = GRADBLEND_RESIDENT;
constexpr uint32_t LOADS = GRADBLEND_LOADS;
constexpr uint32_t SMALL = GRADBLEND_SMALL;
constexpr uint32_t FOLD = GRADBLEND_FOLD;
constexpr uint32_t WARP = 32;
constexpr uint32_t WARPS = THREADS / WARP;

struct TensorRecord {
    uint64_t train, valid, blended, len;
    uint32_t dtype, present, alignment, reserved;
};
struct Chunk {
    uint64_t start;
    uint32_t tensor, len;
};
struct alignas(8) Span {
    uint32_t first, end;
};
struct Progress {
    uint32_t taken, done;
};
struct State {
    double pending[2 * MAX_MODALITIES];
    float weights_f32[MAX_MODALITIES];
    double weights[MAX_MODALITIES];
    double mean[MAX_MODALITIES];
    double second_moment[MAX_MODALITIES * MAX_MODALITIES];
    double normaliser;
    uint64_t observed, skipped;
    uint32_t flags, nonfinite;
};
struct Launch {
    uint64_t tensors, addresses, indices, chunks, spans, count, partials, state, progress, zeros, scale_address;
    double decay, damping;
    float scale;
    uint32_t modalities, what, average, overfitting, negative, cadence, reserved;
};
struct Weights {
    double values[MAX_MODALITIES];
};

#define SAME_SIZE(record) static_assert(sizeof(record) == GRADBLEND_SIZE_##record, "size of " #record)
#define SAME_PLACE(record, field) \
    static_assert(__builtin_offsetof(record, field) == GRADBLEND_OFFSET_##record##_##field, #record "." #field)
SAME_SIZE(TensorRecord);
SAME_PLACE(TensorRecord, train);
SAME_PLACE(TensorRecord, valid);
SAME_PLACE(TensorRecord, blended);
SAME_PLACE(TensorRecord, len);
SAME_PLACE(TensorRecord, dtype);
SAME_PLACE(TensorRecord, present);
SAME_PLACE(TensorRecord, alignment);
SAME_SIZE(Chunk);
SAME_PLACE(Chunk, start);
SAME_PLACE(Chunk, tensor);
SAME_PLACE(Chunk, len);
SAME_SIZE(Span);
SAME_PLACE(Span, first);
SAME_PLACE(Span, end);
SAME_SIZE(Progress);
SAME_PLACE(Progress, taken);
SAME_PLACE(Progress, done);
SAME_SIZE(State);
SAME_PLACE(State, pending);
SAME_PLACE(State, weights_f32);
SAME_PLACE(State, weights);
SAME_PLACE(State, mean);
SAME_PLACE(State, second_moment);
SAME_PLACE(State, normaliser);
SAME_PLACE(State, observed);
SAME_PLACE(State, skipped);
SAME_PLACE(State, flags);
SAME_PLACE(State, nonfinite);
SAME_SIZE(Launch);
SAME_PLACE(Launch, tensors);
SAME_PLACE(Launch, addresses);
SAME_PLACE(Launch, indices);
SAME_PLACE(Launch, chunks);
SAME_PLACE(Launch, spans);
SAME_PLACE(Launch, count);
SAME_PLACE(Launch, partials);
SAME_PLACE(Launch, state);
SAME_PLACE(Launch, progress);
SAME_PLACE(Launch, zeros);
SAME_PLACE(Launch, scale_address);
SAME_PLACE(Launch, decay);
SAME_PLACE(Launch, damping);
SAME_PLACE(Launch, scale);
SAME_PLACE(Launch, modalities);
SAME_PLACE(Launch, what);
SAME_PLACE(Launch, average);
SAME_PLACE(Launch, overfitting);
SAME_PLACE(Launch, negative);
SAME_PLACE(Launch, cadence);
SAME_SIZE(Weights);
SAME_PLACE(Weights, values);

// Codes that Rust writes: DType, Pass, Flags, and the choices of a Config.
constexpr uint32_t F32 = 0, F16 = 1, BF16 = 2;
constexpr uint32_t DOT = GRADBLEND_DOT, BLEND = GRADBLEND_BLEND;
constexpr uint32_t ACCUMULATE = GRADBLEND_ACCUMULATE, OBSERVE = GRADBLEND_OBSERVE;
constexpr uint32_t HELD = GRADBLEND_HELD, NONFINITE = GRADBLEND_NONFINITE, CLAMPED = GRADBLEND_CLAMPED;
constexpr uint32_t MEAN = 0, EMA = 1;
constexpr uint32_t UNCORRELATED = 0, CORRELATED = 1;
constexpr uint32_t CLAMP = 0, SIGNED = 1;
constexpr uint32_t ON_REQUEST = 0, EVERY_OBSERVATION = 1;

// An address of the record's as a pointer.
template <class T>
__device__ __forceinline__ T *at(uint64_t address) {
    return reinterpret_cast<T *>(address);
}

// ---- Units: 16 bytes of a list, the most that one load brings. ----

// Gradients are read once and the blend is not read again, so both pass by the cache (`cs`: evict first).

__device__ __forceinline__ uint4 load(uint64_t address) { return __ldcs(at<const uint4>(address)); }

// A unit if it is there, else zeros. On a GPU they are read from `zeros`, which all threads share and which are near: of
// many branches in a row the compiler makes moves that wait for one load before the next is on its way.
__device__ __forceinline__ uint4 load_if(bool there, uint64_t address, uint64_t zeros) {
#ifdef __CUDACC__
    return load(there ? address : zeros);
#else
    (void)zeros;
    return there ? load(address) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void store(uint64_t address, uint4 unit) { __stcs(at<uint4>(address), unit); }

// Reads the first `bytes` of a unit in pieces of BYTES, all on their way at once. The rest is zero.
template <uint32_t BYTES>
__device__ __forceinline__ uint4 load_pieces(uint64_t address, uint32_t bytes) {
    static_assert(BYTES == 8 || BYTES == 4 || BYTES == 2, "pieces that divide a unit");
    uint32_t words[4];
    if constexpr (BYTES == 8) {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint2 piece = 8 * i < bytes ? __ldcs(at<const uint2>(address) + i) : make_uint2(0, 0);
            words[2 * i] = piece.x;
            words[2 * i + 1] = piece.y;
        }
    } else if constexpr (BYTES == 4) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            words[i] = 4 * i < bytes ? __ldcs(at<const uint32_t>(address) + i) : 0;
        }
    } else {
        uint32_t pieces[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            pieces[i] = 2 * i < bytes ? __ldcs(at<const unsigned short>(address) + i) : 0;
        }
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            words[i] = pieces[2 * i] | pieces[2 * i + 1] << 16;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// A unit of a list that is aligned to 2 bytes, or zeros: three words from the first that is aligned, and the halves that are left at
// its ends. No branch tells where those are, so that the loads of other units can be on their way too.
__device__ __forceinline__ uint4 load_halves(bool there, uint64_t list, uint32_t offset) {
    // Units lie 16 bytes apart.
    const uint32_t odd = list & 2;
    const uint64_t address = list + offset;
    uint32_t words[3];
#pragma unroll
    for (uint32_t i = 0; i < 3; ++i) {
        words[i] = there ? __ldcs(at<const uint32_t>(address + odd) + i) : 0;
    }
    const uint32_t half = there ? __ldcs(at<const unsigned short>(address + 12 - 6 * odd)) : 0;
    const uint32_t last = there ? __ldcs(at<const unsigned short>(address + 14)) : 0;
    return make_uint4(__funnelshift_l(half << 16, words[0], 8 * odd), __funnelshift_l(words[0], words[1], 8 * odd),
                      __funnelshift_l(words[1], words[2], 8 * odd), (odd ? words[2] >> 16 : half) | last << 16);
}

// The first `bytes` of an aligned unit, which are not all, by at most three loads. The rest is zero.
template <uint32_t BYTES>
__device__ __forceinline__ uint4 load_end(uint64_t address, uint32_t bytes) {
    const uint2 first = bytes & 8 ? __ldcs(at<const uint2>(address)) : make_uint2(0, 0);
    const uint32_t word = bytes & 4 ? __ldcs(at<const uint32_t>(address + (bytes & 8))) : 0;
    const uint32_t half = BYTES == 2 && (bytes & 2) ? __ldcs(at<const unsigned short>(address + (bytes & 12))) : 0;
    const uint32_t next = bytes & 4 ? word : half, last = bytes & 4 ? half : 0;
    return bytes & 8 ? make_uint4(first.x, first.y, next, last) : make_uint4(next, last, 0, 0);
}

// Writes the first `bytes` of a unit in pieces of BYTES.
template <uint32_t BYTES>
__device__ __forceinline__ void store_pieces(uint64_t address, uint32_t bytes, uint4 unit) {
    static_assert(BYTES == 8 || BYTES == 4 || BYTES == 2, "pieces that divide a unit");
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (uint32_t i = 0; i < 16 / BYTES; ++i) {
        if (BYTES * i < bytes) {
            if constexpr (BYTES == 8) {
                __stcs(at<uint2>(address) + i, make_uint2(words[2 * i], words[2 * i + 1]));
            } else if constexpr (BYTES == 4) {
                __stcs(at<uint32_t>(address) + i, words[i]);
            } else {
                __stcs(at<unsigned short>(address) + i, static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2)));
            }
        }
    }
}

// ---- Dtypes: how many elements a word of 4 bytes has, and what they are as f32. `narrow` rounds to nearest, ties to
// even. ----

template <class Pair>
__device__ __forceinline__ uint32_t pair_bits(Pair pair) {
    uint32_t bits;
    static_assert(sizeof bits == sizeof pair, "two of 16 bits");
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

struct Float {
    static constexpr uint32_t BYTES = 4, PER_WORD = 1, PER_UNIT = 4;
    static __device__ __forceinline__ void widen(uint32_t word, float (&x)[PER_WORD]) { x[0] = __uint_as_float(word); }
    static __device__ __forceinline__ uint32_t narrow(const float (&x)[PER_WORD]) { return __float_as_uint(x[0]); }
};

struct Half {
    static constexpr uint32_t BYTES = 2, PER_WORD = 2, PER_UNIT = 8;
    static __device__ __forceinline__ void widen(uint32_t word, float (&x)[PER_WORD]) {
        x[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
        x[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
    }
    static __device__ __forceinline__ uint32_t narrow(const float (&x)[PER_WORD]) {
        return pair_bits(__floats2half2_rn(x[0], x[1]));
    }
};

// The upper half of a binary32.
struct Bfloat {
    static constexpr uint32_t BYTES = 2, PER_WORD = 2, PER_UNIT = 8;
    static __device__ __forceinline__ void widen(uint32_t word, float (&x)[PER_WORD]) {
        x[0] = __uint_as_float(word << 16);
        x[1] = __uint_as_float(word & 0xffff0000u);
    }
    static __device__ __forceinline__ uint32_t narrow(const float (&x)[PER_WORD]) {
        return pair_bits(__floats2bfloat162_rn(x[0], x[1]));
    }
};

// ---- Sums over a warp. ----

// Sum of `x` over the warp, in every lane, by halves: lane i meets i xor 16, then 8, 4, 2, 1.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (uint32_t other = WARP / 2; other > 0; other /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, other);
    }
    return x;
}
