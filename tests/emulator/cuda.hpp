// CUDA C++ for a host compiler: the words that kernels/ uses, included before each of its sources.
//
// A CUDA thread is a fiber (threads.cpp). All fibers of a block share one thread of the system, and change only at a
// barrier or a warp operation, so nothing here needs atomic instructions.
#pragma once

// Before the macros below: `__noinline__` is a word of the standard library's too.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
// One block runs at a time, so a static serves all of them. Having a section of their own lets threads.cpp scramble it.
#define __shared__ static __attribute__((section("shared_memory")))

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) double2 {
    double x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
using dim3 = uint3;

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Those of the fiber that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline double2 make_double2(double x, double y) { return {x, y}; }

namespace standin {

// ---- threads.cpp ----

// A statement of a kernel. As a default argument it is that of the call.
struct Place {
    const char *file;
    int line;
};
#define STANDIN_HERE standin::Place place = {__builtin_FILE(), __builtin_LINE()}

// Runs a kernel: all threads of all blocks.
void run(const char *kernel, const std::function<void()> &body, unsigned blocks, unsigned threads);
// Waits for the block; says whether any thread brought a value other than 0.
bool meet_block(const char *operation, Place place, bool value);
// Waits for the warp; the values of its lanes, valid until this thread's next meeting.
const uint64_t *meet_warp(const char *operation, Place place, unsigned mask, uint64_t value);
// Ends the process, saying which thread of what did wrong.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...);
// Starts the generator of every random choice anew.
void seed(uint64_t value);
// A random number below `end`.
uint32_t below(uint32_t end);
// Fills memory with garbage.
void scramble(void *memory, size_t bytes);

// ---- Traffic ----

// Bytes of gradients that kernels loaded and stored, and of everything else that passes by the first-level cache.
inline uint64_t loaded, stored, table;

template <class To, class From>
To same_bits(const From &from) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// A device faults where a processor does not care.
template <class T>
void check_alignment(const char *operation, const T *address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
        fail("%s of %zu bytes at %p, which is not aligned", operation, sizeof(T), static_cast<const void *>(address));
    }
}

template <class T>
T load(const char *operation, const T *from, uint64_t &counter) {
    check_alignment(operation, from);
    counter += sizeof(T);
    return *from;
}

template <class T>
void store(const char *operation, T *to, const T &value, uint64_t &counter) {
    check_alignment(operation, to);
    counter += sizeof(T);
    *to = value;
}

// ---- Warps ----

inline unsigned lane() { return threadIdx.x % warpSize; }

// A lane outside the warp, or that a short warp lacks, gives a thread its own value back.
template <class T>
T shuffle(const char *operation, Place place, unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one or two registers");
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const uint64_t *values = meet_warp(operation, place, mask, same_bits<Bits>(value));
    const unsigned thread = threadIdx.x - lane() + from;
    return from < warpSize && thread < blockDim.x ? same_bits<T>(static_cast<Bits>(values[from])) : value;
}

}  // namespace standin

// ---- Barriers and warp operations ----

inline void __syncthreads(STANDIN_HERE) { standin::meet_block("__syncthreads", place, false); }
inline int __syncthreads_or(int value, STANDIN_HERE) { return standin::meet_block("__syncthreads_or", place, value); }
inline void __syncwarp(unsigned mask = 0xffffffffu, STANDIN_HERE) {
    standin::meet_warp("__syncwarp", place, mask, 0);
}
// Other blocks run before or after this one: nothing of theirs is under way.
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, STANDIN_HERE) {
    return standin::shuffle("__shfl_sync", place, mask, value, static_cast<unsigned>(from) % warpSize);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, STANDIN_HERE) {
    return standin::shuffle("__shfl_xor_sync", place, mask, value, standin::lane() ^ static_cast<unsigned>(other));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned below, STANDIN_HERE) {
    return standin::shuffle("__shfl_down_sync", place, mask, value, standin::lane() + below);
}
inline unsigned __ballot_sync(unsigned mask, int value, STANDIN_HERE) {
    const uint64_t *values = standin::meet_warp("__ballot_sync", place, mask, value != 0);
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < warpSize; ++lane) {
        ballot |= static_cast<unsigned>(values[lane]) << lane;
    }
    return ballot;
}
inline int __any_sync(unsigned mask, int value, STANDIN_HERE) {
    const uint64_t *values = standin::meet_warp("__any_sync", place, mask, value != 0);
    int any = 0;
    for (unsigned lane = 0; lane < warpSize; ++lane) {
        any |= static_cast<int>(values[lane]);
    }
    return any;
}
[[noreturn]] inline void __trap() { standin::fail("__trap"); }

// ---- Memory ----

template <class T>
T __ldcs(const T *from) {
    return standin::load("__ldcs", from, standin::loaded);
}
template <class T>
T __ldcg(const T *from) {
    return standin::load("__ldcg", from, standin::table);
}
template <class T>
T __ldg(const T *from) {
    return standin::load("__ldg", from, standin::table);
}
// `value` is no part of what decides T: a literal converts, as it does on a device.
template <class T>
void __stcs(T *to, const std::common_type_t<T> &value) {
    standin::store("__stcs", to, value, standin::stored);
}
template <class T>
void __stcg(T *to, const std::common_type_t<T> &value) {
    standin::store("__stcg", to, value, standin::table);
}

inline unsigned atomicAdd(unsigned *at, unsigned value) {
    const unsigned old = *at;
    *at = old + value;
    return old;
}
inline double atomicAdd(double *at, double value) {
    const double old = *at;
    *at = old + value;
    return old;
}
inline unsigned atomicOr(unsigned *at, unsigned value) {
    const unsigned old = *at;
    *at = old | value;
    return old;
}
// Counts up to `last`, then starts at 0 again.
inline unsigned atomicInc(unsigned *at, unsigned last) {
    const unsigned old = *at;
    *at = old >= last ? 0 : old + 1;
    return old;
}

// ---- Numbers ----

inline unsigned __float_as_uint(float x) { return standin::same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned bits) { return standin::same_bits<float>(bits); }
inline long long __double_as_longlong(double x) { return standin::same_bits<long long>(x); }
inline double __longlong_as_double(long long bits) { return standin::same_bits<double>(bits); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

struct __half {
    unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
    const unsigned sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {
        return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    }
    if (magnitude < 0x400u) {
        // Subnormal: a multiple of 2^-24, which is exact.
        const float small = static_cast<float>(magnitude) * 0x1p-24f;
        return sign ? -small : small;
    }
    return __uint_as_float(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

// To nearest, ties to even. A NaN becomes the one that a device makes of it.
inline __half __float2half_rn(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {0x7fff};
    }
    unsigned half;
    if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;  // 65,520 and more are nearer to 2^16 than to the largest number there is, or at a tie with it
    } else if (magnitude < 0x38800000u) {
        // Subnormal. The sum with 0.5 has a last bit worth 2^-24, so this addition rounds where it should.
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    return {static_cast<unsigned short>(sign | half)};
}

struct __half2 {
    __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

// The upper half of a binary32.
struct __nv_bfloat16 {
    unsigned short bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
// To nearest, ties to even. A NaN becomes the one that a device makes of it.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    // Adding 0x7fff, and 1 more where the last bit kept is odd, carries into the upper half exactly when it must be
    // rounded up.
    return {static_cast<unsigned short>(x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fff)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
