// How experts' outputs are kept until they are added up, where the product was in int8: rounded to 8 bits, in blocks of
// kOutputBlock = 16 columns of a row. A block's values become integers of -127 to 127, in 127ths of the largest
// magnitude among them (kqprefill/models/precision.py: what int8 means). So they take half as many bytes as halves, and
// it is bytes that adding up waits for.
//
// A row has the integers of all of its columns, a byte each, and then each block's largest magnitude, a half; it is
// output_row_bytes long. Of 32 columns, a row tile of int8.cuh, the first block has those of two atoms, 0 to 7 and 16
// to 23, and the second the others: a thread that reads what shared memory has of two atoms has a block. Columns that
// fill up the last 32 are zeros.
#pragma once
#include "ptx.cuh"
#include "types.cuh"

constexpr int kOutputBlock = OUTPUT_BLOCK;
static_assert(kOutputBlock == 16 && TILE_ROWS == 32, "a row tile has two blocks");

// Bytes of a row's integers, and of the row: whole words of 16.
__host__ __device__ constexpr int output_integers(int columns) {
    return ceil_div(columns, TILE_ROWS) * TILE_ROWS;
}
__host__ __device__ constexpr int output_row_bytes(int columns) {
    return ceil_div(output_integers(columns) / 8 * 9, 16) * 16;
}
// Where a column's integer stands in a row, and where the largest magnitude of a block: of the block that an integer's
// place is in.
__host__ __device__ constexpr int output_place(int column) {
    return (column & ~31) | (column >> 3 & 1) << 4 | (column >> 4 & 1) << 3 | (column & 7);
}
__host__ __device__ constexpr int output_largest(int columns, int place) {
    return output_integers(columns) + place / kOutputBlock * 2;
}

// The larger magnitudes of two pairs of halves; NaN is above all.
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
    return half2_max(a & 0x7fff7fffu, b & 0x7fff7fffu);
}
// The larger of a pair of halves.
__device__ __forceinline__ half_t larger_half(uint32_t pair) {
    return static_cast<half_t>(half2_max(pair, high_halves(pair)));
}

// How a block is rounded whose largest magnitude, a half, is known. What is not finite comes out of that.
struct BlockRounding {
    uint32_t power, inverse;  // pairs of equal halves: 127 / largest is their product, which may be too much for one

    __device__ __forceinline__ explicit BlockRounding(half_t largest) {
        constexpr uint32_t kOne = 0x3c003c00, kMuch = 0x78007800;  // 1 and 2^15
        bool small = largest < (kOne & 0xffff);
        float top = half_to_float(largest) * (small ? 32768.0f : 1.0f);
        float factor = fminf(127.0f * reciprocal_approx(top), 65504.0f);  // zeros are zeros by any
        power = small ? kMuch : kOne;
        inverse = pack_half2(factor, factor);
    }
    // The integers of four values. Added to 1.5 * 2^10, an integer is in the low bits of the half that is the sum.
    __device__ __forceinline__ uint32_t four(uint32_t first, uint32_t second) const {
        auto pair = [&](uint32_t values) { return half2_fma(half2_multiply(values, power), inverse, 0x66006600); };
        return __byte_perm(pair(first), pair(second), 0x6420);
    }
};

// The value of a byte of a word of integers: 2^23 + 128 more than it is a float's low bits, when its sign is turned.
__device__ __forceinline__ float output_integer(uint32_t turned, int i) {
    return bits_to_float(__byte_perm(turned, 0x4b000000, 0x7440 | i)) - 8388736.0f;
}
