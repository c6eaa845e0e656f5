// From partial sums to moments: what the last block of a pass does, and `observe` by itself.
//
// All of it in f64, each operation in the order of src/moments.rs, so that both backends come to the same bits from the
// same pending sums.
#pragma once

#include "solve.cuh"

// Modalities that are in registers together. More of them are taken in tiles of as many, for each of which t and g are
// read again.
constexpr int TILE = 8;
// Lists of a tile, and their places.
constexpr int TRAIN = 0, VALID = 1, BLENDED = 2, MODALITY = 3, LISTS = MODALITY + TILE;

// A chunk as the warp sees it that takes it, alone or with all others. It lies in shared memory, and is volatile so that
// the compiler does not copy it into registers, which the gradients need.
struct Work {
    volatile double sums[2 * MAX_MODALITIES];  // of this warp: K of c, then K of d
    volatile uint64_t lists[LISTS];            // addresses of the chunk's first element: t, g, blend, the tile's modalities
    volatile uint64_t modalities;              // table: where the lists of the tensor start, present ones first
    volatile uint64_t indices;                 // table: which modalities they are
    volatile uint64_t offset;                  // bytes from the start of each list to the chunk
    volatile float weights[TILE];              // of the tile's modalities
    volatile uint32_t len, alignment, present;
    volatile uint32_t threads;                 // that share the chunk
    volatile uint32_t what;                    // DOT, BLEND and ACCUMULATE as far as the tensor takes part
};

// Shared memory of a block.
struct Shared {
    Work work[WARPS];
    float weights[MAX_MODALITIES];
    double shares[2 * THREADS_PER_BLOCK];  // of each thread, of two partial sums
    double pending[2 * MAX_MODALITIES];
    double c[MAX_MODALITIES], d[MAX_MODALITIES];
    double keep, add;
    uint32_t last, entered;
    volatile uint32_t span, next;  // the one that the block is at, and the one that it has taken after it
    Solver solver;
};

// What an observation starts from, read at once and before anything is waited for: each thread has its part of the moments.
constexpr uint32_t PART = MAX_MODALITIES * MAX_MODALITIES / THREADS_PER_BLOCK;
static_assert(PART * THREADS_PER_BLOCK == MAX_MODALITIES * MAX_MODALITIES && THREADS_PER_BLOCK >= 2 * MAX_MODALITIES, "a part for each thread");
struct Before {
    double pending, mean, second_moment[PART];
    double normaliser;
    uint64_t observed, skipped;
    uint32_t flags;
    float scale;
};

__device__ __forceinline__ Before look_back(const BlenderArgs &blender, const ObservationArgs &observation) {
    const uint32_t modalities = blender.modalities, thread = threadIdx.x;
    const State *state = at<const State>(blender.state);
    Before before;
    before.pending = thread < 2 * modalities ? state->pending[thread] : 0.0;
    before.mean = thread < modalities ? state->mean[thread] : 0.0;
#pragma unroll
    for (uint32_t part = 0; part < PART; ++part) {
        const uint32_t i = thread + part * THREADS_PER_BLOCK;
        before.second_moment[part] = i < modalities * modalities ? state->second_moment[i] : 0.0;
    }
    before.normaliser = state->normaliser;
    before.observed = state->observed;
    before.skipped = state->skipped;
    before.flags = state->flags;
    before.scale = observation.scale_address != 0 ? *at<const float>(observation.scale_address) : observation.scale;
    return before;
}

// Adds up the partial sums of all spans, in an order that depends on K alone, and adds them to the pending sums.
__device__ __forceinline__ void fold(const TableArgs &table, const BlenderArgs &blender, Shared &shared, Before &before) {
    const uint32_t modalities = blender.modalities, products = 2 * modalities, thread = threadIdx.x;
    // A thread takes two products, of every so many spans.
    const uint32_t shares = THREADS_PER_BLOCK / modalities, pair = thread % modalities, share = thread / modalities;
    const uint32_t count = static_cast<uint32_t>(table.count);
    double2 sum = {0.0, 0.0};
    for (uint32_t first = share; share < shares && first < count; first += PARTIALS_IN_FLIGHT * shares) {
        const double2 *from = at<const double2>(table.partials) + static_cast<uint64_t>(first) * modalities + pair;
        double2 partial[PARTIALS_IN_FLIGHT];
#pragma unroll
        for (uint32_t i = 0; i < PARTIALS_IN_FLIGHT; ++i) {
            partial[i] = first + i * shares < count ? __ldcg(from) : make_double2(0.0, 0.0);
            from += shares * modalities;
        }
#pragma unroll
        for (uint32_t i = 0; i < PARTIALS_IN_FLIGHT; ++i) {
            sum.x += partial[i].x;
            sum.y += partial[i].y;
        }
    }
    shared.shares[2 * thread] = sum.x;
    shared.shares[2 * thread + 1] = sum.y;
    __syncthreads();
    for (uint32_t product = thread / WARP; product < products; product += WARPS) {
        double total = 0.0;
        for (uint32_t s = thread % WARP; s < shares; s += WARP) {
            total += shared.shares[s * products + product];
        }
        total = warp_sum(total);
        if (thread % WARP == 0) {
            shared.pending[product] = total;
        }
    }
    __syncthreads();
    if (thread < products) {
        before.pending += shared.pending[thread];
        at<State>(blender.state)->pending[thread] = before.pending;
    }
}

