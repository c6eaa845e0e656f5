// Minimum of x'Qx / 2 - m'x over x = f s + u, u >= 0, s = sum x, by one warp. The operations and their order are those of
// src/solve/active_set.rs, which documents them; lane i computes what belongs to modality i or to position i of the set.
//
// A vote or a shuffle orders no memory: __syncwarp stands between every store to shared memory and its loads by other
// lanes, and between these loads and the next store.
#pragma once

#include "common.cuh"

constexpr double power_of_two(uint32_t bits) { return 1.0 / static_cast<double>(1ull << bits); }
constexpr double TOLERANCE = power_of_two(DERIVATIVE_BITS), LEAST_PIVOT = power_of_two(PIVOT_BITS);
constexpr double INDEFINITE = -power_of_two(INDEFINITE_BITS);

// Rows have one column more than is used: the lanes read columns, and a stride of 32 f64 would make them read one bank.
typedef double Matrix[MAX_MODALITIES][MAX_MODALITIES + 1];

// A problem, and the set of positive variables with its factor. In shared memory.
struct ActiveSet {
    Matrix q;
    double m[MAX_MODALITIES], floors[MAX_MODALITIES], qf[MAX_MODALITIES], gain[MAX_MODALITIES], variance[MAX_MODALITIES];
    Matrix rows;
    double z[MAX_MODALITIES], u[MAX_MODALITIES];  // by position in the set
    uint32_t order[MAX_MODALITIES];               // the variables of the set
    double x[MAX_MODALITIES];
};

// What all lanes know of a problem.
struct Shape {
    uint32_t modalities;
    bool has_floors;
    double left;  // 1 - sum f
};

__device__ __forceinline__ double magnitude(double x) { return x < 0.0 ? -x : x; }

// Position of the lowest bit that is set; 32 if none is.
__device__ __forceinline__ uint32_t first_bit(uint32_t bits) { return __popc((bits & (0u - bits)) - 1); }

// Element (v, variable at position j) of C'QC, where v is not the first variable.
__device__ __forceinline__ double element(const ActiveSet &s, const Shape &shape, uint32_t v, uint32_t j) {
    const uint32_t o = s.order[j], r = s.order[0];
    if (!shape.has_floors) {
        return s.q[v][o];
    }
    if (j == 0) {
        return (s.qf[v] - s.qf[r]) + shape.left * (s.q[v][r] - s.q[r][r]);
    }
    return (s.q[v][o] - s.q[v][r]) - (s.q[o][r] - s.q[r][r]);
}

// Appends the row of variable `v` to the factor if its pivot is at least `lowest`; returns whether it is.
__device__ __forceinline__ bool append(ActiveSet &s, const Shape &shape, uint32_t &count, uint32_t v, double lowest) {
    const uint32_t lane = threadIdx.x % WARP, i = count;
    double diagonal = s.variance[v], size = diagonal, c = s.gain[v];
    if (i > 0 && shape.has_floors) {
        const uint32_t r = s.order[0];
        const double variance = s.q[v][v] + s.q[r][r], terms = s.q[v][r] + s.q[v][r];
        diagonal = variance - terms;
        size = variance + magnitude(terms);
        c = s.m[v] - s.m[r];
    }
    // Lanes below i compute the row, lane i its pivot and the known part of z.
    double rest = lane < i ? element(s, shape, v, lane) : diagonal, known = 0.0;
#pragma unroll 1
    for (uint32_t j = 0; j < i; ++j) {
        double entry = 0.0;
        if (lane == j) {
            entry = rest / s.rows[j][j];
            s.rows[i][j] = entry;
        }
        entry = broadcast(entry, j);
        if (lane > j && lane < i) {
            rest -= entry * s.rows[lane][j];
        } else if (lane == i) {
            rest -= entry * entry;
            known += entry * s.z[j];
        }
    }
    const bool usable = __any_sync(0xffffffffu, lane == i && size > 0.0 && rest >= lowest * size);
    if (usable && lane == i) {
        const double least = LEAST_PIVOT * size, root = sqrt(rest > least ? rest : least);
        s.rows[i][i] = root;
        s.z[i] = (c - known) / root;
        s.order[i] = v;
    }
    __syncwarp();
    count += usable;
    return usable;
}

