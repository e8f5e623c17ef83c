// The row tiles of W that a launch of gemm_sm90.cu multiplies by: kTileRows rows each, whose weight tiles
// (quants/common.cuh) follow one another. The launch has them in one sequence, of one matrix or of several.
#pragma once
#include "types.cuh"
#include "../quants/common.cuh"

// The matrices of a launch: up to three, one under another, or gate and up for the gated kernel, or one whose outputs
// become an operand (kActivated). Where Config::kGrouped, each is the first of a stack of experts' matrices.
struct Matrices {
    const uint8_t* weights[3];
    int rows[3], format[3];  // format: the number in Config::Formats
};

// A row tile: where its weight tiles begin, and where its outputs go.
struct RowTile {
    const uint8_t* weights;  // null where there is no such row tile
    int format, rows;        // rows: how many there are, the others are padding
    int column;              // of the output, that its first row becomes
};

// How many row tiles a matrix of so many rows has, rounded up so that those of a warpgroup are of one matrix.
template <class Config>
__device__ __forceinline__ int count_row_tiles(int rows) {
    return ceil_div(rows, kTileRows * Config::kTiles) * Config::kTiles;
}

// The number of a cluster's row tile `own`, where the cluster has one of so many column tiles: its blocks have
// kBlockTiles row tiles each, one after another, and their warpgroups kTiles. Row tiles are neighbours. But of heads of
// 128 a warpgroup has two that are half a head apart, and the next warpgroup has those between. Where a cluster has
// three heads, they are far apart, and two blocks have a half each of the last one: so v's heads, whose format may take
// more work, are shared out.
template <class Config>
__device__ __forceinline__ int row_tile_number(int column_tile, int column_tiles, int own) {
    constexpr int kAll = Config::kCluster * Config::kBlockTiles, kHeads = kAll / 4;
    if (Config::kHeadDim != 128) return column_tile * kAll + own;
    int head = own / 4, in_head = own / 2 % 2 + own % 2 * 2;
    if (kHeads == 3) head = column_tile + (head == 1 ? 2 : head / 2) * column_tiles;
    else head += column_tile * kHeads;
    return head * 4 + in_head;
}

// Row tile `index` of an expert's matrices (expert 0 where there are none), which have `units` units in a row.
template <class Config>
__device__ __forceinline__ RowTile row_tile(const Matrices& matrices, int index, int units, int expert) {
    using Formats = typename Config::Formats;
    // Row tiles of the experts before this one.
    int stacked = Config::kGrouped ? expert * ceil_div(matrices.rows[0], kTileRows) : 0;
    if (Config::kGated) {  // gate's and up's take turns
        int tile = index >> 1, rows = min(kTileRows, matrices.rows[0] - tile * kTileRows);
        int format = index & 1 ? matrices.format[1] : matrices.format[0];
        const uint8_t* weights = index & 1 ? matrices.weights[1] : matrices.weights[0];
        if (rows <= 0) return {nullptr, 0, 0, tile * kTileRows};
        weights += static_cast<uint64_t>(stacked) * Formats::row_tile_bytes(format, units);
        return {weights + static_cast<uint64_t>(tile) * Formats::row_tile_bytes(format, units), format, rows,
                tile * kTileRows};
    }
    if (Config::kActivated) {  // there are row tiles for columns that fill a group of the operand, too
        int rows = min(kTileRows, matrices.rows[0] - index * kTileRows);
        if (rows <= 0) return {nullptr, 0, 0, index * kTileRows};
        return {matrices.weights[0] + static_cast<uint64_t>(index) * Formats::row_tile_bytes(0, units), 0, rows,
                index * kTileRows};
    }
    int tiles0 = count_row_tiles<Config>(matrices.rows[0]), tiles1 = count_row_tiles<Config>(matrices.rows[1]);
    int column = 0, format = matrices.format[0], rows = matrices.rows[0];
    const uint8_t* weights = matrices.weights[0];
    if (Config::kGrouped) {
        if (index * kTileRows >= rows) return {nullptr, 0, 0, 0};
        return {weights + static_cast<uint64_t>(stacked + index) * Formats::row_tile_bytes(0, units), 0,
                min(kTileRows, rows - index * kTileRows), index * kTileRows};
    }
    // The matrices are written out, as an index into the arguments would put them into local memory.
    if (index >= tiles0) {
        column = rows, index -= tiles0;
        weights = matrices.weights[1], rows = matrices.rows[1], format = matrices.format[1];
        if (index >= tiles1) {
            column += rows, index -= tiles1;
            weights = matrices.weights[2], rows = matrices.rows[2], format = matrices.format[2];
        }
    }
    if (index * kTileRows >= rows) return {nullptr, 0, 0, 0};
    return {weights + static_cast<uint64_t>(index) * Formats::row_tile_bytes(format, units), format,
            min(kTileRows, rows - index * kTileRows), column + index * kTileRows};
}
