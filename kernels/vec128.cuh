// Units: 16 bytes of a buffer, the width of the widest load. Loads, stores, and the dtypes of their elements.
//
// Gradients are read once and the blend is not read again, so loads and stores are non-temporal (`cs`: evict first).
#pragma once

#include <string.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "common.cuh"

static_assert(ALIGNMENT == sizeof(uint4), "a unit is one widest load");

// ---- Whole units at addresses aligned to 16 bytes ----

__device__ __forceinline__ uint4 load_unit(uint64_t address) { return __ldcs(at<const uint4>(address)); }

// The unit at `address` if `wanted`, else zeros. On a GPU the zeros are loaded from `zeros`, 16 bytes that stay in the
// cache: nvcc turns a branch around each of several loads into moves that wait for one load before it issues the next.
__device__ __forceinline__ uint4 load_unit_if(bool wanted, uint64_t address, uint64_t zeros) {
#ifdef __CUDACC__
    return load_unit(wanted ? address : zeros);
#else
    (void)zeros;
    return wanted ? load_unit(address) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void store_unit(uint64_t address, uint4 unit) { __stcs(at<uint4>(address), unit); }

// ---- Units in pieces: for less alignment, and for the tail of a chunk ----

// The first `bytes` of a unit, in pieces of BYTES with all loads in flight at once. The rest of the unit is zero.
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

// The unit at byte `offset` of a buffer that is aligned to 2 bytes, or zeros: three words from the first aligned one
// on, and the half words that remain at the ends. Their positions are computed without a branch, so that the loads of
// other units can be in flight too.
__device__ __forceinline__ uint4 load_halves(bool wanted, uint64_t buffer, uint32_t offset) {
    // Units lie 16 bytes apart, so all units of a buffer have the same misalignment: 0 or 2 bytes from a word.
    const uint32_t odd = buffer & 2;
    const uint64_t address = buffer + offset;
    uint32_t words[3];
#pragma unroll
    for (uint32_t i = 0; i < 3; ++i) {
        words[i] = wanted ? __ldcs(at<const uint32_t>(address + odd) + i) : 0;
    }
    const uint32_t half = wanted ? __ldcs(at<const unsigned short>(address + 12 - 6 * odd)) : 0;
    const uint32_t last = wanted ? __ldcs(at<const unsigned short>(address + 14)) : 0;
    return make_uint4(__funnelshift_l(half << 16, words[0], 8 * odd), __funnelshift_l(words[0], words[1], 8 * odd),
                      __funnelshift_l(words[1], words[2], 8 * odd), (odd ? words[2] >> 16 : half) | last << 16);
}

// The first `bytes` < 16 of a unit aligned to 16 bytes, of elements of BYTES, by at most three loads. The rest is zero.
template <uint32_t BYTES>
__device__ __forceinline__ uint4 load_tail(uint64_t address, uint32_t bytes) {
    const uint2 first = bytes & 8 ? __ldcs(at<const uint2>(address)) : make_uint2(0, 0);
    const uint32_t word = bytes & 4 ? __ldcs(at<const uint32_t>(address + (bytes & 8))) : 0;
    const uint32_t half = BYTES == 2 && (bytes & 2) ? __ldcs(at<const unsigned short>(address + (bytes & 12))) : 0;
    const uint32_t next = bytes & 4 ? word : half, last = bytes & 4 ? half : 0;
    return bytes & 8 ? make_uint4(first.x, first.y, next, last) : make_uint4(next, last, 0, 0);
}

// Stores the first `bytes` of a unit in pieces of BYTES.
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

// ---- Dtypes: a 4-byte word of a unit to f32 elements, and back to nearest, ties to even ----

// The bits of two 16-bit floats.
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

// bf16 is the upper half of an f32.
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
