// A tile: the units of each buffer of a chunk that a thread holds in registers. load_tile, accumulate and store_tile
// are apart: all loads of a tile are issued before the first is used, so LOADS_IN_FLIGHT or more are in flight.
#pragma once

#include "chunk.cuh"
#include "vec128.cuh"

// Which buffers a tile loads.
struct TileLoads {
    bool products;   // t and g
    bool blended;    // the blend, to add to it
    int modalities;  // the first ones of the group
};

template <int N, int UNITS>
struct Tile {
    uint4 train[UNITS], valid[UNITS], blended[UNITS], modalities[UNITS][N];
    uint32_t offset[UNITS];  // bytes from the chunk's start
    uint32_t count[UNITS];   // elements inside the chunk
};

// Sums of one thread: c_k and d_k of the first and of the second halves of its units.
template <int N>
struct Products {
    float c[2][N], d[2][N];
};

// Units of each of so many buffers that make LOADS_IN_FLIGHT loads or a few more. A power of two, as the number of
// units of a whole chunk is, so that a whole chunk has whole tiles only.
__host__ __device__ constexpr int units_per_thread(int buffers) {
    int units = 1;
    while (units * buffers < static_cast<int>(LOADS_IN_FLIGHT)) {
        units *= 2;
    }
    return units;
}

// Calls load(wanted, buffer, i, unit) for each unit of a tile, in the order in which the loads are issued.
template <int N, int UNITS, class Load>
__device__ __forceinline__ void for_each_unit(const ChunkDescriptor &chunk, TileLoads loads, Tile<N, UNITS> &tile,
                                              const Load &load) {
    const uint64_t train = chunk.buffers[TRAIN], valid = chunk.buffers[VALID], blended = chunk.buffers[BLENDED];
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        load(loads.products, train, i, tile.train[i]);
        load(loads.products, valid, i, tile.valid[i]);
        load(loads.blended, blended, i, tile.blended[i]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const uint64_t modality = chunk.buffers[MODALITY + n];
#pragma unroll
        for (int i = 0; i < UNITS; ++i) {
            load(n < loads.modalities, modality, i, tile.modalities[i][n]);
        }
    }
}

// Loads a tile that reaches past the end of the chunk; elements outside the chunk are zero. `aligned`: to 16 bytes.
template <class T, int N, int UNITS>
__device__ __forceinline__ void load_last_tile(const ChunkDescriptor &chunk, TileLoads loads, uint64_t zeros,
                                               bool aligned, Tile<N, UNITS> &tile) {
    if (aligned) {
        for_each_unit(chunk, loads, tile, [&](bool wanted, uint64_t buffer, int i, uint4 &unit) {
            unit = load_unit_if(wanted && tile.count[i] == T::PER_UNIT, buffer + tile.offset[i], zeros);
        });
    }
    // The other units one after the other: their pieces of all buffers at once would not fit into registers.
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const auto load_from_all = [&](auto load) {
            const auto load_from = [&](bool wanted, int buffer) {
                return load(chunk.buffers[buffer] + tile.offset[i], wanted ? tile.count[i] * T::BYTES : 0);
            };
            tile.train[i] = load_from(loads.products, TRAIN);
            tile.valid[i] = load_from(loads.products, VALID);
            tile.blended[i] = load_from(loads.blended, BLENDED);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                tile.modalities[i][n] = load_from(n < loads.modalities, MODALITY + n);
            }
        };
        if (aligned && tile.count[i] % T::PER_UNIT != 0) {
            load_from_all(load_tail<T::BYTES>);
        } else if (!aligned && tile.count[i] != 0) {
            load_from_all(load_pieces<T::BYTES>);
        }
    }
}

// Loads the tile whose first unit starts at element `first`: the widest loads that the alignment allows, all of them
// issued before the first use and without a branch between them. GUARD: not all N modalities need be there.
template <class T, bool GUARD, int N, int UNITS>
__device__ __forceinline__ void load_tile(const ChunkDescriptor &chunk, TileLoads loads, uint64_t zeros, uint32_t first,
                                          Tile<N, UNITS> &tile) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        const uint32_t element = first + i * chunk.threads * T::PER_UNIT, len = chunk.len;
        tile.offset[i] = element * T::BYTES;
        tile.count[i] = element + T::PER_UNIT <= len ? T::PER_UNIT : element < len ? len - element : 0;
    }
    const uint32_t alignment = chunk.alignment;
    const bool whole = tile.count[UNITS - 1] == T::PER_UNIT;
    if (whole && alignment == 16) {
        for_each_unit(chunk, loads, tile, [&](bool wanted, uint64_t buffer, int i, uint4 &unit) {
            if (GUARD) {
                unit = load_unit_if(wanted, buffer + tile.offset[i], zeros);
            } else if (wanted) {
                unit = load_unit(buffer + tile.offset[i]);
            }
        });
    } else if (whole && alignment == 8) {
        for_each_unit(chunk, loads, tile, [&](bool wanted, uint64_t buffer, int i, uint4 &unit) {
            unit = load_pieces<8>(buffer + tile.offset[i], wanted ? 16 : 0);
        });
    } else if (whole && alignment == 4) {
        for_each_unit(chunk, loads, tile, [&](bool wanted, uint64_t buffer, int i, uint4 &unit) {
            unit = load_pieces<4>(buffer + tile.offset[i], wanted ? 16 : 0);
        });
    } else if (whole && T::BYTES == 2) {
        for_each_unit(chunk, loads, tile, [&](bool wanted, uint64_t buffer, int i, uint4 &unit) {
            unit = load_halves(wanted, buffer, tile.offset[i]);
        });
    } else {
        load_last_tile<T>(chunk, loads, zeros, alignment == 16, tile);
    }
}

