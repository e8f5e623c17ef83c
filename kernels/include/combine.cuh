// The way back from experts: a token's copies' outputs under their shares, added up and added to the residual stream.
#pragma once
#include "output_blocks.cuh"
#include "types.cuh"

// What is read at once, and its words.
template <class T>
union Words {
    T all;
    uint32_t word[sizeof(T) / 4];

    __device__ __forceinline__ explicit Words(const void* from) : all(*static_cast<const T*>(from)) {}
};

// The copies of one token: `used` outputs of experts, in rows of `columns`: halves, or in_blocks (output_blocks.cuh).
struct Copies {
    const void* sums;
    int in_blocks;
    const int* place_of;    // the copies' rows
    const float* share_of;  // and shares
    int used, columns;

    // sums_of[j] = kColumns columns from first + j * step on, if they are there: under the copies' shares, in the order
    // of their slots. Bytes, Halves: so many columns of a row in blocks, and of halves.
    template <class Bytes, class Halves, int kCount, int kColumns>
    __device__ __forceinline__ void add_up(int first, int step, float (&sums_of)[kCount][kColumns]) const {
        static_assert(sizeof(Bytes) == kColumns && sizeof(Halves) == 2 * kColumns, "columns that are read at once");
#pragma unroll
        for (int i = 0; i < kCount * kColumns; ++i) sums_of[i / kColumns][i % kColumns] = 0.0f;
        auto add = [&](int j, int c, float share, float value) { sums_of[j][c] = fmaf(share, value, sums_of[j][c]); };
        if (in_blocks) {
            const uint8_t* from = static_cast<const uint8_t*>(sums) + output_place(first);
            int to_largest = output_largest(columns, output_place(first)) - output_place(first);
            for (int slot = 0; slot < used; ++slot) {
                const uint8_t* row = from + static_cast<uint64_t>(place_of[slot]) * output_row_bytes(columns);
                const uint8_t* largest = row + to_largest;
                float share = share_of[slot] * (1.0f / 127.0f);
#pragma unroll
                for (int j = 0; j < kCount; ++j) {
                    if (first + j * step >= columns) continue;  // `step` is whole row tiles
                    Words<Bytes> own(row + j * step);
                    float of_block = half_to_float(*reinterpret_cast<const half_t*>(largest + j * step / 8)) * share;
#pragma unroll
                    for (int c = 0; c < kColumns; ++c)
                        add(j, c, of_block, output_integer(own.word[c / 4] ^ 0x80808080u, c % 4));
                }
            }
        } else {
            for (int slot = 0; slot < used; ++slot) {
                const half_t* row = static_cast<const half_t*>(sums) + static_cast<uint64_t>(place_of[slot]) * columns;
                float share = share_of[slot];
#pragma unroll
                for (int j = 0; j < kCount; ++j) {
                    int column = first + j * step;
                    if (column >= columns) continue;
                    Words<Halves> own(row + column);
#pragma unroll
                    for (int c = 0; c < kColumns; ++c)
                        add(j, c, share, half_to_float(static_cast<half_t>(own.word[c / 2] >> 16 * (c % 2))));
                }
            }
        }
    }
};

// Four columns' sums * unscale + opened * y + was: the one way in which they are computed.
__device__ __forceinline__ float4 combined(const float* sums, float unscale, float opened, const float4& y,
                                           const float4& was) {
    auto one = [&](float own, float y, float was) { return fmaf(own, unscale, fmaf(opened, y, was)); };
    return make_float4(one(sums[0], y.x, was.x), one(sums[1], y.y, was.y), one(sums[2], y.z, was.z),
                       one(sums[3], y.w, was.w));
}

// What a norm reads (rms_norm.cuh): a token's row x of the residual stream, to which its copies are added first.
struct CombinedRow {
    Copies copies;
    float unscale;
    float* x;

    __device__ __forceinline__ CombinedRow(float* x, const void* sums, int in_blocks, const float* scale, int used,
                                           int columns, const int* place_of, const float* share_of, int token)
        : copies{sums, in_blocks, place_of + token * used, share_of + token * used, used, columns},
          unscale(1.0f / *scale),
          x(x + static_cast<uint64_t>(token) * columns) {}

    template <int kCount>
    __device__ __forceinline__ void operator()(int first, int step, float4 (&fours)[kCount]) const {
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sums[kCount][4];
        copies.add_up<uint32_t, uint2>(first, step, sums);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            fours[j] = zero;
            if (first + j * step >= copies.columns) continue;
            float4* to = reinterpret_cast<float4*>(x + first + j * step);
            *to = fours[j] = combined(sums[j], unscale, 0.0f, zero, *to);
        }
    }
};
