// Which output tile of a GEMM a block makes next. An output tile is a token tile (some rows of x) by a column tile (some rows
// of W, which are columns of the output).
#pragma once
#include "groups.cuh"
#include "types.cuh"

// The token tiles of x, of at most kTokens rows. Where kGrouped, x's rows come in groups, each multiplied by a matrix of its
// own (an expert's), and a kernel before this one has listed the tiles; else there is one matrix, and x has m rows.
template <int kTokens, bool kGrouped>
struct TokenTiles {
    int m;
    const Group* groups;
    const int* group_count;

    __device__ int count() const { return kGrouped ? *group_count : ceil_div(m, kTokens); }
    __device__ int first(int tile) const { return kGrouped ? groups[tile].first : tile * kTokens; }
    __device__ int end(int tile) const { return kGrouped ? groups[tile].end : m; }
    __device__ int expert(int tile) const { return kGrouped ? groups[tile].expert : 0; }
};

// Where an output tile is.
struct TilePosition {
    int token_tile, column_tile;
};

// Output tiles are numbered such that kTogether token tiles take turns at a column tile while this is in the L2 cache, then at
// the next column tile; when these are done, further token tiles follow.
template <int kTogether>
__device__ __forceinline__ TilePosition tile_position(int index, int token_tiles, int column_tiles) {
    int band = index / (kTogether * column_tiles), within = index % (kTogether * column_tiles);
    int height = min(kTogether, token_tiles - band * kTogether);
    return {band * kTogether + within % height, within / height};
}

// The output tiles of a block of a persistent grid, one after another; all blocks of a cluster are at the same one. W has
// `columns` columns of outputs (or units of several), kColumns in a column tile.
template <class Tokens, int kColumns, int kTogether, int kCluster = 1>
struct Scheduler {
    const Tokens& x;
    int columns, count, index;

    __device__ Scheduler(const Tokens& x, int columns)
        : x(x), columns(columns), count(x.count() * ceil_div(columns, kColumns)), index(blockIdx.x / kCluster) {}
    __device__ bool more() const { return index < count; }
    __device__ void next() { index += gridDim.x / kCluster; }
    __device__ TilePosition at() const {
        return tile_position<kTogether>(index, x.count(), ceil_div(columns, kColumns));
    }

    // Goes on to the first tile, from this one on, whose expert is one of first .. last - 1.
    __device__ void skip_absent(int first, int last) {
        for (; more(); next()) {
            int expert = x.expert(at().token_tile) - first;
            if (expert >= 0 && expert < last - first) break;
        }
    }
};
