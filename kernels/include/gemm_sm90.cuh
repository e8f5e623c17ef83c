// What gemm_sm90.cu is compiled for, and the names that follow from it.
#pragma once
#include "angles_sm90.cuh"
#include "operand.cuh"
#include "row_tiles.cuh"
#include "scheduler.cuh"
#include "sm90.cuh"
#include "../quants/all.cuh"
#include "../quants/format_list.cuh"

// What the host chose (HopperConfig in kqprefill/backends/cuda/gemm/hopper.py), and the sizes that follow from it.
struct Config {
    static constexpr bool kGated = GATED;           // whether this is gemm_gated
    static constexpr bool kActivated = ACTIVATED;   // whether this is gemm_activated
    static constexpr int kHeadDim = HEAD_DIM;       // of gemm_heads' heads, else 0; with none of these, gemm_linear
    static constexpr bool kGrouped = GROUPED;       // whether x's rows come in groups, each with a matrix of a stack
    using Formats = FormatList<FORMATS>;            // the block formats that the launch's matrices may have
    static constexpr int kTokens = TOKENS;          // in a token tile
    static constexpr int kWarpgroups = WARPGROUPS;  // of consumers in a block
    static constexpr int kTiles = TILES;            // row tiles of a consumer warpgroup
    static constexpr int kBlocks = BLOCKS;          // that share a multiprocessor
    static constexpr int kCluster = CLUSTER;        // blocks of a cluster: they have the same token tile
    static constexpr int kSharers = SHARERS;        // those that share the tokens that they bring: all of it, or one
    static constexpr int kMostSteps = STEPS;        // steps that a stage of x has at most
    static constexpr int kStages = STAGES;          // of the ring of x
    static constexpr int kRawStages = RAW_STAGES;   // of the ring of weight tiles
    static constexpr int kProducerRegisters = PRODUCER_REGISTERS;  // of a thread
    static constexpr int kConsumerRegisters = CONSUMER_REGISTERS;

    static constexpr int kStep = kOperandGroup;                    // columns that are multiplied at a time
    static constexpr int kUnitSteps = Formats::kElements / kStep;  // steps that one unit of W gives
    static constexpr int kStageSteps = kMostSteps < kUnitSteps ? kMostSteps : kUnitSteps;  // of a stage of x
    static constexpr int kBlockTiles = kWarpgroups * kTiles;                               // row tiles of a block
    static constexpr int kStepBytes = kTokens * kStep * 2, kStageBytes = kStageSteps * kStepBytes;
    static constexpr int kRawStageBytes = kBlockTiles * Formats::kTileBytes;
    static constexpr int kConsumers = 128 * kWarpgroups, kThreads = kConsumers + 128;

    using XRing = Ring<kStages, kStageBytes>;
    using RawRing = Ring<kRawStages, kRawStageBytes>;
    // In shared memory: x's ring, the weight tiles' ring, the barriers of both, and what the epilogue needs.
    static constexpr int kRawOffset = XRing::kBytes, kBarrierOffset = kRawOffset + RawRing::kBytes;
    static constexpr int kEpilogueOffset = kBarrierOffset + XRing::kBarrierBytes + RawRing::kBarrierBytes;
    static constexpr int kSharedBytes = kEpilogueOffset + EPILOGUE_BYTES;

    static_assert(kTiles == 1 || kTiles == 2, "wgmma's 64 rows are those of one or two row tiles");
    static_assert(!kGated || kTiles == 2, "gate and up: a row tile of each");
    static_assert(!kHeadDim || kTiles == 2, "a thread has a column of a head, and that half a head beyond");
    static_assert(kHeadDim != 128 || kWarpgroups * kCluster % 2 == 0, "a cluster has whole heads");
    static_assert(kSharers == 1 || kSharers == kCluster, "each block of a cluster brings as much");
    static_assert(kTokens % 16 == 0, "threads trade outputs of 16 tokens");
    static_assert(kUnitSteps % kStageSteps == 0, "whole stages in a unit");
    static_assert(kStages >= 2 && kRawStages >= 2, "a stage is released when the next has begun");
    static_assert(THREADS == kThreads, "what the host launches");
    static_assert(kSharedBytes <= SHARED_BYTES, "what the host launches with");
};

constexpr int kTogether = 8;  // token tiles that share W's row tiles while these are in the L2 cache
// Weights that are read for at most so many tokens leave the L2 cache to what stays longer. Of more tokens some blocks
// would find that row tiles have gone which others had brought (docs/tried.md).
constexpr int kPassing = 512;
using Formats = Config::Formats;
using Tokens = TokenTiles<Config::kTokens, Config::kGrouped>;

// The blocks of a cluster take the same token tile and neighbouring row tiles.
using OutputTiles = Scheduler<Tokens, Config::kBlockTiles * Config::kCluster, kTogether, true, Config::kCluster>;
using Angles = AngleStages<Config>;
using RingPlace = ConsumerPosition<Config::kStages>;
using Accumulators = float[Config::kTokens / 2];

// The number of row tile `own` of this block in an output tile.
__device__ __forceinline__ int row_tile_number(const OutputTiles& outputs, int own) {
    own += blockIdx.x % Config::kCluster * Config::kBlockTiles;
    return row_tile_number<Config>(outputs.column_tile(), outputs.column_tiles(), own);
}

struct Rings {
    Config::XRing x;        // steps of x
    Config::RawRing raw;    // weight tiles, still quantised: one for each row tile of the block
    const uint8_t* shared;  // the generic address at which shared memory begins
};
