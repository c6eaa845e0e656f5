// CUDA C++ for a host compiler: the keywords and functions that kernels use, included before each of their sources.
//
// A CUDA thread is a fiber (threads.cpp). All fibers of a block run on one thread of the system and switch only at
// barriers and warp operations, so nothing here needs atomic instructions.
#pragma once

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
#define __noinline__ inline
// One block runs at a time, so static variables serve all blocks. threads.cpp scrambles their section.
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

// Of the fiber that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline double2 make_double2(double x, double y) { return {x, y}; }

namespace emulator {

// ---- threads.cpp ----

// A statement of a kernel; as a default argument, the caller's.
struct Location {
    const char *file;
    int line;
};
#define CALLER emulator::Location location = {__builtin_FILE(), __builtin_LINE()}

// Runs a kernel: all threads of all blocks.
void run(const char *kernel, const std::function<void()> &body, unsigned blocks, unsigned threads);
// Waits for the block.
void sync_block(const char *operation, Location location);
// Waits for the warp; returns the values of its lanes, valid until this thread's next barrier. `orders`: whether it
// orders memory accesses.
const uint64_t *sync_warp(const char *operation, Location location, unsigned mask, uint64_t value, bool orders);
// Ends the process with a message that names the kernel, the block and the thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...);
// Seeds the generator of all random choices.
void seed(uint64_t value);
// A random number below `end`.
uint32_t below(uint32_t end);
// Fills memory with garbage.
void scramble(void *memory, size_t bytes);

// ---- races.cpp ----

// The time, which barriers advance, and the last barriers that ordered memory accesses: of the block and of each warp.
struct Times {
    uint32_t now, block, warps[32];
};
inline Times times;
// The stack of the fiber that runs: no other thread's memory.
inline uintptr_t stack;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif
// Checks an access by an atomic operation.
void atomic_access(const void *memory, size_t bytes);
// Frees memory. For use between blocks: their accesses are not compared.
void forget_accesses();

// ---- Traffic ----

// Bytes of gradients that kernels loaded and stored, and bytes of other loads that bypass the first-level cache.
inline uint64_t loaded, stored, table;

template <class To, class From>
To same_bits(const From &from) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// A device faults on a misaligned access; a processor may not.
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

// From a lane that the warp lacks, a thread gets its own value.
template <class T>
T shuffle(const char *operation, Location location, unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one or two registers");
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const uint64_t *values = sync_warp(operation, location, mask, same_bits<Bits>(value), false);
    const unsigned thread = threadIdx.x - lane() + from;
    return from < warpSize && thread < blockDim.x ? same_bits<T>(static_cast<Bits>(values[from])) : value;
}

}  // namespace emulator

// ---- Barriers and warp operations ----

inline void __syncthreads(CALLER) { emulator::sync_block("__syncthreads", location); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CALLER) {
    emulator::sync_warp("__syncwarp", location, mask, 0, true);
}
// Blocks run one after the other, so there is nothing to order.
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, CALLER) {
    return emulator::shuffle("__shfl_xor_sync", location, mask, value, emulator::lane() ^ static_cast<unsigned>(other));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, CALLER) {
    return emulator::shuffle("__shfl_sync", location, mask, value, static_cast<unsigned>(from));
}
inline unsigned __ballot_sync(unsigned mask, int value, CALLER) {
    const uint64_t *values = emulator::sync_warp("__ballot_sync", location, mask, value != 0, false);
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < warpSize; ++lane) {
        ballot |= static_cast<unsigned>(values[lane]) << lane;
    }
    return ballot;
}
inline int __any_sync(unsigned mask, int value, CALLER) { return __ballot_sync(mask, value, location) != 0; }

// ---- Memory ----

template <class T>
T __ldcs(const T *from) {
    return emulator::load("__ldcs", from, emulator::loaded);
}
template <class T>
T __ldcg(const T *from) {
    return emulator::load("__ldcg", from, emulator::table);
}
// T is deduced from `to` alone, so that a literal converts, as on a device.
template <class T>
void __stcs(T *to, const std::common_type_t<T> &value) {
    emulator::store("__stcs", to, value, emulator::stored);
}
// Not inlined: the compiler instruments an instruction by the attributes of the function that it is in.
#define NOT_INSTRUMENTED __attribute__((noinline, no_sanitize("thread")))
NOT_INSTRUMENTED inline double atomicAdd(double *at, double value) {
    emulator::atomic_access(at, sizeof *at);
    const double old = *at;
    *at = old + value;
    return old;
}
// Counts up to `last`, then wraps to 0.
NOT_INSTRUMENTED inline unsigned atomicInc(unsigned *at, unsigned last) {
    emulator::atomic_access(at, sizeof *at);
    const unsigned old = *at;
    *at = old >= last ? 0 : old + 1;
    return old;
}

// ---- Numbers ----

inline unsigned __float_as_uint(float x) { return emulator::same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned bits) { return emulator::same_bits<float>(bits); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

struct __half {
    unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

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

// To nearest, ties to even. A NaN becomes a device's NaN.
inline __half __float2half_rn(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {0x7fff};
    }
    unsigned half;
    if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;  // 65,520 and more round to infinity
    } else if (magnitude < 0x38800000u) {
        // Subnormal: the last bit of the sum with 0.5 is worth 2^-24, as that of the result.
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

// The upper half of an f32.
struct __nv_bfloat16 {
    unsigned short bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
// To nearest, ties to even. A NaN becomes a device's NaN.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    // Adding 0x7fff, and 1 more if the last kept bit is odd, carries into the upper half exactly where it rounds up.
    return {static_cast<unsigned short>(x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fff)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
