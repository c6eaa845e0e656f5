// From moments to weights, by one warp. The operations and their order are those of `solve_into` in src/solve/mod.rs, which
// documents them; lane i computes what belongs to modality i.
#pragma once

#include "active_set.cuh"

// Shared memory of the solver.
typedef ActiveSet SolveStorage;

// The policy, as far as it applies, and what of the problem is not in shared memory.
struct Problem {
    Shape shape;
    bool correlated, overfits;
};

// What the solver finds.
struct Solution {
    double u;        // of this lane's modality
    uint32_t bound;  // bit k: u_k would be negative without its bound
    bool exact;
};

// For infinity and NaN, x - x is NaN.
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

__device__ __forceinline__ double larger(double a, double b) { return b > a || a != a ? b : a; }

// Loads m and S into `s.m` and `s.rows`, and returns the largest |m_k| and S_kk.
__device__ __forceinline__ double2 load_moments(const BlenderArgs &blender, SolveStorage &s) {
    const uint32_t modalities = blender.modalities, lane = threadIdx.x % WARP;
    const State *state = at<const State>(blender.state);
    const bool empty = state->observed == 0;
    const double normaliser = state->normaliser;
    s.m[lane] = empty || lane >= modalities ? 0.0 : state->mean[lane] / normaliser;
#pragma unroll 1
    for (uint32_t i = lane; i < modalities * modalities; i += WARP) {
        s.rows[i / modalities][i % modalities] = empty ? 0.0 : state->second_moment[i] / normaliser;
    }
    __syncwarp();
    double m_scale = 0.0, s_scale = 0.0;
#pragma unroll 1
    for (uint32_t k = 0; k < modalities; ++k) {
        m_scale = larger(m_scale, magnitude(s.m[k]));
        s_scale = larger(s_scale, s.rows[k][k]);
    }
    return make_double2(m_scale, s_scale);
}

// Computes the scaled m and Q.
__device__ __forceinline__ Problem load_matrix(const BlenderArgs &blender, SolveStorage &s) {
    const uint32_t modalities = blender.modalities, lane = threadIdx.x % WARP;
    const double2 scale = load_moments(blender, s);
    Problem problem = {};
    // S of fewer than K observations is singular.
    problem.correlated = blender.overfitting == CORRELATED && at<const State>(blender.state)->observed >= modalities;
    problem.overfits = scale.y > 0.0;
#pragma unroll 1
    for (uint32_t i = lane; i < modalities * modalities; i += WARP) {
        const uint32_t j = i / modalities, k = i % modalities;
        const bool counts = problem.overfits && (problem.correlated || j == k);
        s.q[j][k] = counts ? 0.5 * (s.rows[j][k] / scale.y) + 0.5 * (s.rows[k][j] / scale.y) : 0.0;
    }
    // All lanes have read m.
    __syncwarp();
    s.m[lane] = scale.x > 0.0 ? s.m[lane] / scale.x : 0.0;
    double trace = -0.0;
#pragma unroll 1
    for (uint32_t k = 0; k < modalities; ++k) {
        trace += s.q[k][k];
    }
    __syncwarp();
    if (lane < modalities) {
        s.q[lane][lane] += blender.damping * (trace / static_cast<double>(modalities));
    }
    __syncwarp();
    return problem;
}

// Computes the problem from the moments.
__device__ __forceinline__ Problem load_problem(const BlenderArgs &blender, SolveStorage &s) {
    const uint32_t modalities = blender.modalities, lane = threadIdx.x % WARP;
    Problem problem = load_matrix(blender, s);
    double all = 0.0, qf = 0.0;
#pragma unroll 1
    for (uint32_t k = 0; k < modalities; ++k) {
        all += blender.min_weight[k];
        qf += lane < modalities ? s.q[lane][k] * blender.min_weight[k] : 0.0;
    }
    s.floors[lane] = blender.min_weight[lane];
    s.qf[lane] = qf;
    __syncwarp();
    double fqf = 0.0, fm = 0.0;
#pragma unroll 1
    for (uint32_t k = 0; k < modalities; ++k) {
        fqf += s.floors[k] * s.qf[k];
        fm += s.floors[k] * s.m[k];
    }
    const double left = 1.0 - all, diagonal = lane < modalities ? s.q[lane][lane] : 0.0;
    s.gain[lane] = lane < modalities ? left * s.m[lane] + fm : 0.0;
    s.variance[lane] = left * (left * diagonal + (qf + qf)) + fqf;
    __syncwarp();
    problem.shape = {modalities, all > 0.0, left};
    return problem;
}

