// dot, blend, and both at once: one pass over memory that reads each element of each gradient once.
//
// A persistent grid: each thread block processes spans until none is left. Which block gets a span depends on timing;
// the span's partial sum does not. A span is one chunk that all warps of the block share, or up to WARPS small chunks,
// one for each warp. A chunk is read in units of 16 bytes.
//
// Of the n threads that share a chunk, thread i owns units i, i + n, i + 2n, ... and has two accumulators for each
// product: one for the first halves of its units, one for the second halves. So the accumulator of an element follows
// from its position in the chunk and the chunk's length; alignment changes the width of loads and nothing else. An
// accumulator adds at most 128 elements: with the rounding of t - g these are 129 roundings of 2^-24, half of the
// guaranteed 2^-16. All further sums are f64: the two of a thread, the lanes of a warp, the warps of a block, and last
// the spans, added by the thread block that finishes last (partials.cuh).

#include "partials.cuh"

static_assert(CHUNK <= 128 * 2 * THREADS_PER_BLOCK && WARP_CHUNK <= 128 * 2 * WARP, "128 elements an accumulator");

// Shared memory of a warp.
struct WarpStorage {
    ChunkDescriptor chunk;
    volatile double sums[2 * MAX_MODALITIES];  // of the warp's chunk: K of c, then K of d
};

// Shared memory of a thread block.
struct PassStorage {
    WarpStorage warps[WARPS];
    float weights[MAX_MODALITIES];
    volatile uint32_t span, next_span;
    volatile uint32_t modalities;  // K. What is computed from it takes no register while tiles are processed.
    FinalStorage final;
};

// Processes the group of N modalities that starts at `first`: sums of its products, and where `first` is 0 the blend of
// all modalities. GUARD: a tensor with 5 or more modalities, whose group need not have all N.
template <class T, int N, bool DOTS, bool BLENDS, bool GUARD>
__device__ __forceinline__ void process_group(WarpStorage &warp, const float *weights, uint64_t zeros,
                                              const volatile uint32_t &modalities, uint32_t first) {
    constexpr int UNITS = units_per_thread(DOTS ? 2 + N : N);
    ChunkDescriptor &chunk = warp.chunk;
    const bool dots = DOTS && (!BLENDS || (chunk.what & DOT));
    const bool blends = BLENDS && (!DOTS || (chunk.what & BLEND)) && (!GUARD || first == 0);
    const bool adds = blends && (chunk.what & ACCUMULATE);
    const int left = static_cast<int>(chunk.present - first), count = GUARD && left < N ? left : N;
    if (GUARD && dots && chunk.present > TILE_MODALITIES) {
        load_group<BLENDS>(chunk, weights, first);
    }
    const TileLoads loads = {dots, adds, count};
    Products<N> products = {};
    for (uint32_t element = threadIdx.x % chunk.threads * T::PER_UNIT; element < chunk.len;
         element += UNITS * chunk.threads * T::PER_UNIT) {
        Tile<N, UNITS> tile = {};
        load_tile<T, GUARD>(chunk, loads, zeros, element, tile);
        accumulate<T, DOTS, BLENDS>(chunk, weights, blends, tile, products);
        if (blends) {
            store_tile<T>(chunk, tile);
        }
    }
    if (dots) {
        store_warp_sums(chunk, products, first, count, modalities, warp.sums);
    }
}

// The blend of no modality: zeros.
template <class T>
__device__ __forceinline__ void clear_blended(const ChunkDescriptor &chunk) {
    const uint32_t len = chunk.len, threads = chunk.threads;
    for (uint32_t first = threadIdx.x % threads * T::PER_UNIT; first < len; first += threads * T::PER_UNIT) {
        const uint32_t left = len - first, count = left < T::PER_UNIT ? left : T::PER_UNIT;
        store_blended<T>(chunk, first * T::BYTES, count, make_uint4(0, 0, 0, 0));
    }
}

// Processes a chunk by an unrolled body for the number of modalities present.
template <class T, bool DOTS, bool BLENDS>
__device__ __forceinline__ void process_chunk(WarpStorage &warp, const float *weights, uint64_t zeros,
                                              const volatile uint32_t &modalities) {
    // The first group comes last: it stores the blend, perhaps over a gradient that the other groups read.
    uint32_t group = DOTS && (warp.chunk.what & DOT) ? (warp.chunk.present - 1) / TILE_MODALITIES : 0;
    for (;; --group) {
        switch (group > 0 ? TILE_MODALITIES : warp.chunk.present) {
            case 0:
                if (BLENDS) {
                    clear_blended<T>(warp.chunk);
                }
                break;
            case 1: process_group<T, 1, DOTS, BLENDS, false>(warp, weights, zeros, modalities, 0); break;
            case 2: process_group<T, 2, DOTS, BLENDS, false>(warp, weights, zeros, modalities, 0); break;
            case 3: process_group<T, 3, DOTS, BLENDS, false>(warp, weights, zeros, modalities, 0); break;
            case 4: process_group<T, 4, DOTS, BLENDS, false>(warp, weights, zeros, modalities, 0); break;
            default:
                process_group<T, TILE_MODALITIES, DOTS, BLENDS, true>(warp, weights, zeros, modalities,
                                                                      group * TILE_MODALITIES);
        }
        if (group == 0) {
            return;
        }
    }
}

