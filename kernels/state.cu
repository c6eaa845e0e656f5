// Operations on the state alone: one thread block, no gradient. They are bounded to one block an SM: otherwise nvcc saves
// registers for more blocks, and spills on sm_86 and sm_89.

#include "moments.cuh"

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, 1)
    observe(const __grid_constant__ BlenderArgs blender, const __grid_constant__ ObservationArgs observation) {
    __shared__ ObservationStorage storage;
    observe_and_reweight(blender, load_state(blender, observation), storage);
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, 1)
    reweight(const __grid_constant__ BlenderArgs blender) {
    __shared__ SolveStorage storage;
    if (threadIdx.x < WARP) {
        update_weights(blender, storage);
    }
}

// Zeroes everything but the weights.
extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, 1) reset(const __grid_constant__ BlenderArgs blender) {
    State *state = at<State>(blender.state);
    for (uint32_t i = threadIdx.x; i < MAX_MODALITIES * MAX_MODALITIES; i += THREADS_PER_BLOCK) {
        state->second_moment[i] = 0.0;
    }
    if (threadIdx.x < 2 * MAX_MODALITIES) {
        state->pending[threadIdx.x] = 0.0;
    }
    if (threadIdx.x < MAX_MODALITIES) {
        state->mean[threadIdx.x] = 0.0;
        state->mean_square[threadIdx.x] = 0.0;
    }
    if (threadIdx.x == 0) {
        state->normaliser = 0.0;
        state->observed = 0;
        state->skipped = 0;
        state->flags = 0;
        state->nonfinite = 0;
        state->floored = 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, 1)
    set_weights(const __grid_constant__ BlenderArgs blender, const __grid_constant__ Weights weights) {
    State *state = at<State>(blender.state);
    if (threadIdx.x < blender.modalities) {
        state->weights[threadIdx.x] = weights.values[threadIdx.x];
        state->weights_f32[threadIdx.x] = static_cast<float>(weights.values[threadIdx.x]);
    }
}
