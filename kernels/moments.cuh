// From pending sums to moments, by one thread block.
//
// All in f64, each operation in the order of src/state.rs, so that both backends compute the same bits from the same
// pending sums.
#pragma once

#include "solve.cuh"

// Shared memory of an observation.
struct ObservationStorage {
    double pending[2 * MAX_MODALITIES];
    double c[MAX_MODALITIES], d[MAX_MODALITIES];
    double keep, add;  // factors of a running mean: mean = keep * mean + add * new
    uint32_t entered;  // whether the observation entered the moments
    SolveStorage solve;
};

// Elements of the second moment of a thread.
constexpr uint32_t ELEMENTS = MAX_MODALITIES * MAX_MODALITIES / THREADS_PER_BLOCK;
static_assert(ELEMENTS * THREADS_PER_BLOCK == MAX_MODALITIES * MAX_MODALITIES,
              "the threads share the second moment evenly");
static_assert(THREADS_PER_BLOCK >= 2 * MAX_MODALITIES, "a thread for each pending sum");

// What an observation reads: of arrays, a thread has its elements.
struct LoadedState {
    double pending, mean, mean_square, second_moment[ELEMENTS];
    double normaliser;
    uint64_t observed, skipped;
    uint32_t flags;
    float scale;
};

// Issues all loads of an observation at once, before anything waits.
__device__ __forceinline__ LoadedState load_state(const BlenderArgs &blender, const ObservationArgs &observation) {
    const uint32_t modalities = blender.modalities, thread = threadIdx.x;
    const State *state = at<const State>(blender.state);
    LoadedState loaded;
    loaded.pending = thread < 2 * modalities ? state->pending[thread] : 0.0;
    loaded.mean = thread < modalities ? state->mean[thread] : 0.0;
    loaded.mean_square = thread < modalities ? state->mean_square[thread] : 0.0;
#pragma unroll
    for (uint32_t element = 0; element < ELEMENTS; ++element) {
        const uint32_t i = thread + element * THREADS_PER_BLOCK;
        loaded.second_moment[element] = i < modalities * modalities ? state->second_moment[i] : 0.0;
    }
    loaded.normaliser = state->normaliser;
    loaded.observed = state->observed;
    loaded.skipped = state->skipped;
    loaded.flags = state->flags;
    loaded.scale = observation.scale_address != 0 ? *at<const float>(observation.scale_address) : observation.scale;
    return loaded;
}

// Divides the pending sums by the squared gradient scale, checks that they are finite, and counts the observation as
// observed or skipped. For one warp.
__device__ __forceinline__ void count_observation(const BlenderArgs &blender, const LoadedState &loaded,
                                                  ObservationStorage &storage) {
    const uint32_t modalities = blender.modalities, lane = threadIdx.x;
    State *state = at<State>(blender.state);
    // A quotient by infinity is 0, so an infinite scale must be checked by itself.
    const bool usable = is_finite(loaded.scale);
    const double scale = static_cast<double>(loaded.scale) * static_cast<double>(loaded.scale);
    double c = 0.0, d = 0.0;
    bool bad = false;
    if (lane < modalities) {
        c = storage.pending[lane] / scale;
        d = storage.pending[modalities + lane] / scale;
        bad = !usable || !is_finite(c) || !is_finite(d * d);
    }
    storage.c[lane] = c;
    storage.d[lane] = d;
    const uint32_t nonfinite = __ballot_sync(0xffffffffu, bad);
    if (lane != 0) {
        return;
    }
    state->nonfinite = nonfinite;
    state->flags = (loaded.flags & ~NONFINITE) | (nonfinite != 0 ? NONFINITE : 0);
    storage.entered = nonfinite == 0;
    if (nonfinite != 0) {
        state->skipped = loaded.skipped + (loaded.skipped != UINT64_MAX);
        return;
    }
    const uint64_t observed = loaded.observed + (loaded.observed != UINT64_MAX);
    const double n = static_cast<double>(observed);
    const bool ema = blender.average == EMA;
    storage.keep = ema ? blender.decay : static_cast<double>(observed - 1) / n;
    // 1 / n has one rounding; 1 - (n - 1) / n has two.
    storage.add = ema ? 1.0 - blender.decay : 1.0 / n;
    state->observed = observed;
    state->normaliser = ema ? storage.keep * loaded.normaliser + storage.add : 1.0;
}

// Adds the pending sums to the moments as one observation and zeroes them; returns whether the observation entered.
__device__ __forceinline__ bool commit_observation(const BlenderArgs &blender, const LoadedState &loaded,
                                                   ObservationStorage &storage) {
    const uint32_t modalities = blender.modalities, thread = threadIdx.x;
    State *state = at<State>(blender.state);
    if (thread < 2 * modalities) {
        storage.pending[thread] = loaded.pending;
    }
    __syncthreads();
    if (thread < WARP) {
        count_observation(blender, loaded, storage);
    }
    __syncthreads();
    for (uint32_t i = thread; i < 2 * MAX_MODALITIES; i += THREADS_PER_BLOCK) {
        state->pending[i] = 0.0;
    }
    if (storage.entered) {
        const double keep = storage.keep, add = storage.add;
        if (thread < modalities) {
            const double c = storage.c[thread], mean_square = keep * loaded.mean_square + add * (c * c);
            state->mean[thread] = keep * loaded.mean + add * c;
            // 0 times infinity is NaN.
            state->mean_square[thread] = mean_square == mean_square ? mean_square : INFINITY;
        }
#pragma unroll
        for (uint32_t element = 0; element < ELEMENTS; ++element) {
            const uint32_t i = thread + element * THREADS_PER_BLOCK;
            if (i < modalities * modalities) {
                const double square = storage.d[i / modalities] * storage.d[i % modalities];
                state->second_moment[i] = keep * loaded.second_moment[element] + add * square;
            }
        }
    }
    __syncthreads();
    return storage.entered;
}

// Commits an observation, then reweights if the cadence asks for it.
__device__ __forceinline__ void observe_and_reweight(const BlenderArgs &blender, const LoadedState &loaded,
                                                     ObservationStorage &storage) {
    const bool entered = commit_observation(blender, loaded, storage);
    if (entered && blender.cadence == EVERY_OBSERVATION && threadIdx.x < WARP) {
        update_weights(blender, storage.solve);
    }
}
