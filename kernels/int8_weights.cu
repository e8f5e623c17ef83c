// Makes matrices that are multiplied in int8 of weight tiles, compiled once for each block format in use (FORMAT: a
// struct of quants/).
#include "include/hadamard.cuh"
#include "include/int8.cuh"
#include "include/types.cuh"
#include "quants/all.cuh"

using Format = FORMAT;
constexpr int kThreads = INT8_THREADS, kLanes = kRotated / 16;  // lanes that share a group of columns of a row
static_assert(kThreads / kLanes == kTileRows, "a block takes a row tile");

// tiles, scales = the int8 tiles of so many weight tiles' rows (quants/common.cuh), which have `units` units and
// `groups` groups of columns, and the row's scales; rows and columns past the matrix's become zeros. A block takes a
// row tile, eight lanes a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    make_int8(const uint8_t* weights, int units, int groups, int8_t* tiles, float* scales) {
    begin_kernel();
    int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    auto rotated = [&](int group, float (&w)[16]) {
        int column = group * kRotated + lane * 16;
        const uint8_t* tile = weights + (static_cast<uint64_t>(blockIdx.x) * units + column / Format::kElements) *
                                            (kTileRows * Format::kBytes);
        decode_floats<Format>(tile, row, column % Format::kElements, w);
        rotate(w);
    };
    float w[16];
    Largest of_lane;
    for (int group = 0; group < groups; ++group) {
        rotated(group, w);
#pragma unroll
        for (int i = 0; i < 16; ++i) of_lane.add(w[i]);
    }
    uint32_t largest = of_lane.bits();
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    Rounding rounding(largest);
    if (lane == 0) scales[blockIdx.x * kTileRows + row] = rounding.scale;
    int8_t* to = tiles + static_cast<uint64_t>(blockIdx.x) * groups * kInt8TileBytes;
    for (int group = 0; group < groups; ++group, to += kInt8TileBytes) {
        rotated(group, w);
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            int at = int8_offset(int8_place(row), operand_position(lane * 16 + i));
            uint32_t pair = rounding.byte(w[i]) | rounding.byte(w[i + 1]) << 8;
            *reinterpret_cast<uint16_t*>(to + at) = static_cast<uint16_t>(pair);
        }
    }
}
