// What Hopper's two kernels for products in int8 (gemm_int8_sm90.cu, gemm_int8_short_sm90.cu) have in common.
#pragma once
#include "gemm_blocks_sm90.cuh"
#include "int8.cuh"

// All int8 tiles are alike: what row_tiles.cuh takes for a format is the number of the matrix.
struct Int8Tiles {
    __device__ static uint64_t row_tile_bytes(int, int groups) {
        return static_cast<uint64_t>(groups) * kInt8TileBytes;
    }
};

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
// it. The ring holds stages of kStages tiles at most. One place more, as a tile may be
// read again after its last stage was released.
struct TileQueue {
    static constexpr int kPlaces = BlockConfig::kStages + 1;
    static constexpr int kBytes = ceil_div(kPlaces * sizeof(OutputTile), 128) * 128;  // what follows is aligned

    OutputTile* places;  // of shared memory
    int index = 0;

    __device__ __forceinline__ void put(const OutputTile& tile) { places[index] = tile, next(); }

    // The tile, for all lanes of a warp. The lane reads it that releases stages to this block's producer: so its reads
    // are before what the producer writes next.
    template <int kSharers>
    __device__ __forceinline__ OutputTile get() const {
        int reader = releasing_lane<kSharers>();
        OutputTile tile = {};
        if (threadIdx.x % 32 == reader) tile = places[index];
        auto known = [&](int field) { return __shfl_sync(0xffffffffu, field, reader); };
        return {known(tile.first), known(tile.end), known(tile.expert), known(tile.column_tile), known(tile.left)};
    }
    __device__ __forceinline__ void next() { index = index == kPlaces - 1 ? 0 : index + 1; }
};
