// What all kernels share: the records of src/abi.rs, addresses as pointers, and the sum over a warp.
//
// The sources are CUDA C++ without inline PTX, so that a host compiler with tests/emulator/cuda.hpp compiles them too.
#pragma once

#include "abi.cuh"

constexpr uint32_t WARP = 32;                         // threads of a warp
constexpr uint32_t WARPS = THREADS_PER_BLOCK / WARP;  // warps of a thread block

// The pointer for an address of a record.
template <class T>
__device__ __forceinline__ T *at(uint64_t address) {
    return reinterpret_cast<T *>(address);
}

// The sum of `x` over the warp, in every lane: a butterfly over lane distances 16, 8, 4, 2, 1.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (uint32_t distance = WARP / 2; distance > 0; distance /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    }
    return x;
}

// The largest x of the warp, in every lane.
__device__ __forceinline__ double warp_largest(double x) {
#pragma unroll
    for (uint32_t distance = WARP / 2; distance > 0; distance /= 2) {
        const double other = __shfl_xor_sync(0xffffffffu, x, distance);
        x = other > x ? other : x;
    }
    return x;
}

// x of one lane, in every lane.
template <class T>
__device__ __forceinline__ T broadcast(T x, uint32_t lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
