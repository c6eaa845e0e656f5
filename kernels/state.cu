// Operations on the state alone: one block, no gradient.

#include "observe.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) observe(const __grid_constant__ Launch launch) {
    __shared__ Shared shared;
    observe(launch, shared, look_back(launch));
}

extern "C" __global__ void __launch_bounds__(THREADS) reweight(const __grid_constant__ Launch launch) {
    __shared__ Solver solver;
    if (threadIdx.x < WARP) {
        reweight(launch, solver);
    }
}

// Forgets everything but the weights.
extern "C" __global__ void __launch_bounds__(THREADS) reset(const __grid_constant__ Launch launch) {
    State *state = at<State>(launch.state);
    for (uint32_t i = threadIdx.x; i < MAX_MODALITIES * MAX_MODALITIES; i += THREADS) {
        state->second_moment[i] = 0.0;
    }
    if (threadIdx.x < 2 * MAX_MODALITIES) {
        state->pending[threadIdx.x] = 0.0;
    }
    if (threadIdx.x < MAX_MODALITIES) {
        state->mean[threadIdx.x] = 0.0;
    }
    if (threadIdx.x == 0) {
        state->normaliser = 0.0;
        state->observed = 0;
        state->skipped = 0;
        state->flags = 0;
        state->nonfinite = 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    set_weights(const __grid_constant__ Launch launch, const __grid_constant__ Weights weights) {
    State *state = at<State>(launch.state);
    if (threadIdx.x < launch.modalities) {
        state->weights[threadIdx.x] = weights.values[threadIdx.x];
        state->weights_f32[threadIdx.x] = static_cast<float>(weights.values[threadIdx.x]);
    }
}