__device__ __forceinline__ uint32_t word_of(const uint4 &unit, uint32_t word) {
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
    return words[word];
}

// Adds the modalities after the first group to a word of the blend, of which `count` elements are inside the chunk.
template <class T>
__device__ __forceinline__ void blend_rest(const ChunkDescriptor &chunk, const float *weights, uint32_t offset,
                                           uint32_t count, float (&sum)[T::PER_WORD]) {
#pragma unroll 1
    for (uint32_t rest = chunk.rest; rest != 0; rest &= rest - 1) {
        const uint32_t n = __popc(~rest & (rest - 1));  // the lowest bit
        const uint64_t address = at<const uint64_t>(chunk.modality_addresses)[n] + chunk.byte_offset + offset;
        const float weight = weights[at<const uint32_t>(chunk.modality_indices)[n]];
        uint4 unit;
        if (T::BYTES == 4 || (count == T::PER_WORD && chunk.alignment >= 4)) {
            unit = load_pieces<4>(address, count != 0 ? 4 : 0);
        } else {
            unit = load_pieces<T::BYTES>(address, count * T::BYTES);
        }
        float x[T::PER_WORD];
        T::widen(unit.x, x);
#pragma unroll
        for (uint32_t e = 0; e < T::PER_WORD; ++e) {
            sum[e] = fmaf(weight, x[e], sum[e]);
        }
    }
}

// Adds the products of unit i of a tile to `products`, and replaces its `blended` by the blend of all modalities. One
// word at a time: that keeps few elements in registers as f32.
template <class T, bool DOTS, bool BLENDS, int N, int UNITS>
__device__ __forceinline__ void accumulate_unit(const ChunkDescriptor &chunk, const float *weights, bool blends, int i,
                                                Tile<N, UNITS> &tile, Products<N> &products) {
    uint32_t words[4];
#pragma unroll
    for (uint32_t word = 0; word < 4; ++word) {
        float train[T::PER_WORD], valid[T::PER_WORD], sum[T::PER_WORD];
        T::widen(word_of(tile.train[i], word), train);
        T::widen(word_of(tile.valid[i], word), valid);
        T::widen(word_of(tile.blended[i], word), sum);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float weight = BLENDS ? chunk.weights[n] : 0.0f;
            float &c = products.c[word / 2][n], &d = products.d[word / 2][n];
            float x[T::PER_WORD];
            T::widen(word_of(tile.modalities[i][n], word), x);
#pragma unroll
            for (uint32_t e = 0; e < T::PER_WORD; ++e) {
                if (DOTS) {
                    c = fmaf(valid[e], x[e], c);
                    d = fmaf(train[e] - valid[e], x[e], d);
                }
                // A weight of 0 adds nothing, whereas 0 times an infinity is NaN.
                if (BLENDS && weight != 0.0f) {
                    sum[e] = fmaf(weight, x[e], sum[e]);
                }
            }
        }
        if (BLENDS && N == TILE_MODALITIES && blends) {
            const uint32_t before = word * T::PER_WORD, left = tile.count[i] > before ? tile.count[i] - before : 0;
            blend_rest<T>(chunk, weights, tile.offset[i] + word * 4, left < T::PER_WORD ? left : T::PER_WORD, sum);
        }
        words[word] = T::narrow(sum);
    }
    tile.blended[i] = make_uint4(words[0], words[1], words[2], words[3]);
}

// Adds the products of a tile to `products`, and computes its blend in `tile.blended`.
template <class T, bool DOTS, bool BLENDS, int N, int UNITS>
__device__ __forceinline__ void accumulate(const ChunkDescriptor &chunk, const float *weights, bool blends,
                                           Tile<N, UNITS> &tile, Products<N> &products) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        accumulate_unit<T, DOTS, BLENDS>(chunk, weights, blends, i, tile, products);
    }
}

// Stores `count` elements of a unit of the blend, by the widest stores that the alignment allows.
template <class T>
__device__ __forceinline__ void store_blended(const ChunkDescriptor &chunk, uint32_t offset, uint32_t count,
                                              uint4 unit) {
    const uint64_t address = chunk.buffers[BLENDED] + offset;
    const uint32_t alignment = chunk.alignment;
    const bool whole = count == T::PER_UNIT;
    if (whole && alignment == 16) {
        store_unit(address, unit);
    } else if (whole && alignment == 8) {
        store_pieces<8>(address, 16, unit);
    } else if (T::BYTES == 2 && whole && alignment == 4) {
        store_pieces<4>(address, 16, unit);
    } else {
        store_pieces<T::BYTES>(address, count * T::BYTES, unit);
    }
}

template <class T, int N, int UNITS>
__device__ __forceinline__ void store_tile(const ChunkDescriptor &chunk, const Tile<N, UNITS> &tile) {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
        store_blended<T>(chunk, tile.offset[i], tile.count[i], tile.blended[i]);
    }
}