// u of this lane's position at the minimum on the set.
__device__ __forceinline__ double solve_set(const ActiveSet &s, const Shape &shape, uint32_t count) {
    const uint32_t lane = threadIdx.x % WARP;
    double u = 0.0, known = 0.0, sum = 0.0;
#pragma unroll 1
    for (uint32_t i = count; i-- > 0;) {
        if (lane == i) {
            u = (s.z[i] - known) / s.rows[i][i];
        }
        const double other = broadcast(u, i);
        if (lane < i) {
            known += s.rows[i][lane] * other;
        }
        sum += i > 0 ? other : 0.0;
    }
    return shape.has_floors && lane == 0 ? shape.left * u - sum : u;
}

// m - Qx of row i, and the sum of its absolute terms.
__device__ __forceinline__ double2 derivative_of(const ActiveSet &s, const Shape &shape, uint32_t i) {
    double sum = 0.0, size = magnitude(s.m[i]);
#pragma unroll 1
    for (uint32_t j = 0; j < shape.modalities; ++j) {
        const double product = s.q[i][j] * s.x[j];
        sum += product;
        size += magnitude(product);
    }
    return make_double2(s.m[i] - sum, size);
}

// The variable outside the set with the largest positive derivative that is not in `rejected`, or 32; the variables with
// negative ones go to `negative`.
__device__ __forceinline__ uint32_t next_variable(ActiveSet &s, const Shape &shape, uint32_t count, uint32_t rejected,
                                                  uint32_t &negative) {
    const uint32_t lane = threadIdx.x % WARP;
    double x = 0.0, sum = 0.0;
    bool outside = lane < shape.modalities;
#pragma unroll 1
    for (uint32_t i = 0; i < count; ++i) {
        const double u = s.u[i];
        sum += u;
        if (s.order[i] == lane) {
            x = u;
            outside = false;
        }
    }
    s.x[lane] = x + s.floors[lane] * (sum / shape.left);
    __syncwarp();
    double derivative = 0.0, tolerance = 0.0, scaled = 0.0;
    if (outside) {
        derivative = s.gain[lane];
        if (count != 0) {
            const double2 own = derivative_of(s, shape, lane);
            const double2 common = shape.has_floors ? derivative_of(s, shape, s.order[0]) : make_double2(0.0, 0.0);
            derivative = own.x - common.x;
            tolerance = TOLERANCE * (own.y + common.y);
        }
        scaled = s.q[lane][lane] > 0.0 ? derivative / sqrt(s.q[lane][lane]) : derivative;
    }
    negative = __ballot_sync(0xffffffffu, outside && derivative < -tolerance);
    const bool positive = outside && derivative > tolerance && (rejected >> lane & 1) == 0;
    const double largest = warp_largest(positive ? scaled : 0.0);
    const uint32_t found = __ballot_sync(0xffffffffu, positive && scaled > 0.0 && scaled == largest);
    // All lanes have read x.
    __syncwarp();
    return first_bit(found);
}

// Moves u to the minimum on the set, or towards it until the first variable is 0. Returns whether it is there.
__device__ __forceinline__ bool advance(ActiveSet &s, const Shape &shape, uint32_t count) {
    const uint32_t lane = threadIdx.x % WARP;
    const double target = solve_set(s, shape, count);
    const bool blocked = lane < count && !(target > 0.0);
    const bool arrived = !__any_sync(0xffffffffu, blocked);
    const double u = s.u[lane];
    double to = target;
    if (!arrived) {
        // 2 is no limit. A NaN is none either; it makes u NaN, and so the variable leaves.
        const double ratio = blocked ? u / (u - target) : 2.0, part = -warp_largest(ratio < 1.0 ? -ratio : -1.0);
        to = ratio == part ? 0.0 : u + part * (target - u);
    }
    __syncwarp();
    if (lane < count) {
        s.u[lane] = to;
    }
    __syncwarp();
    return arrived;
}

