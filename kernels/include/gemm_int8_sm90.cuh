// What gemm_int8_sm90.cu is compiled for, and the names that follow from it.
#pragma once
#include "int8_tiles_sm90.cuh"

// What the host chose (HopperInt8Config in kqprefill/backends/cuda/gemm/int8_hopper.py), and the sizes that follow.
struct Config : BlockConfig {
    static constexpr bool kWhole = WHOLE;      // whether all matrices have whole fours of rows
    static constexpr int kStageSteps = STEPS;  // groups of columns in a stage of the ring

    using Formats = Int8Tiles;
    static constexpr int kXBytes = kTokens * kRotated, kWBytes = kBlockTiles * kInt8TileBytes;  // of a step
    static constexpr int kStepBytes = kWBytes + kXBytes;
    // gate's and up's atoms take turns, so that a thread has both of a feature; so do those of the halves of a head.
    static constexpr bool kPaired = kGated || kHeadDim;
    static constexpr int kCopyBytes = kPaired ? kAtomBytes : kInt8TileBytes, kCopies = kWBytes / kCopyBytes;
    // Those that a warp asks for: more than a few are two warps'.
    static constexpr int kCopiesOfWarp = kCopies > 4 ? ceil_div(kCopies, 2) : kCopies;

    using Steps = Ring<kStages, kStageSteps * kStepBytes>;
    // After the ring come its barriers and the queue of tiles, then what the epilogue needs. With one row tile the 64
    // rows of the last step reach beyond the ring: what they read there nobody looks at.
    static constexpr int kQueueOffset = Steps::kBytes + Steps::kBarrierBytes;
    static constexpr int kAfter = kTiles == 1 ? kInt8TileBytes : Steps::kBarrierBytes + TileQueue::kBytes;
    static_assert(Steps::kBarrierBytes + TileQueue::kBytes <= kInt8TileBytes, "what the host counts with");
    static constexpr int kEpilogueOffset = Steps::kBytes + kAfter, kSharedBytes = kEpilogueOffset + EPILOGUE_BYTES;

    static_assert(kCopiesOfWarp <= 32, "a lane asks for each copy of a step");
    static_assert(kSharedBytes <= SHARED_BYTES, "what the host launches with");
};

// Weights that are read for at most so many tokens leave the L2 cache to what stays longer. Of more tokens some blocks
// would find that row tiles have gone which others had brought (docs/tried.md).
constexpr int kPassing = 128;
using Accumulators = int[Config::kTokens / 2];
