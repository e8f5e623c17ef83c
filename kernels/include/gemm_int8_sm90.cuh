// What gemm_int8_sm90.cu is compiled for, and the names that follow from it.
#pragma once
#include "angles_sm90.cuh"
#include "int8.cuh"
#include "row_tiles.cuh"
#include "scheduler.cuh"
#include "sm90.cuh"

// What the host chose (HopperInt8Config in kqprefill/backends/cuda/gemm/int8_hopper.py), and the sizes that follow.
struct Config {
    static constexpr bool kGated = GATED;           // whether this is gemm_gated
    static constexpr bool kActivated = ACTIVATED;   // whether this is gemm_activated
    static constexpr int kHeadDim = HEAD_DIM;       // of gemm_heads' heads, else 0; with none of these, gemm_linear
    static constexpr bool kGrouped = GROUPED;       // whether x's rows come in groups, each with a matrix of a stack
    static constexpr bool kWhole = WHOLE;           // whether all matrices have whole fours of rows
    static constexpr int kTokens = TOKENS;          // in a token tile
    static constexpr int kWarpgroups = WARPGROUPS;  // of consumers in a block
    static constexpr int kTiles = TILES;            // row tiles of a consumer warpgroup
    static constexpr int kBlocks = BLOCKS;          // that share a multiprocessor
    static constexpr int kCluster = CLUSTER;        // blocks of a cluster: they have the same token tile
    static constexpr int kSharers = SHARERS;        // those that share the tokens that they bring: all of it, or one
    static constexpr int kStages = STAGES, kStageSteps = STEPS;    // of the ring; groups of columns in a stage of it
    static constexpr int kProducerRegisters = PRODUCER_REGISTERS;  // of a thread
    static constexpr int kConsumerRegisters = CONSUMER_REGISTERS;

    // All int8 tiles are alike: what row_tiles.cuh takes for a format is the number of the matrix.
    struct Formats {
        __device__ static uint64_t row_tile_bytes(int, int groups) {
            return static_cast<uint64_t>(groups) * kInt8TileBytes;
        }
    };
    static constexpr int kBlockTiles = kWarpgroups * kTiles;                                    // row tiles of a block
    static constexpr int kXBytes = kTokens * kRotated, kWBytes = kBlockTiles * kInt8TileBytes;  // of a step
    static constexpr int kStepBytes = kWBytes + kXBytes;
    // gate's and up's atoms take turns, so that a thread has both of a feature; so do those of the halves of a head.
    static constexpr bool kPaired = kGated || kHeadDim;
    static constexpr int kCopyBytes = kPaired ? kAtomBytes : kInt8TileBytes, kCopies = kWBytes / kCopyBytes;
    static constexpr int kConsumers = 128 * kWarpgroups, kThreads = kConsumers + 128;

    using Steps = Ring<kStages, kStageSteps * kStepBytes>;
    // After the ring come its barriers, and what the last step's 64 rows may reach into; then what the epilogue needs.
    static constexpr int kAfter = kTiles == 1 ? kInt8TileBytes : Steps::kBarrierBytes;
    static constexpr int kEpilogueOffset = Steps::kBytes + kAfter, kSharedBytes = kEpilogueOffset + EPILOGUE_BYTES;

    static_assert(kTiles == 1 || kTiles == 2, "wgmma's 64 rows are those of one or two row tiles");
    static_assert(!kGated || kTiles == 2, "gate and up: a row tile of each");
    static_assert(!kHeadDim || kTiles == 2, "a thread has a column of a head, and that half a head beyond");
    static_assert(kHeadDim != 128 || kWarpgroups * kCluster % 2 == 0, "a cluster has whole heads");
    static_assert(kSharers == 1 || kSharers == kCluster, "each block of a cluster brings as much");
    static_assert(kCopies <= 32, "a lane makes each copy of a step");
    static_assert(kTokens % 16 == 0, "gemm_gated's threads trade outputs of 16 tokens");
    static_assert(kStages >= 2, "a stage is released when the next has begun");
    static_assert(THREADS == kThreads, "what the host launches");
    static_assert(kSharedBytes <= SHARED_BYTES, "what the host launches with");
};

constexpr int kTogether = 8;  // token tiles that share W's row tiles while these are in the L2 cache
// Weights that are read for at most so many tokens leave the L2 cache to what stays longer. Of more tokens some blocks
// would find that row tiles have gone which others had brought (docs/tried.md).
constexpr int kPassing = 128;
using Tokens = TokenTiles<Config::kTokens, Config::kGrouped>;

// The blocks of a cluster take the same token tile and neighbouring row tiles.
using OutputTiles = Scheduler<Tokens, Config::kBlockTiles * Config::kCluster, kTogether, true, Config::kCluster>;
using Angles = AngleStages<Config>;
using RingPlace = ConsumerPosition<Config::kStages>;
using Accumulators = int[Config::kTokens / 2];

// The number of row tile `own` of this block in an output tile.
__device__ __forceinline__ int row_tile_number(const OutputTiles& outputs, int own) {
    own += blockIdx.x % Config::kCluster * Config::kBlockTiles;
    return row_tile_number<Config>(outputs.column_tile(), outputs.column_tiles(), own);
}
