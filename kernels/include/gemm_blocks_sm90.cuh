// What the blocks of Hopper's GEMMs (gemm_sm90.cu, gemm_int8_sm90.cu, gemm_int8_short_sm90.cu) have in common: what the
// host chose for them (kqprefill/backends/cuda/gemm: TileConfig in tiles.py, int8_short.py), and the names that follow.
#pragma once
#include "angles_sm90.cuh"
#include "row_tiles.cuh"
#include "scheduler.cuh"
#include "sm90.cuh"

struct BlockConfig {
    static constexpr bool kGated = GATED;           // whether this is gemm_gated
    static constexpr bool kActivated = ACTIVATED;   // whether this is gemm_activated
    static constexpr int kHeadDim = HEAD_DIM;       // of gemm_heads' heads, else 0; with none of these, gemm_linear
    static constexpr bool kGrouped = GROUPED;       // whether x's rows come in groups, each with a matrix of a stack
    static constexpr int kTokens = TOKENS;          // that are multiplied at a time
    static constexpr int kWarpgroups = WARPGROUPS;  // of consumers in a block
    static constexpr int kTiles = TILES;            // row tiles of a consumer warpgroup
    static constexpr int kBlocks = BLOCKS;          // that share a multiprocessor
    static constexpr int kCluster = CLUSTER;        // blocks of a cluster: they have the same token tile
    static constexpr int kSharers = SHARERS;        // those that share the tokens that they bring: all of it, or one
    static constexpr int kStages = STAGES;          // of the ring that brings x
    static constexpr int kProducerRegisters = PRODUCER_REGISTERS;  // of a thread
    static constexpr int kConsumerRegisters = CONSUMER_REGISTERS;

    static constexpr int kBlockTiles = kWarpgroups * kTiles;  // row tiles of a block
    static constexpr int kConsumers = 128 * kWarpgroups, kThreads = kConsumers + 128;

    static_assert(kTiles == 1 || kTiles == 2, "wgmma's 64 rows are those of one or two row tiles");
    static_assert(!kGated || kTiles == 2, "gate and up: a row tile of each");
    static_assert(!kHeadDim || kTiles == 2, "a thread has a column of a head, and that half a head beyond");
    static_assert(kHeadDim != 128 || kWarpgroups * kCluster % 2 == 0, "a cluster has whole heads");
    static_assert(kSharers == 1 || kSharers == kCluster, "each block of a cluster brings as much");
    static_assert(kTokens % 16 == 0, "threads trade outputs of 16 tokens");
    static_assert(kStages >= 2, "a stage is released when the next has begun");
    static_assert(THREADS == kThreads, "what the host launches");
};

constexpr int kTogether = 8;  // token tiles that share W's row tiles while these are in the L2 cache
using Tokens = TokenTiles<BlockConfig::kTokens, BlockConfig::kGrouped>;
using Angles = AngleStages<BlockConfig>;
using RingPlace = ConsumerPosition<BlockConfig::kStages>;

// The blocks of a cluster take the same token tile and neighbouring row tiles.
using OutputTiles =
    Scheduler<Tokens, BlockConfig::kBlockTiles * BlockConfig::kCluster, kTogether, true, BlockConfig::kCluster>;

// The number of row tile `own` of this block, where its cluster has that one of so many column tiles.
__device__ __forceinline__ int row_tile_of_block(int column_tile, int column_tiles, int own) {
    own += blockIdx.x % BlockConfig::kCluster * BlockConfig::kBlockTiles;
    return row_tile_number<BlockConfig>(column_tile, column_tiles, own);
}

__device__ __forceinline__ uint8_t* block_memory() {
    extern __shared__ __align__(1024) uint8_t shared[];
    return shared;
}
