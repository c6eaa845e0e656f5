// Partial sums: of a warp's lanes, of a span's warps, and of all spans. In f64 and in a fixed order.
#pragma once

#include "moments.cuh"
#include "tile.cuh"

// Shared memory of a grid's last thread block.
struct FinalStorage {
    double sums[2 * THREADS_PER_BLOCK];  // of each thread, for two products
    uint32_t is_last;
    ObservationStorage observation;
};

// Adds the products of a warp's lanes, and stores them for `count` modalities of the group that starts at `first`.
// `warp_sums` has K sums c, then K sums d.
template <int N>
__device__ __forceinline__ void store_warp_sums(const ChunkDescriptor &chunk, const Products<N> &products, int first,
                                                int count, uint32_t modalities, volatile double *warp_sums) {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < N; ++n) {
        if (n < count) {
            const double c = warp_sum(static_cast<double>(products.c[0][n]) + static_cast<double>(products.c[1][n]));
            const double d = warp_sum(static_cast<double>(products.d[0][n]) + static_cast<double>(products.d[1][n]));
            if (threadIdx.x % WARP == 0) {
                const uint32_t modality = at<const uint32_t>(chunk.modality_indices)[first + n];
                warp_sums[modality] = c;
                warp_sums[modalities + modality] = d;
            }
        }
    }
}

// Adds the partial sums of all spans in an order that depends on K alone, and adds the totals to the pending sums.
__device__ __forceinline__ void reduce_partials(const TableArgs &table, const BlenderArgs &blender,
                                                FinalStorage &storage, LoadedState &loaded) {
    const uint32_t modalities = blender.modalities, products = 2 * modalities, thread = threadIdx.x;
    // Each thread adds two products of every `stride`-th span.
    const uint32_t stride = THREADS_PER_BLOCK / modalities, pair = thread % modalities, start = thread / modalities;
    const uint32_t spans = static_cast<uint32_t>(table.count);
    double2 sum = {0.0, 0.0};
    for (uint32_t first = start; start < stride && first < spans; first += PARTIALS_IN_FLIGHT * stride) {
        const double2 *from = at<const double2>(table.partials) + static_cast<uint64_t>(first) * modalities + pair;
        double2 partial[PARTIALS_IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < PARTIALS_IN_FLIGHT; ++i) {
            partial[i] = first + i * stride < spans ? __ldcg(from) : make_double2(0.0, 0.0);
            from += stride * modalities;
        }
#pragma unroll
        for (uint32_t i = 0; i < PARTIALS_IN_FLIGHT; ++i) {
            sum.x += partial[i].x;
            sum.y += partial[i].y;
        }
    }
    storage.sums[2 * thread] = sum.x;
    storage.sums[2 * thread + 1] = sum.y;
    __syncthreads();
    for (uint32_t product = thread / WARP; product < products; product += WARPS) {
        double total = 0.0;
        for (uint32_t i = thread % WARP; i < stride; i += WARP) {
            total += storage.sums[i * products + product];
        }
        total = warp_sum(total);
        if (thread % WARP == 0) {
            storage.observation.pending[product] = total;
        }
    }
    __syncthreads();
    if (thread < products) {
        loaded.pending += storage.observation.pending[thread];
        at<State>(blender.state)->pending[thread] = loaded.pending;
    }
}

// Whether this thread block is the last of the grid to increment `finished`. That one sees the partial sums of all others.
__device__ __forceinline__ bool is_last_block(const BlenderArgs &blender, FinalStorage &storage) {
    Progress *progress = at<Progress>(blender.progress);
    // Each thread's fence makes its own partial sums visible before the barrier, so the ticket after it counts for all.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        // The last ticket wraps the counter to zero, ready for the next launch.
        storage.is_last = atomicInc(&progress->finished, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!storage.is_last) {
        return false;
    }
    __threadfence();
    if (threadIdx.x == 0) {
        // No thread block claims a span any more; zero for the next launch.
        progress->claimed = 0;
    }
    return true;
}

// Ends a pass: the last thread block adds up the partial sums, and observes if the pass asks for it. Not inlined, so that
// none of its values takes a register while tiles are processed: inlined, it makes dot_blend spill on sm_100.
template <bool DOTS>
__device__ __noinline__ void finalize_grid(const TableArgs &table, const BlenderArgs &blender,
                                              const ObservationArgs &observation, uint32_t what,
                                              FinalStorage &storage) {
    if (!is_last_block(blender, storage) || !(DOTS || (what & OBSERVE))) {
        return;
    }
    LoadedState loaded = load_state(blender, observation);
    if (DOTS) {
        reduce_partials(table, blender, storage, loaded);
    }
    if (what & OBSERVE) {
        observe_and_reweight(blender, loaded, storage.observation);
    }
}
