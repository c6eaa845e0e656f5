// The descriptor of a chunk: addresses, weights and length of the chunk that a warp processes.
#pragma once

#include "common.cuh"

// Most modalities of a tile. A tensor with more of them is processed in groups of as many, and t and g are read again
// for each group. 8 modalities, t and g in units of 16 bytes take 40 of the 128 registers of a thread.
constexpr int TILE_MODALITIES = 8;

// Positions of a tile's buffers.
constexpr int TRAIN = 0, VALID = 1, BLENDED = 2, MODALITY = 3, BUFFERS = MODALITY + TILE_MODALITIES;

// The chunk that a warp processes, alone or with the other warps of its thread block. It is in shared memory, and
// volatile so that the compiler keeps no copies in registers, which the tile needs.
struct ChunkDescriptor {
    volatile uint64_t buffers[BUFFERS];  // addresses of the chunk's first element: t, g, blend, modalities of the group
    volatile float weights[TILE_MODALITIES];  // of the group
    volatile uint64_t modality_addresses;     // table: buffers of the tensor's modalities, the present ones first
    volatile uint64_t modality_indices;       // table: which modalities these are
    volatile uint64_t byte_offset;            // of the chunk in each buffer of the tensor
    volatile uint32_t rest;                   // bit n: the blend adds entry n of the table after the first group
    volatile uint32_t len, alignment;
    volatile uint32_t present;  // modalities that are read: for products all present ones, else those of weight not 0
    volatile uint32_t threads;  // that share the chunk
    volatile uint32_t what;     // DOT, BLEND and ACCUMULATE, as far as they apply to the tensor
};

// Puts a modality at `position` of the group. An absent one gets the weight 0, with which a blend adds nothing.
template <bool BLENDS>
__device__ __forceinline__ void set_modality(ChunkDescriptor &chunk, uint32_t position, bool present, uint64_t buffer,
                                             uint32_t modality, const float *weights) {
    chunk.buffers[MODALITY + position] = buffer;
    if (BLENDS) {
        chunk.weights[position] = present ? weights[modality] : 0.0f;
    }
}

// Loads the group of modalities that starts at `first` into the descriptor, for products.
template <bool BLENDS>
__device__ __forceinline__ void load_group(ChunkDescriptor &chunk, const float *weights, uint32_t first) {
    const uint32_t lane = threadIdx.x % WARP;
    // All lanes have read the previous group.
    __syncwarp();
    if (lane < TILE_MODALITIES) {
        const bool present = first + lane < chunk.present;
        const uint32_t n = present ? first + lane : first;
        set_modality<BLENDS>(chunk, lane, present, at<const uint64_t>(chunk.modality_addresses)[n] + chunk.byte_offset,
                             at<const uint32_t>(chunk.modality_indices)[n], weights);
    }
    __syncwarp();
}

// Loads the descriptor of a chunk, with the first group of modalities; returns whether the pass has work there.
template <bool DOTS, bool BLENDS>
__device__ __forceinline__ bool load_chunk(const TableArgs &table, uint32_t modalities, uint32_t what, uint32_t index,
                                           uint32_t threads, const float *weights, uint32_t &dtype,
                                           ChunkDescriptor &descriptor) {
    const uint32_t lane = threadIdx.x % WARP;
    const Chunk chunk = at<const Chunk>(table.chunks)[index];
    // All of the tensor's table is read at once, before the number of its modalities is known.
    const uint64_t slots = static_cast<uint64_t>(chunk.tensor) * modalities;
    const uint64_t slot = slots + (lane < modalities ? lane : 0);
    const uint64_t buffer = at<const uint64_t>(table.addresses)[slot];
    const uint32_t modality = at<const uint32_t>(table.indices)[slot];
    const TensorRecord tensor = at<const TensorRecord>(table.tensors)[chunk.tensor];
    const uint64_t offset = chunk.start * (tensor.dtype == F32 ? 4 : 2);
    const bool present = lane < tensor.present, weighted = BLENDS && present && weights[modality] != 0.0f;
    const bool adds = what & ACCUMULATE;
    const bool dots = DOTS && tensor.train != 0 && tensor.present != 0;
    const bool blends = BLENDS && tensor.blended != 0 && (__any_sync(0xffffffffu, weighted) || !adds);
    // The modalities that are read come first, in their order.
    const uint32_t read = __ballot_sync(0xffffffffu, dots ? present : weighted), before = (1u << lane) - 1;
    const bool is_read = read >> lane & 1;
    const uint32_t position = is_read ? __popc(read & before) : __popc(read) + __popc(~read & before);
    const uint32_t rest = __ballot_sync(0xffffffffu, weighted && position >= TILE_MODALITIES);
    if (lane == 0) {
        descriptor.buffers[TRAIN] = tensor.train + offset;
        descriptor.buffers[VALID] = tensor.valid + offset;
        descriptor.buffers[BLENDED] = tensor.blended + offset;
        descriptor.modality_addresses = table.addresses + slots * sizeof(uint64_t);
        descriptor.modality_indices = table.indices + slots * sizeof(uint32_t);
        descriptor.byte_offset = offset;
        descriptor.rest = rest;
        descriptor.len = chunk.len;
        descriptor.alignment = tensor.alignment;
        descriptor.present = __popc(read);
        descriptor.threads = threads;
        descriptor.what = (dots ? DOT : 0) | (blends ? BLEND : 0) | (adds ? ACCUMULATE : 0);
    }
    if (position < TILE_MODALITIES) {
        set_modality<BLENDS>(descriptor, position, is_read, buffer + offset, modality, weights);
    }
    dtype = tensor.dtype;
    __syncwarp();
    return dots || blends;
}