template <bool DOTS, bool BLENDS>
__device__ __forceinline__ void pass(const TableArgs &table, const BlenderArgs &blender,
                                     const ObservationArgs &observation, uint32_t what, PassStorage &storage) {
    const uint32_t thread = threadIdx.x, modalities = blender.modalities;
    if (BLENDS && thread < modalities) {
        storage.weights[thread] = at<State>(blender.state)->weights_f32[thread];
    }
    for (uint32_t w = 0; DOTS && w < WARPS && thread < 2 * MAX_MODALITIES; ++w) {
        storage.warps[w].sums[thread] = 0.0;
    }
    if (thread == 0) {
        storage.span = blockIdx.x;
        storage.modalities = modalities;
    }
    __syncthreads();
    // A plan has at most 2^31 spans.
    while (storage.span < table.count) {
        WarpStorage &warp = storage.warps[thread / WARP];
        uint32_t claimed = 0;
        if (thread == 0) {
            // Issued early and used late: the answer arrives while the chunk's descriptor is loaded.
            claimed = atomicInc(&at<Progress>(blender.progress)->claimed, UINT32_MAX);
        }
        const Span span = at<const Span>(table.spans)[storage.span];
        // All warps share a chunk that is alone in its span.
        const bool shared = span.end - span.first == 1;
        const uint32_t index = shared ? span.first : span.first + thread / WARP;
        uint32_t dtype = F32;
        const uint32_t threads = shared ? THREADS_PER_BLOCK : WARP;
        const bool works = index < span.end && load_chunk<DOTS, BLENDS>(table, storage.modalities, what, index, threads,
                                                                        storage.weights, dtype, warp.chunk);
        if (thread == 0) {
            storage.next_span = gridDim.x + claimed;
        }
        if (works) {
            if (dtype == F32) {
                process_chunk<Float, DOTS, BLENDS>(warp, storage.weights, blender.zeros, storage.modalities);
            } else if (dtype == F16) {
                process_chunk<Half, DOTS, BLENDS>(warp, storage.weights, blender.zeros, storage.modalities);
            } else {
                process_chunk<Bfloat, DOTS, BLENDS>(warp, storage.weights, blender.zeros, storage.modalities);
            }
        }
        __syncwarp();
        const uint32_t partial = storage.span;
        // All warps have finished their chunks: their sums are complete, and their storage can be reused.
        __syncthreads();
        if (thread == 0) {
            storage.span = storage.next_span;
        }
        const uint32_t k = storage.modalities;
        if (DOTS && thread < 2 * k) {
            double sum = 0.0;
            for (uint32_t w = 0; w < WARPS; ++w) {
                sum += storage.warps[w].sums[thread];
                // A warp stores no sum for a modality that the tensor of its next chunk lacks.
                storage.warps[w].sums[thread] = 0.0;
            }
            // In this order, no 64-bit factor stays in registers while tiles are processed.
            at<double>(table.partials)[2 * (static_cast<uint64_t>(partial) * k) + thread] = sum;
        }
        __syncthreads();
    }
    finalize_grid<DOTS>(table, blender, observation, what, storage.final);
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, MIN_BLOCKS_PER_SM)
    dot(const __grid_constant__ TableArgs table, const __grid_constant__ BlenderArgs blender,
        const __grid_constant__ ObservationArgs observation, uint32_t what) {
    __shared__ PassStorage storage;
    pass<true, false>(table, blender, observation, what, storage);
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, MIN_BLOCKS_PER_SM)
    blend(const __grid_constant__ TableArgs table, const __grid_constant__ BlenderArgs blender,
          const __grid_constant__ ObservationArgs observation, uint32_t what) {
    __shared__ PassStorage storage;
    pass<false, true>(table, blender, observation, what, storage);
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, MIN_BLOCKS_PER_SM)
    dot_blend(const __grid_constant__ TableArgs table, const __grid_constant__ BlenderArgs blender,
              const __grid_constant__ ObservationArgs observation, uint32_t what) {
    __shared__ PassStorage storage;
    pass<true, true>(table, blender, observation, what, storage);
}