// The minimum under u >= 0.
__device__ __forceinline__ Solution solve_clamped(SolveStorage &s, const Problem &problem) {
    const uint32_t lane = threadIdx.x % WARP;
    const double gain = s.gain[lane], m = s.m[lane], variance = s.variance[lane];
    const bool free = gain > 0.0 && variance <= 0.0;
    const bool gains = __any_sync(0xffffffffu, gain > 0.0), any_free = __any_sync(0xffffffffu, free);
    const bool closed = !problem.correlated && !problem.shape.has_floors;
    Solution solution = {0.0, 0, true};
    if (gains && problem.overfits && !any_free && !closed) {
        solution.u = minimize(s, problem.shape, solution.bound, solution.exact);
        return solution;
    }
    const double sign = gains && (!problem.overfits || !any_free) ? m : gain;
    if (gains && sign > 0.0) {
        solution.u = !problem.overfits ? m : any_free ? (free ? gain : 0.0) : m / s.q[lane][lane];
    }
    solution.bound = __ballot_sync(0xffffffffu, sign < 0.0);
    return solution;
}

// Q^-1 m, of any sign.
__device__ __forceinline__ Solution solve_signed(SolveStorage &s, const Problem &problem) {
    const uint32_t lane = threadIdx.x % WARP, modalities = problem.shape.modalities;
    Solution solution = {0.0, 0, true};
    if (problem.overfits && problem.correlated) {
        uint32_t count = 0;
#pragma unroll 1
        while (count < modalities && append(s, problem.shape, count, count, LEAST_PIVOT)) {
        }
        if (count == modalities) {
            solution.u = solve_set(s, problem.shape, count);
            return solution;
        }
    }
    if (lane < modalities) {
        const double m = s.m[lane];
        // 0 / 0: no overfitting and no generalisation, hence no weight.
        solution.u = m == 0.0 || !problem.overfits ? m : m / s.q[lane][lane];
    }
    return solution;
}

// Normalises u to weights and stores them; holds the previous weights if these are not usable.
__device__ __forceinline__ void store_weights(const BlenderArgs &blender, SolveStorage &s, const Problem &problem,
                                              const Solution &solution) {
    const uint32_t modalities = blender.modalities, lane = threadIdx.x % WARP;
    State *state = at<State>(blender.state);
    __syncwarp();
    s.x[lane] = solution.u;
    __syncwarp();
    double sum = -0.0;
#pragma unroll 1
    for (uint32_t k = 0; k < modalities; ++k) {
        sum += s.x[k];
    }
    const double share = solution.u / sum, floor = s.floors[lane];
    // `blend` multiplies by the f32 weights, so these must be finite.
    const bool bad = lane < modalities && !is_finite(static_cast<float>(share));
    const bool held = __any_sync(0xffffffffu, bad) || sum <= 0.0 || !is_finite(sum);
    const uint32_t floors = __ballot_sync(0xffffffffu, floor > 0.0), floored = held ? 0 : solution.bound & floors;
    if (!held && lane < modalities) {
        const double weight = floor + problem.shape.left * share;
        state->weights[lane] = weight;
        state->weights_f32[lane] = static_cast<float>(weight);
    }
    if (lane == 0) {
        state->flags = (state->flags & NONFINITE) | (held ? HELD : 0) | ((solution.bound & ~floored) != 0 ? CLAMPED : 0) |
                       (floored != 0 ? FLOORED : 0) | (solution.exact ? 0 : INEXACT);
        state->floored = floored;
    }
}

// Computes the weights from the moments. For one warp.
__device__ __forceinline__ void update_weights(const BlenderArgs &blender, SolveStorage &s) {
    const Problem problem = load_problem(blender, s);
    const Solution solution = blender.negative == CLAMP ? solve_clamped(s, problem) : solve_signed(s, problem);
    store_weights(blender, s, problem, solution);
}
