// What gemm_int8_sm90.cu is compiled for, and the names that follow from it.
#pragma once
#include "gemm_blocks_sm90.cuh"
#include "int8.cuh"

// One output tile: rows first .. end - 1 of x, by the matrix `expert` of a stack, if there is one; its column tile; and
// how many come after it for this block.
struct OutputTile {
    int first, end, expert, column_tile, left;

    __device__ __forceinline__ static OutputTile of(const OutputTiles& at) {
        int token_tile = at.token_tile(), step = gridDim.x / BlockConfig::kCluster;
        return {at.x.first(token_tile), at.x.end(token_tile), at.x.expert(token_tile), at.column_tile(),
                (at.tiles - 1 - at.index) / step};
    }
    // The number of row tile `own` of this block, of a launch that has so many row tiles.
    __device__ __forceinline__ int row_tile(int row_tiles, int own) const {
        constexpr int kOfCluster = BlockConfig::kCluster * BlockConfig::kBlockTiles;
        return row_tile_of_block(column_tile, ceil_div(row_tiles, kOfCluster), own);
    }
};

// The output tiles that a block's consumers make next. To look one up takes some 0.4 µs, so the producer of x,
// which is ahead of them, does it: it puts the tile here before it fills the first stage of the ring that belongs to
// it. The ring holds stages of kStages tiles at most. One place more is for the tile whose last stage consumers have
// released, while they still write its outputs.
struct TileQueue {
    static constexpr int kPlaces = BlockConfig::kStages + 1;
    static constexpr int kBytes = ceil_div(kPlaces * sizeof(OutputTile), 128) * 128;  // what follows is aligned

    OutputTile* places;  // of shared memory
    int index = 0;

    __device__ __forceinline__ OutputTile& next() {
        OutputTile& tile = places[index];
        index = index == kPlaces - 1 ? 0 : index + 1;
        return tile;
    }
};

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