// Replaces the variables from position `from` on by `entering`, with u = 0 (MAX_MODALITIES: by none), and by those whose
// bit is in `keep`. Returns whether they all have pivots; those that have none are left out.
__device__ __forceinline__ bool rebuild(ActiveSet &s, const Shape &shape, uint32_t &count, uint32_t from, uint32_t keep,
                                        uint32_t entering) {
    const uint32_t lane = threadIdx.x % WARP, end = count;
    const double u = s.u[lane];
    const uint32_t variable = s.order[lane];
    bool usable = true;
    count = from;
    // All lanes have read u and the order before they change.
    __syncwarp();
#pragma unroll 1
    for (uint32_t i = entering < MAX_MODALITIES ? from - 1 : from; i != end; ++i) {
        const bool enters = i == from - 1;
        if (!enters && (keep >> i & 1) == 0) {
            continue;
        }
        const uint32_t position = count, v = enters ? entering : broadcast(variable, i);
        const double value = enters ? 0.0 : broadcast(u, i);
        const bool appended = append(s, shape, count, v, INDEFINITE);
        if (appended && lane == 0) {
            s.u[position] = value;
        }
        usable = usable && appended;
    }
    __syncwarp();
    return usable;
}

// Adds a variable with u = 0. Returns whether all variables have pivots.
__device__ __forceinline__ bool enter(ActiveSet &s, const Shape &shape, uint32_t &count, uint32_t v) {
    const uint32_t lane = threadIdx.x % WARP;
    bool before = false;
    if (lane < count) {
        const uint32_t k = s.order[lane];
        before = s.q[k][k] <= s.q[v][v];
    }
    const uint32_t position = __popc(__ballot_sync(0xffffffffu, before));
    return rebuild(s, shape, count, shape.has_floors ? position : count, UINT32_MAX, v);
}

// Removes the variables that are not positive. Returns whether the others have pivots.
__device__ __forceinline__ bool remove_zeros(ActiveSet &s, const Shape &shape, uint32_t &count) {
    const uint32_t lane = threadIdx.x % WARP;
    const uint32_t positive = __ballot_sync(0xffffffffu, lane < count && s.u[lane] > 0.0);
    return rebuild(s, shape, count, first_bit(~positive), positive, MAX_MODALITIES);
}

// Minimises a problem in which a corner has a gain. Returns u of this lane's modality; `bound` gets the modalities whose u
// would be negative without its bound, `exact` whether u is the minimum.
__device__ __forceinline__ double minimize(ActiveSet &s, const Shape &shape, uint32_t &bound, bool &exact) {
    const uint32_t lane = threadIdx.x % WARP, last = ENTRIES * shape.modalities;
    uint32_t count = 0, rejected = 0;
    exact = true;
#pragma unroll 1
    for (uint32_t entry = 0; entry <= last; ++entry) {
        const uint32_t next = next_variable(s, shape, count, rejected, bound);
        if (next == MAX_MODALITIES) {
            break;
        }
        if (entry == last) {
            exact = false;
            break;
        }
        exact = enter(s, shape, count, next) && exact;
#pragma unroll 1
        while (!advance(s, shape, count)) {
            exact = remove_zeros(s, shape, count) && exact;
        }
        // A variable that entered and left at once would enter again.
        const bool stays = __any_sync(0xffffffffu, lane < count && s.order[lane] == next);
        rejected = stays ? 0 : rejected | 1u << next;
        __syncwarp();
    }
    double u = 0.0;
#pragma unroll 1
    for (uint32_t i = 0; i < count; ++i) {
        u = s.order[i] == lane ? s.u[i] : u;
    }
    return u;
}
