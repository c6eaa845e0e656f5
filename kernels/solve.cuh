// From moments to weights, by one warp. The operations and their order are those of `solve_into` in src/solve.rs, which
// documents them; lane i computes what belongs to modality or row i.
#pragma once

#include "common.cuh"

// Shared memory of the solver. Rows have one column more than is used: the lanes read columns, and a stride of 32 f64
// would make them read one bank.
struct SolveStorage {
    double mean[MAX_MODALITIES];
    double matrix[MAX_MODALITIES][MAX_MODALITIES + 1];
    double factor[MAX_MODALITIES][MAX_MODALITIES + 1];
    double x[MAX_MODALITIES], a[MAX_MODALITIES];
    uint32_t active[MAX_MODALITIES];  // the modalities that are not dropped
};

// For infinity and NaN, x - x is NaN.
__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

__device__ __forceinline__ double magnitude(double x) { return x < 0.0 ? -x : x; }

__device__ __forceinline__ double larger(double a, double b) { return b > a || a != a ? b : a; }

// The lower Cholesky factor of S + damping I on the active modalities; returns whether there is one.
__device__ __forceinline__ bool factorize(SolveStorage &s, uint32_t count, double damping) {
    const uint32_t lane = threadIdx.x % WARP;
    for (uint32_t j = 0; j < count; ++j) {
        double rest = 0.0;
        if (lane >= j && lane < count) {
            rest = s.matrix[s.active[lane]][s.active[j]] + (lane == j ? damping : 0.0);
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
    return true;
}

// x = (L L')^-1 m on the active modalities: forward, then backward substitution.
__device__ __forceinline__ void substitute(SolveStorage &s, uint32_t count) {
    const uint32_t lane = threadIdx.x % WARP;
    // A sum starts at -0, as in Rust.
    double known = -0.0;
    for (uint32_t i = 0; i < count; ++i) {
        if (lane == i) {
            s.x[i] = (s.mean[s.active[i]] - known) / s.factor[i][i];
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
}

// a = (S + damping I)^-1 m; with CLAMP, modalities whose a is negative are dropped and the rest is solved again.
// Returns whether all matrices had Cholesky factors, and in `dropped` whether a modality was dropped.
__device__ __forceinline__ bool solve_correlated(SolveStorage &s, uint32_t modalities, double damping,
                                                 uint32_t negative, bool &dropped) {
    const uint32_t lane = threadIdx.x % WARP;
    uint32_t count = modalities;
    s.active[lane] = lane;
    for (;;) {
        __syncwarp();
        if (!factorize(s, count, damping)) {
            return false;
        }
        substitute(s, count);
        s.a[lane] = 0.0;
        __syncwarp();
        if (lane < count) {
            s.a[s.active[lane]] = s.x[lane];
        }
        dropped = count < modalities;
        const uint32_t modality = s.active[lane];
        // A NaN in x is kept: it makes the sum of the a_k NaN too, and the weights are held.
        const bool keep = lane < count && !(s.x[lane] < 0.0);
        const uint32_t kept = __ballot_sync(0xffffffffu, keep);
        const uint32_t all = count == 32 ? 0xffffffffu : (1u << count) - 1;
        if (negative == SIGNED || kept == all) {
            return true;
        }
        // All lanes have read `active` before it changes.
        __syncwarp();
        if (keep) {
            s.active[__popc(kept & ((1u << lane) - 1))] = modality;
        }
        count = __popc(kept);
    }
}

// a_k = m_k / (S_kk + damping); returns whether a negative a_k was clamped to 0.
__device__ __forceinline__ bool solve_uncorrelated(SolveStorage &s, uint32_t modalities, double m, double damping,
                                                   uint32_t negative) {
    const uint32_t lane = threadIdx.x % WARP;
    bool clamped = false;
    double a = 0.0;
    if (lane < modalities) {
        a = m / (s.matrix[lane][lane] + damping);
        // 0 / 0: a modality that neither generalises nor overfits gets no weight.
        if (m == 0.0 || (negative == CLAMP && a < 0.0)) {
            clamped = a < 0.0;
            a = 0.0;
        }
    }
    __syncwarp();
    s.a[lane] = a;
    return __any_sync(0xffffffffu, clamped);
}

// Loads m and S into `s`, scaled to about 1 and S made symmetric. Weights do not change when m or S is scaled; scaling
// keeps the trace, products and quotients from overflow and underflow. Returns this lane's m and the damping to add.
__device__ __forceinline__ double load_moments(const BlenderArgs &blender, SolveStorage &s, double &damping) {
    const uint32_t modalities = blender.modalities, lane = threadIdx.x % WARP;
    const State *state = at<const State>(blender.state);
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
        s.matrix[j][k] =
            s_scale > 0.0 ? 0.5 * (s.factor[j][k] / s_scale) + 0.5 * (s.factor[k][j] / s_scale) : (j == k ? 1.0 : 0.0);
    }
    __syncwarp();
    damping = 0.0;
    if (s_scale > 0.0) {
        double trace = -0.0;
        for (uint32_t k = 0; k < modalities; ++k) {
            trace += s.matrix[k][k];
        }
        damping = blender.damping * (trace / static_cast<double>(modalities));
    }
    return m;
}

// Normalises a to weights and stores them; holds the previous weights if these are not usable.
__device__ __forceinline__ void store_weights(const BlenderArgs &blender, const SolveStorage &s, bool clamped) {
    const uint32_t modalities = blender.modalities, lane = threadIdx.x % WARP;
    State *state = at<State>(blender.state);
    double sum = -0.0;
    for (uint32_t k = 0; k < modalities; ++k) {
        sum += s.a[k];
    }
    const double weight = s.a[lane] / sum;
    // `blend` multiplies by the f32 weights, so these must be finite.
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

// Computes the weights from the moments. For one warp.
__device__ __forceinline__ void update_weights(const BlenderArgs &blender, SolveStorage &s) {
    double damping;
    const double m = load_moments(blender, s, damping);
    bool clamped = false, solved = false;
    // S of fewer than K observations is singular.
    if (blender.overfitting == CORRELATED && at<const State>(blender.state)->observed >= blender.modalities) {
        bool dropped = false;
        solved = solve_correlated(s, blender.modalities, damping, blender.negative, dropped);
        clamped = solved && dropped;
    }
    if (!solved) {
        clamped = solve_uncorrelated(s, blender.modalities, m, damping, blender.negative);
    }
    __syncwarp();
    store_weights(blender, s, clamped);
}
