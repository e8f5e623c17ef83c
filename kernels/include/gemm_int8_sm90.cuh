// What gemm_int8_sm90.cu is compiled for, and the names that follow from it.
#pragma once
#include "gemm_blocks_sm90.cuh"
#include "int8.cuh"

// What the host chose (HopperInt8Config in kqprefill/backends/cuda/gemm/int8_hopper.py), and the sizes that follow.
struct Config : BlockConfig {
    static constexpr bool kWhole = WHOLE;      // whether all matrices have whole fours of rows
    static constexpr int kStageSteps = STEPS;  // groups of columns in a stage of the ring

    // All int8 tiles are alike: what row_tiles.cuh takes for a format is the number of the matrix.
    struct Formats {
        __device__ static uint64_t row_tile_bytes(int, int groups) {
            return static_cast<uint64_t>(groups) * kInt8TileBytes;
        }
    };
    static constexpr int kXBytes = kTokens * kRotated, kWBytes = kBlockTiles * kInt8TileBytes;  // of a step
    static constexpr int kStepBytes = kWBytes + kXBytes;
    // gate's and up's atoms take turns, so that a thread has both of a feature; so do those of the halves of a head.
    static constexpr bool kPaired = kGated || kHeadDim;
    static constexpr int kCopyBytes = kPaired ? kAtomBytes : kInt8TileBytes, kCopies = kWBytes / kCopyBytes;
    static constexpr int kCopiesOfWarp = kCopies > 4 ? ceil_div(kCopies, 2) : kCopies;  // that one warp asks for

    using Steps = Ring<kStages, kStageSteps * kStepBytes>;
    // After the ring come its barriers and the tiles that are announced, and what the last step's 64 rows may reach
    // into; then what the epilogue needs.
    static constexpr int kAnnouncedOffset = Steps::kBytes + Steps::kBarrierBytes;
    static constexpr int kAfter = kTiles == 1 ? kInt8TileBytes : Steps::kBarrierBytes + Announced::kBytes;
    static_assert(Steps::kBarrierBytes + Announced::kBytes <= kInt8TileBytes, "what the host counts with");
    static constexpr int kEpilogueOffset = Steps::kBytes + kAfter, kSharedBytes = kEpilogueOffset + EPILOGUE_BYTES;

    static_assert(kCopies <= 32, "a lane makes each copy of a step");
    static_assert(kSharedBytes <= SHARED_BYTES, "what the host launches with");
};

// Weights that are read for at most so many tokens leave the L2 cache to what stays longer. Of more tokens some blocks
// would find that row tiles have gone which others had brought (docs/tried.md).
constexpr int kPassing = 128;
using Accumulators = int[Config::kTokens / 2];
