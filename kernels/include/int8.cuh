// How matrices and operands lie that are multiplied in int8, and the rotation that comes before they are rounded
// (kqprefill/models/precision.py: what int8 means).
//
// Both have their columns in operand order (operand.cuh), padded to whole groups of kRotated = 128 columns, a byte
// each. An operand's rows follow one another. A matrix is stored in int8 tiles of kTileRows rows by one group, [row
// tile] [group], of 4096 bytes each, which are what the copy engine's 128-byte swizzle makes of 32 rows of 128 bytes:
// the 16-byte piece `i` of the row at place `p` stands where piece i ^ p % 8 would. So a tile is one contiguous copy,
// and lies in shared memory as wgmma and ldmatrix want it. Rows stand in such places that four accumulators of two
// tokens, traded between lanes, are neighbours in operand order (epilogue.cuh); for each eight rows, an "atom" of 1024
// bytes:
//
//     place          0    1    2    3    4    5    6    7
//     row of atom a  4a  4a+1 4a+16 4a+17 4a+2 4a+3 4a+18 4a+19
#pragma once
#include "operand.cuh"
#include "types.cuh"

constexpr int kRotated = ROTATED, kInt8TileRows = TILE_ROWS, kAtomRows = 8;
constexpr int kInt8TileBytes = kInt8TileRows * kRotated, kAtomBytes = kAtomRows * kRotated;
static_assert(kRotated == 128 && kInt8TileRows == 32, "a tile is 32 rows of 128 bytes");

// The row of a row tile that stands at a place of it, and the place of a row.
__host__ __device__ constexpr int int8_row(int place) {
    return (place >> 3 & 3) << 2 | (place >> 2 & 1) << 1 | (place >> 1 & 1) << 4 | (place & 1);
}
__host__ __device__ constexpr int int8_place(int row) {
    return (row >> 2 & 3) << 3 | (row >> 1 & 1) << 2 | (row >> 4 & 1) << 1 | (row & 1);
}

// Where byte `position` (of a group, in operand order) of the row at a place lies in a tile.
__host__ __device__ constexpr int int8_offset(int place, int position) {
    return place * kRotated + ((position / 16 ^ place % 8) * 16 | position % 16);
}

// The largest magnitude of values, as bits: a NaN's are above every number's, and stay.
struct Largest {
    int of_positive = 0;
    uint32_t of_negative = 0;  // whose bits, as an integer without a sign, are above those of all that are positive

    __device__ __forceinline__ void add(float value) {
        of_positive = max(of_positive, static_cast<int>(__float_as_uint(value)));
        of_negative = max(of_negative, __float_as_uint(value));
    }
    __device__ __forceinline__ uint32_t bits() const {
        return max(static_cast<uint32_t>(of_positive), of_negative & 0x7fffffffu);
    }
};

// How rotated values whose largest magnitude has these bits are rounded: value * inverse to an integer of -127 to 127,
// which stands for that integer times `scale`. What is not finite comes out of the scale.
struct Rounding {
    float inverse, scale;

    __device__ __forceinline__ explicit Rounding(uint32_t largest) {
        float top = bits_to_float(largest);
        inverse = top > 1e-30f ? 127.0f / top : 0.0f;  // else all are zeros
        scale = top * (0.0883883476f / 127.0f);        // 1 / sqrt(128)
    }
    // An integer added to 1.5 * 2^23 is in the low bits of the sum: no conversion, which would be slower.
    __device__ __forceinline__ uint32_t byte(float value) const {
        return __float_as_uint(fmaf(value, inverse, 12582912.0f)) & 0xff;
    }
    __device__ __forceinline__ uint32_t four(float a, float b, float c, float d) const {
        return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
    }
};

// What a sum stands for, and a bias: the one way in which it is computed, so that all kernels of a kernel set have the
// same bits (Hopper's gate and up have factors of SiLU in the scales).
__device__ __forceinline__ float int8_output(int sum, float row_scale, float token_scale, float bias) {
    return fmaf(static_cast<float>(sum) * row_scale, token_scale, bias);
}
