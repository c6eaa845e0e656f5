// What a user writes first: one kernel for each step of the arithmetic, an element a thread. And two that the
// laboratory needs beside them: plain reading, and the sum of cuBLAS's results over all tensors. No code of gradblend.
#include <stdint.h>
#include <string.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace {

constexpr uint32_t BLOCK = 256, WARP = 32;

template <class T>
__device__ T *at(uint64_t address) {
    return reinterpret_cast<T *>(address);
}

// Dtypes: the bits of an element, to f32 and back with one rounding.
struct F32 {
    using Bits = float;
    static __device__ float widen(Bits bits) { return bits; }
    static __device__ Bits narrow(float x) { return x; }
};

struct F16 {
    using Bits = unsigned short;
    static __device__ float widen(Bits bits) { return __half2float(__ushort_as_half(bits)); }
    static __device__ Bits narrow(float x) {
        const auto pair = __floats2half2_rn(x, x);
        Bits bits;
        memcpy(&bits, &pair, sizeof bits);
        return bits;
    }
};

struct BF16 {
    using Bits = unsigned short;
    static __device__ float widen(Bits bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
    static __device__ Bits narrow(float x) {
        const auto pair = __floats2bfloat162_rn(x, x);
        Bits bits;
        memcpy(&bits, &pair, sizeof bits);
        return bits;
    }
};

template <class D>
__device__ float get(uint64_t buffer, uint64_t i) {
    return D::widen(at<const typename D::Bits>(buffer)[i]);
}

template <class D>
__device__ void put(uint64_t buffer, uint64_t i, float value) {
    at<typename D::Bits>(buffer)[i] = D::narrow(value);
}

__device__ uint64_t index() { return static_cast<uint64_t>(blockIdx.x) * BLOCK + threadIdx.x; }

__device__ double warp_sum(double x) {
    for (uint32_t other = WARP / 2; other > 0; other /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, other);
    }
    return x;
}

__device__ double block_sum(double x) {
    __shared__ double sums[BLOCK / WARP];
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) {
        sums[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    return warp_sum(threadIdx.x < BLOCK / WARP ? sums[threadIdx.x] : 0.0);
}

// sum += <a, b>: f32 in a thread, f64 beyond.
template <class D>
__device__ void product(uint64_t a, uint64_t b, uint64_t len, uint64_t sum) {
    float own = 0.0f;
    for (uint64_t i = index(); i < len; i += static_cast<uint64_t>(gridDim.x) * BLOCK) {
        own += get<D>(a, i) * get<D>(b, i);
    }
    const double all = block_sum(own);
    if (threadIdx.x == 0) {
        atomicAdd(at<double>(sum), all);
    }
}

// sums[j] = sum_i results[i][j], a thread block for each j.
template <class D>
__device__ void total(uint64_t results, uint64_t rows, uint64_t columns, uint64_t sums) {
    double own = 0.0;
    for (uint64_t row = threadIdx.x; row < rows; row += BLOCK) {
        own += get<D>(results, row * columns + blockIdx.x);
    }
    const double all = block_sum(own);
    if (threadIdx.x == 0) {
        at<double>(sums)[blockIdx.x] = all;
    }
}

}  // namespace

#define KERNEL extern "C" __global__ void __launch_bounds__(BLOCK)

// out = t - g; out = w v; out += w v; sum += <a, b>; column sums.
#define KERNELS(name, D) \
    KERNEL difference_##name(uint64_t t, uint64_t g, uint64_t out, uint64_t len) { \
        if (index() < len) put<D>(out, index(), get<D>(t, index()) - get<D>(g, index())); \
    } \
    KERNEL scale_##name(float w, uint64_t v, uint64_t out, uint64_t len) { \
        if (index() < len) put<D>(out, index(), w * get<D>(v, index())); \
    } \
    KERNEL axpy_##name(float w, uint64_t v, uint64_t out, uint64_t len) { \
        if (index() < len) put<D>(out, index(), get<D>(out, index()) + w * get<D>(v, index())); \
    } \
    KERNEL product_##name(uint64_t a, uint64_t b, uint64_t len, uint64_t sum) { product<D>(a, b, len, sum); } \
    KERNEL total_##name(uint64_t results, uint64_t rows, uint64_t columns, uint64_t sums) { \
        total<D>(results, rows, columns, sums); \
    }
KERNELS(f32, F32)
KERNELS(f16, F16)
KERNELS(bf16, BF16)

// Reads units of 16 bytes with four loads in flight, and writes nothing unless they add up to a number that random data
// do not.
KERNEL read_units(uint64_t address, uint64_t units, uint64_t sink) {
    constexpr uint32_t LOADS = 4;
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * BLOCK;
    const uint4 *from = at<const uint4>(address);
    uint32_t sum = 0;
    uint64_t i = index();
    for (; i + (LOADS - 1) * stride < units; i += LOADS * stride) {
        uint4 unit[LOADS];
#pragma unroll
        for (uint32_t j = 0; j < LOADS; ++j) {
            unit[j] = __ldcs(from + i + j * stride);
        }
#pragma unroll
        for (uint32_t j = 0; j < LOADS; ++j) {
            sum ^= unit[j].x ^ unit[j].y ^ unit[j].z ^ unit[j].w;
        }
    }
    for (; i < units; i += stride) {
        const uint4 unit = __ldcs(from + i);
        sum ^= unit.x ^ unit.y ^ unit.z ^ unit.w;
    }
    if (sum == 0x9e3779b9u) {
        *at<uint32_t>(sink) = sum;
    }
}
