// dot, blend, and both at once: one pass that reads each element of each gradient once.
//
// A block takes a span after the other, on a grid that does not grow with the work: which ones depends on how fast others
// are, what comes of them does not. A span is one chunk that all warps share, or up to WARPS small ones of which each warp
// takes one. A chunk is read in units of 16 bytes. Thread i of the n that share a chunk takes units i, i + n, i + 2n, ...
// and keeps two sums for each product, one for the first halves of its units and one for the second ones. So the sum that
// an element enters follows from its place in the chunk and the chunk's length; alignment changes the width of loads and
// nothing else. At most 128 elements enter a sum: with the rounding of t - g that is 129 roundings of 2^-24, half of the
// 2^-16 that is promised. From there on sums are added in f64: the two of a thread, the lanes of a warp, the warps, and at
// last the spans, by the block that is done last (observe.cuh).

#include "observe.cuh"

static_assert(CHUNK <= 128 * 2 * THREADS_PER_BLOCK && WARP_CHUNK <= 128 * 2 * WARP, "at most 128 elements enter a sum");
static_assert(ALIGNMENT == sizeof(uint4), "a unit is what the widest load brings");

// Writes what is there of a unit of the blend.
template <class T>
__device__ __forceinline__ void write(uint64_t list, uint32_t alignment, uint32_t count, uint4 unit) {
    const bool whole = count == T::PER_UNIT;
    if (whole && alignment == 16) {
        store(list, unit);
    } else if (whole && alignment == 8) {
        store_pieces<8>(list, 16, unit);
    } else if (T::BYTES == 2 && whole && alignment == 4) {
        store_pieces<4>(list, 16, unit);
    } else {
        store_pieces<T::BYTES>(list, count * T::BYTES, unit);
    }
}

// Adds the modalities past the first tile to a word of the blend, of which `count` elements are in the chunk.
template <class T>
__device__ __forceinline__ void add_rest(const Work &work, const float *weights, uint32_t byte, uint32_t count,
                                         float (&sum)[T::PER_WORD]) {
#pragma unroll 1
    for (uint32_t n = TILE; n < work.present; ++n) {
        const uint64_t list = at<const uint64_t>(work.modalities)[n] + work.offset + byte;
        const float weight = weights[at<const uint32_t>(work.indices)[n]];
        uint4 unit;
        if (T::BYTES == 4 || (count == T::PER_WORD && work.alignment >= 4)) {
            unit = load_pieces<4>(list, count != 0 ? 4 : 0);
        } else {
            unit = load_pieces<T::BYTES>(list, count * T::BYTES);
        }
        float x[T::PER_WORD];
        T::widen(unit.x, x);
#pragma unroll
        for (uint32_t e = 0; e < T::PER_WORD; ++e) {
            sum[e] = fmaf(weight, x[e], sum[e]);
        }
    }
}

// The blend of no modality.
template <class T>
__device__ __forceinline__ void clear(const Work &work) {
    const uint32_t len = work.len, threads = work.threads;
    for (uint32_t first = threadIdx.x % threads * T::PER_UNIT; first < len; first += threads * T::PER_UNIT) {
        const uint32_t left = len - first, count = left < T::PER_UNIT ? left : T::PER_UNIT;
        write<T>(work.lists[BLENDED] + first * T::BYTES, work.alignment, count, make_uint4(0, 0, 0, 0));
    }
}

// How many units of each of so many lists make LOADS_IN_FLIGHT, or a few more. A power of two, as a whole chunk's units are, so that
// no round of it is short.
__host__ __device__ constexpr int together(int lists) {
    int units = 1;
    while (units * lists < static_cast<int>(LOADS_IN_FLIGHT)) {
        units *= 2;
    }
    return units;
}

// Puts a modality into a tile.
template <bool BLENDS>
__device__ __forceinline__ void put(Work &work, uint32_t place, bool there, uint64_t list, uint32_t modality,
                                    const float *weights) {
    work.lists[MODALITY + place] = list;
    if (BLENDS) {
        // Times the zeros that are read of an absent modality, -0 leaves every sum as it is.
        work.weights[place] = there ? weights[modality] : -0.0f;
    }
}