// Closes the pending sums as one observation; says whether it entered the moments.
__device__ __forceinline__ bool close(const BlenderArgs &blender, Shared &shared, const Before &before) {
    const uint32_t modalities = blender.modalities, thread = threadIdx.x;
    State *state = at<State>(blender.state);
    if (thread < 2 * modalities) {
        shared.pending[thread] = before.pending;
    }
    __syncthreads();
    if (thread < WARP) {
        // Dividing by infinity would make zeros of anything.
        const bool usable = is_finite(before.scale);
        const double scale = static_cast<double>(before.scale) * static_cast<double>(before.scale);
        double c = 0.0, d = 0.0;
        bool bad = false;
        if (thread < modalities) {
            c = shared.pending[thread] / scale;
            d = shared.pending[modalities + thread] / scale;
            bad = !usable || !is_finite(c) || !is_finite(d * d);
        }
        shared.c[thread] = c;
        shared.d[thread] = d;
        const uint32_t nonfinite = __ballot_sync(0xffffffffu, bad);
        if (thread == 0) {
            state->nonfinite = nonfinite;
            state->flags = (before.flags & ~NONFINITE) | (nonfinite != 0 ? NONFINITE : 0);
            if (nonfinite != 0) {
                state->skipped = before.skipped + (before.skipped != UINT64_MAX);
            } else {
                const uint64_t observed = before.observed + (before.observed != UINT64_MAX);
                const double n = static_cast<double>(observed);
                const bool ema = blender.average == EMA;
                shared.keep = ema ? blender.decay : static_cast<double>(observed - 1) / n;
                // 1 - (n - 1) / n would round; 1 / n is nearer.
                shared.add = ema ? 1.0 - blender.decay : 1.0 / n;
                state->observed = observed;
                state->normaliser = ema ? shared.keep * before.normaliser + shared.add : 1.0;
            }
            shared.entered = nonfinite == 0;
        }
    }
    __syncthreads();
    for (uint32_t i = thread; i < 2 * MAX_MODALITIES; i += THREADS_PER_BLOCK) {
        state->pending[i] = 0.0;
    }
    if (shared.entered) {
        const double keep = shared.keep, add = shared.add;
        if (thread < modalities) {
            state->mean[thread] = keep * before.mean + add * shared.c[thread];
        }
#pragma unroll
        for (uint32_t part = 0; part < PART; ++part) {
            const uint32_t i = thread + part * THREADS_PER_BLOCK;
            if (i < modalities * modalities) {
                const double square = shared.d[i / modalities] * shared.d[i % modalities];
                state->second_moment[i] = keep * before.second_moment[part] + add * square;
            }
        }
    }
    __syncthreads();
    return shared.entered;
}

// Closes the pending sums, and reweights if the cadence says so.
__device__ __forceinline__ void observe(const BlenderArgs &blender, Shared &shared, const Before &before) {
    if (close(blender, shared, before) && blender.cadence == EVERY_OBSERVATION && threadIdx.x < WARP) {
        reweight(blender, shared.solver);
    }
}

// What follows the last span of a pass. The block that is done last sees the partial sums of all.
template <bool DOTS>
__device__ __forceinline__ void finish(const TableArgs &table, const BlenderArgs &blender,
                                       const ObservationArgs &observation, uint32_t what, Shared &shared) {
    Progress *progress = at<Progress>(blender.progress);
    // Each thread makes its own partial sums visible before the barrier, so the ticket that follows it speaks for all.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        // Wraps to zero at the last ticket: ready for the next blender.
        shared.last = atomicInc(&progress->finished, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!shared.last) {
        return;
    }
    __threadfence();
    if (threadIdx.x == 0) {
        // So is this: nobody asks for a span any more.
        progress->claimed = 0;
    }
    if (DOTS || (what & OBSERVE)) {
        Before before = look_back(blender, observation);
        if (DOTS) {
            fold(table, blender, shared, before);
        }
        if (what & OBSERVE) {
            observe(blender, shared, before);
        }
    }
}
