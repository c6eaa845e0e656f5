// From moments to weights, by one warp. The operations and their order are those of `solve_into` in src/solve.rs, which
// says what they mean; lane i does what belongs to modality or row i.
#pragma once

#include "common.cuh"

// Shared memory of the solver. One column more than there are: lanes walk down columns.
struct Solver {
    double mean[MAX_MODALITIES];
    double matrix[MAX_MODALITIES][MAX_MODALITIES + 1];
    double factor[MAX_MODALITIES][MAX_MODALITIES + 1];
    double x[MAX_MODALITIES], a[MAX_MODALITIES];
    uint32_t left[MAX_MODALITIES];
};

// Infinity and NaN differ from themselves by NaN.
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

__device__ __forceinline__ double magnitude(double x) { return x < 0.0 ? -x : x; }

__device__ __forceinline__ double larger(double a, double b) { return b > a || a != a ? b : a; }

// a = (S + damping I)^-1 m on the modalities that are not dropped, by Cholesky factors. Says whether the matrix had such
// factors, and in `dropped` whether a modality was dropped.
__device__ __forceinline__ bool correlated(Solver &s, uint32_t modalities, double damping, uint32_t negative,
                                           bool &dropped) {
    const uint32_t lane = threadIdx.x % WARP;
    uint32_t count = modalities;
    s.left[lane] = lane;
    for (;;) {
        __syncwarp();
        for (uint32_t j = 0; j < count; ++j) {
            double rest = 0.0;
            if (lane >= j && lane < count) {
                rest = s.matrix[s.left[lane]][s.left[j]] + (lane == j ? damping : 0.0);
                for (uint32_t l = 0; l < j; ++l) {
                    rest -= s.factor[lane][l] * s.factor[j][l];
                }
            }
            const bool bad = lane == j && !(rest > 0.0 && is_finite(rest));
            if (__any_sync(0xffffffffu, bad)) {
                return false;
            }
            if (lane == j) {
                s.factor[j][j] = sqrt(rest);
            }
            __syncwarp();
            if (lane > j && lane < count) {
                s.factor[lane][j] = rest / s.factor[j][j];
            }
            __syncwarp();
        }
        // A sum starts at -0, as in Rust.
        double known = -0.0;
        for (uint32_t i = 0; i < count; ++i) {
            if (lane == i) {
                s.x[i] = (s.mean[s.left[i]] - known) / s.factor[i][i];
            }
            __syncwarp();
            if (lane > i && lane < count) {
                known += s.factor[lane][i] * s.x[i];
            }
        }
        known = -0.0;
        for (uint32_t i = count; i-- > 0;) {
            if (lane == i) {
                s.x[i] = (s.x[i] - known) / s.factor[i][i];
            }
            __syncwarp();
            if (lane < i) {
                known += s.factor[i][lane] * s.x[i];
            }
        }
        s.a[lane] = 0.0;
        __syncwarp();
        if (lane < count) {
            s.a[s.left[lane]] = s.x[lane];
        }
        dropped = count < modalities;
        const uint32_t mine = s.left[lane];
        const bool keep = lane < count && !(s.x[lane] < 0.0);
        // An x that is not a number stays: it makes the sum of the a_k none either, and the weights are held.
        const uint32_t kept = __ballot_sync(0xffffffffu, keep);
        const uint32_t all = count == 32 ? 0xffffffffu : (1u << count) - 1;
        if (negative == SIGNED || kept == all) {
            return true;
        }
        if (keep) {
            s.left[__popc(kept & ((1u << lane) - 1))] = mine;
        }
        count = __popc(kept);
    }
}

// Puts in force what the moments say; keeps the weights where there is nothing to go by. For one warp.
__device__ __forceinline__ void reweight(const BlenderArgs &blender, Solver &s) {
    const uint32_t modalities = blender.modalities, lane = threadIdx.x % WARP;
    State *state = at<State>(blender.state);
    const bool empty = state->observed == 0;
    const double normaliser = state->normaliser;
    double m = 0.0;
    if (lane < modalities) {
        m = empty ? 0.0 : state->mean[lane] / normaliser;
    }
    s.mean[lane] = m;
    for (uint32_t i = lane; i < modalities * modalities; i += WARP) {
        s.factor[i / modalities][i % modalities] = empty ? 0.0 : state->second_moment[i] / normaliser;
    }
    __syncwarp();
    // Weights do not change when m or S is scaled. Bringing both to about 1 keeps the trace, the products and the
    // quotients from overflowing or vanishing.
    double m_scale = 0.0, s_scale = 0.0;
    for (uint32_t k = 0; k < modalities; ++k) {
        m_scale = larger(m_scale, magnitude(s.mean[k]));
        s_scale = larger(s_scale, s.factor[k][k]);
    }
    __syncwarp();
    m = m_scale > 0.0 ? m / m_scale : 0.0;
    s.mean[lane] = m;
    for (uint32_t i = lane; i < modalities * modalities; i += WARP) {
        const uint32_t j = i / modalities, k = i % modalities;
        s.matrix[j][k] = s_scale > 0.0 ? 0.5 * (s.factor[j][k] / s_scale) + 0.5 * (s.factor[k][j] / s_scale)
                                       : (j == k ? 1.0 : 0.0);
    }
    __syncwarp();
    double damping = 0.0;
    if (s_scale > 0.0) {
        double trace = -0.0;
        for (uint32_t k = 0; k < modalities; ++k) {
            trace += s.matrix[k][k];
        }
        damping = blender.damping * (trace / static_cast<double>(modalities));
    }
    bool clamped = false, solved = false;
    // S of fewer than K observations is singular.
    if (blender.overfitting == CORRELATED && state->observed >= modalities) {
        bool dropped = false;
        solved = correlated(s, modalities, damping, blender.negative, dropped);
        clamped = solved && dropped;
    }
    if (!solved) {
        bool negative = false;
        double a = 0.0;
        if (lane < modalities) {
            a = m / (s.matrix[lane][lane] + damping);
            // 0 / 0: no overfitting and no generalisation, hence no weight.
            if (m == 0.0 || (blender.negative == CLAMP && a < 0.0)) {
                negative = a < 0.0;
                a = 0.0;
            }
        }
        __syncwarp();
        s.a[lane] = a;
        clamped = __any_sync(0xffffffffu, negative);
    }
    __syncwarp();
    double sum = -0.0;
    for (uint32_t k = 0; k < modalities; ++k) {
        sum += s.a[k];
    }
    const double weight = s.a[lane] / sum;
    // `blend` multiplies by the weights as f32, so that is where they must be finite.
    const float rounded = static_cast<float>(weight);
    const bool bad = lane < modalities && !is_finite(rounded);
    const bool held = __any_sync(0xffffffffu, bad) || sum <= 0.0 || !is_finite(sum);
    if (!held && lane < modalities) {
        state->weights[lane] = weight;
        state->weights_f32[lane] = rounded;
    }
    if (lane == 0) {
        state->flags = (state->flags & NONFINITE) | (held ? HELD : 0) | (clamped ? CLAMPED : 0);
    }
}