// Adds up the products of N modalities of a chunk from `first` on, and writes the blend of all its modalities where
// `first` is 0. GUARD: of as many of the N as are present.
template <class T, int N, bool DOTS, bool BLENDS, bool GUARD>
__device__ __forceinline__ void sweep(Work &work, const float *weights, uint64_t zeros, uint32_t k, uint32_t first) {
    constexpr uint32_t E = T::PER_UNIT;
    // Units of each list that are on their way together.
    constexpr int TOGETHER = together(DOTS ? 2 + N : N);
    const uint32_t lane = threadIdx.x % WARP;
    const bool dots = DOTS && (!BLENDS || (work.what & DOT));
    const bool blends = BLENDS && (!DOTS || (work.what & BLEND)) && (!GUARD || first == 0);
    const bool adds = blends && (work.what & ACCUMULATE);
    const int left = static_cast<int>(work.present - first), here = GUARD && left < N ? left : N;
    if (GUARD && work.present > TILE) {
        // The lists of the tile before this one are done with.
        __syncwarp();
        if (lane < TILE) {
            const bool there = first + lane < work.present;
            const uint32_t n = there ? first + lane : first;
            put<BLENDS>(work, lane, there, at<const uint64_t>(work.modalities)[n] + work.offset,
                        at<const uint32_t>(work.indices)[n], weights);
        }
        __syncwarp();
    }
    float c[2][N] = {}, d[2][N] = {};
    for (uint32_t next = threadIdx.x % work.threads * E; next < work.len; next += TOGETHER * work.threads * E) {
        uint4 t[TOGETHER] = {}, g[TOGETHER] = {}, b[TOGETHER] = {}, v[TOGETHER][N] = {};
        uint32_t offset[TOGETHER], count[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const uint32_t element = next + i * work.threads * E, len = work.len;
            offset[i] = element * T::BYTES;
            count[i] = element + E <= len ? E : element < len ? len - element : 0;
        }
        // Loads of all lists before the first use, and no branch between them, so that all are on their way at once.
        const auto load_lists = [&](auto load_unit) {
            const uint64_t train = work.lists[TRAIN], valid = work.lists[VALID], blended = work.lists[BLENDED];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                load_unit(dots, train, i, t[i]);
                load_unit(dots, valid, i, g[i]);
                load_unit(adds, blended, i, b[i]);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint64_t modality = work.lists[MODALITY + n];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    load_unit(n < here, modality, i, v[i][n]);
                }
            }
        };
        const uint32_t alignment = work.alignment;
        const bool whole = count[TOGETHER - 1] == E;
        if (whole && alignment == 16) {
            load_lists([&](bool there, uint64_t list, int i, uint4 &unit) {
                if (GUARD) {
                    unit = load_if(there, list + offset[i], zeros);
                } else if (there) {
                    unit = load(list + offset[i]);
                }
            });
        } else if (whole && alignment == 8) {
            load_lists([&](bool there, uint64_t list, int i, uint4 &unit) {
                unit = load_pieces<8>(list + offset[i], there ? 16 : 0);
            });
        } else if (whole && alignment == 4) {
            load_lists([&](bool there, uint64_t list, int i, uint4 &unit) {
                unit = load_pieces<4>(list + offset[i], there ? 16 : 0);
            });
        } else if (whole && T::BYTES == 2) {
            load_lists([&](bool there, uint64_t list, int i, uint4 &unit) { unit = load_halves(there, list, offset[i]); });
        } else {
            // The end of a chunk. What load_lists does not bring comes unit by unit, for which registers do.
            const bool aligned = alignment == 16;
            if (aligned) {
                load_lists([&](bool there, uint64_t list, int i, uint4 &unit) {
                    unit = load_if(there && count[i] == E, list + offset[i], zeros);
                });
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const auto load_unit = [&](auto load_part) {
                    const auto load_from = [&](bool there, int list) {
                        return load_part(work.lists[list] + offset[i], there ? count[i] * T::BYTES : 0);
                    };
                    t[i] = load_from(dots, TRAIN);
                    g[i] = load_from(dots, VALID);
                    b[i] = load_from(adds, BLENDED);
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        v[i][n] = load_from(n < here, MODALITY + n);
                    }
                };
                if (aligned && count[i] % E != 0) {
                    load_unit(load_end<T::BYTES>);
                } else if (!aligned && count[i] != 0) {
                    load_unit(load_pieces<T::BYTES>);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const uint32_t t_words[4] = {t[i].x, t[i].y, t[i].z, t[i].w};
            const uint32_t g_words[4] = {g[i].x, g[i].y, g[i].z, g[i].w};
            const uint32_t b_words[4] = {b[i].x, b[i].y, b[i].z, b[i].w};
            uint32_t words[4];
            // A word at a time keeps few elements in registers as f32.
#pragma unroll
            for (uint32_t word = 0; word < 4; ++word) {
                float train[T::PER_WORD], valid[T::PER_WORD], sum[T::PER_WORD];
                T::widen(t_words[word], train);
                T::widen(g_words[word], valid);
                T::widen(b_words[word], sum);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const uint32_t v_words[4] = {v[i][n].x, v[i][n].y, v[i][n].z, v[i][n].w};
                    const float weight = BLENDS ? work.weights[n] : 0.0f;
                    float x[T::PER_WORD];
                    T::widen(v_words[word], x);
#pragma unroll
                    for (uint32_t e = 0; e < T::PER_WORD; ++e) {
                        if (DOTS) {
                            c[word / 2][n] = fmaf(valid[e], x[e], c[word / 2][n]);
                            d[word / 2][n] = fmaf(train[e] - valid[e], x[e], d[word / 2][n]);
                        }
                        if (BLENDS) {
                            sum[e] = fmaf(weight, x[e], sum[e]);
                        }
                    }
                }
                if (BLENDS && N == TILE && blends) {
                    const uint32_t before = word * T::PER_WORD, left = count[i] > before ? count[i] - before : 0;
                    add_rest<T>(work, weights, offset[i] + word * 4, left < T::PER_WORD ? left : T::PER_WORD, sum);
                }
                words[word] = T::narrow(sum);
            }
            if (blends) {
                const uint4 unit = make_uint4(words[0], words[1], words[2], words[3]);
                write<T>(work.lists[BLENDED] + offset[i], work.alignment, count[i], unit);
            }
        }
    }
    if (dots) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (n < here) {
                const double c_n = warp_sum(static_cast<double>(c[0][n]) + static_cast<double>(c[1][n]));
                const double d_n = warp_sum(static_cast<double>(d[0][n]) + static_cast<double>(d[1][n]));
                if (lane == 0) {
                    const uint32_t modality = at<const uint32_t>(work.indices)[first + n];
                    work.sums[modality] = c_n;
                    work.sums[k + modality] = d_n;
                }
            }
        }
    }
}

