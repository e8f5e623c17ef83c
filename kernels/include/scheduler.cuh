// Which output tile of a GEMM a block makes next. An output tile is a token tile (some rows of x) by a column tile
// (some rows of W, which are columns of the output).
#pragma once
#include "groups.cuh"
#include "types.cuh"

// The token tiles of x. Where kGrouped, x's rows come in groups, each multiplied by a matrix of its own (an expert's),
// and a kernel before this one has listed the tiles, of as many rows as the host said; else there is one matrix, and
// tiles are of kTokens of x's m rows.
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

// The output tiles of a block of a persistent grid, one after another; all blocks of a cluster are at the same one. W
// has `columns` columns of outputs (or units of several), kColumns of them in a column tile. Output tiles are numbered
// in bands of kTogether token tiles: these take turns at a column tile while it is in the L2 cache, then at the next
// column tile. kKeepsCount: whether the number of token tiles is kept in a register, or read again for each output
// tile.
template <class Tokens, int kColumns, int kTogether, bool kKeepsCount, int kCluster = 1>
struct Scheduler {
    const Tokens& x;
    int columns, kept_count, index, tiles;

    __device__ Scheduler(const Tokens& x, int columns)
        : x(x),
          columns(columns),
          kept_count(x.count()),
          index(blockIdx.x / kCluster),
          tiles(kept_count * column_tiles()) {}
    __device__ int token_tiles() const { return kKeepsCount ? kept_count : x.count(); }
    __device__ int column_tiles() const { return ceil_div(columns, kColumns); }
    __device__ bool more() const { return index < tiles; }
    __device__ void next() { index += gridDim.x / kCluster; }

    __device__ int band() const { return index / (kTogether * column_tiles()); }
    __device__ int within_band() const { return index % (kTogether * column_tiles()); }
    __device__ int band_height() const { return min(kTogether, token_tiles() - band() * kTogether); }
    __device__ int column_tile() const { return within_band() / band_height(); }
    __device__ int token_tile() const { return band() * kTogether + within_band() % band_height(); }

    // Goes on to the first tile, from this one on, whose expert is one of first .. last - 1.
    __device__ void skip_absent(int first, int last) {
        for (; more(); next()) {
            int expert = x.expert(token_tile()) - first;
            if (expert >= 0 && expert < last - first) break;
        }
    }
};