template <class T, bool DOTS, bool BLENDS>
__device__ __forceinline__ void take(Work &work, const float *weights, uint64_t zeros, uint32_t k) {
    // The first tile comes last: it writes the blend, perhaps over a gradient that the others read.
    uint32_t tile = DOTS && (work.what & DOT) ? (work.present - 1) / TILE : 0;
    for (;; --tile) {
        switch (tile > 0 ? TILE : work.present) {
            case 0:
                if (BLENDS) {
                    clear<T>(work);
                }
                break;
            case 1:
                sweep<T, 1, DOTS, BLENDS, false>(work, weights, zeros, k, 0);
                break;
            case 2:
                sweep<T, 2, DOTS, BLENDS, false>(work, weights, zeros, k, 0);
                break;
            case 3:
                sweep<T, 3, DOTS, BLENDS, false>(work, weights, zeros, k, 0);
                break;
            case 4:
                sweep<T, 4, DOTS, BLENDS, false>(work, weights, zeros, k, 0);
                break;
            default:
                sweep<T, TILE, DOTS, BLENDS, true>(work, weights, zeros, k, tile * TILE);
        }
        if (tile == 0) {
            return;
        }
    }
}

// Looks up what a chunk's tensor has, the first tile of its modalities included; says whether the pass has anything to do
// there.
template <bool DOTS, bool BLENDS>
__device__ __forceinline__ bool look_up(const TableArgs &table, const BlenderArgs &blender, uint32_t what,
                                        const float *weights, uint32_t number, uint32_t threads, uint32_t &dtype, Work &work) {
    const uint32_t lane = threadIdx.x % WARP;
    const Chunk chunk = at<const Chunk>(table.chunks)[number];
    // What the chunk's tensor has is read at once; how many of its slots are taken is seen later.
    const uint64_t slot = static_cast<uint64_t>(chunk.tensor) * blender.modalities;
    const uint64_t mine = slot + (lane < blender.modalities ? lane : 0);
    const uint64_t list = at<const uint64_t>(table.addresses)[mine];
    const uint32_t modality = at<const uint32_t>(table.indices)[mine];
    const TensorRecord tensor = at<const TensorRecord>(table.tensors)[chunk.tensor];
    const uint64_t offset = chunk.start * (tensor.dtype == F32 ? 4 : 2);
    const bool adds = what & ACCUMULATE;
    const bool dots = DOTS && tensor.train != 0 && tensor.present != 0;
    const bool blends = BLENDS && tensor.blended != 0 && (tensor.present != 0 || !adds);
    if (lane == 0) {
        work.lists[TRAIN] = tensor.train + offset;
        work.lists[VALID] = tensor.valid + offset;
        work.lists[BLENDED] = tensor.blended + offset;
        work.modalities = table.addresses + slot * sizeof(uint64_t);
        work.indices = table.indices + slot * sizeof(uint32_t);
        work.offset = offset;
        work.len = chunk.len;
        work.alignment = tensor.alignment;
        work.present = tensor.present;
        work.threads = threads;
        work.what = (dots ? DOT : 0) | (blends ? BLEND : 0) | (adds ? ACCUMULATE : 0);
    }
    if (lane < TILE) {
        put<BLENDS>(work, lane, lane < tensor.present, list + offset, modality, weights);
    }
    dtype = tensor.dtype;
    __syncwarp();
    return dots || blends;
}

template <bool DOTS, bool BLENDS>
__device__ __forceinline__ void pass(const TableArgs &table, const BlenderArgs &blender,
                                     const ObservationArgs &observation, uint32_t what, Shared &shared) {
    const uint32_t thread = threadIdx.x, k = blender.modalities;
    if (BLENDS && thread < k) {
        shared.weights[thread] = at<State>(blender.state)->weights_f32[thread];
    }
    if (thread == 0) {
        shared.span = blockIdx.x;
    }
    __syncthreads();
    // No plan has more than 2^31 spans.
    while (shared.span < table.count) {
        Work &work = shared.work[thread / WARP];
        uint32_t next = 0;
        if (thread == 0) {
            // Asked for early, and not touched before it is needed: the answer comes while the chunk is looked up.
            next = atomicInc(&at<Progress>(blender.progress)->claimed, UINT32_MAX);
        }
        const Span span = at<const Span>(table.spans)[shared.span];
        // All warps share a chunk that is alone in its span.
        const bool alone = span.end - span.first == 1;
        const uint32_t number = alone ? span.first : span.first + thread / WARP;
        for (uint32_t i = thread % WARP; DOTS && i < 2 * k; i += WARP) {
            work.sums[i] = 0.0;
        }
        uint32_t dtype = F32;
        const bool works =
            number < span.end && look_up<DOTS, BLENDS>(table, blender, what, shared.weights, number, alone ? THREADS_PER_BLOCK : WARP, dtype, work);
        if (thread == 0) {
            shared.next = gridDim.x + next;
        }
        if (works) {
            if (dtype == F32) {
                take<Float, DOTS, BLENDS>(work, shared.weights, blender.zeros, k);
            } else if (dtype == F16) {
                take<Half, DOTS, BLENDS>(work, shared.weights, blender.zeros, k);
            } else {
                take<Bfloat, DOTS, BLENDS>(work, shared.weights, blender.zeros, k);
            }
        }
        __syncwarp();
        const uint64_t index = shared.span;
        // The next span's work waits until all have done with this one's.
        __syncthreads();
        if (thread == 0) {
            shared.span = shared.next;
        }
        if (DOTS && thread < 2 * k) {
            double sum = 0.0;
            for (uint32_t warp = 0; warp < WARPS; ++warp) {
                sum += shared.work[warp].sums[thread];
            }
            at<double>(table.partials)[index * 2 * k + thread] = sum;
        }
        __syncthreads();
    }
    finish<DOTS>(table, blender, observation, what, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, MIN_BLOCKS_PER_SM)
    dot(const __grid_constant__ TableArgs table, const __grid_constant__ BlenderArgs blender,
        const __grid_constant__ ObservationArgs observation, uint32_t what) {
    __shared__ Shared shared;
    pass<true, false>(table, blender, observation, what, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, MIN_BLOCKS_PER_SM)
    blend(const __grid_constant__ TableArgs table, const __grid_constant__ BlenderArgs blender,
        const __grid_constant__ ObservationArgs observation, uint32_t what) {
    __shared__ Shared shared;
    pass<false, true>(table, blender, observation, what, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS_PER_BLOCK, MIN_BLOCKS_PER_SM)
    dot_blend(const __grid_constant__ TableArgs table, const __grid_constant__ BlenderArgs blender,
        const __grid_constant__ ObservationArgs observation, uint32_t what) {
    __shared__ Shared shared;
    pass<true, true>(table, blender, observation, what, shared);
}
