// The way back from experts: a token's copies' outputs under their shares, added up and added to the residual stream.
#pragma once
#include "types.cuh"

// The copies of one token: `used` outputs of experts, halves, in rows of `columns`.
struct Copies {
    const half_t* sums;
    const int* place_of;    // the copies' rows
    const float* share_of;  // and shares
    int used, columns;

    // sums_of[j] = kColumns columns, the words of Words, from first + j * step on, if they are there: under the copies'
    // shares, in the order of their slots.
    template <class Words, int kCount, int kColumns>
    __device__ __forceinline__ void add_up(int first, int step, float (&sums_of)[kCount][kColumns]) const {
        static_assert(sizeof(Words) == kColumns * sizeof(half_t), "columns that are read at once");
#pragma unroll
        for (int i = 0; i < kCount * kColumns; ++i) sums_of[i / kColumns][i % kColumns] = 0.0f;
        for (int slot = 0; slot < used; ++slot) {
            const half_t* row = sums + static_cast<uint64_t>(place_of[slot]) * columns;
            float share = share_of[slot];
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                int column = first + j * step;
                if (column >= columns) continue;
                union {
                    Words words;
                    uint32_t pairs[kColumns / 2];
                } own;
                own.words = *reinterpret_cast<const Words*>(row + column);
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    float value = half_to_float(static_cast<half_t>(own.pairs[c / 2] >> 16 * (c % 2)));
                    sums_of[j][c] = fmaf(share, value, sums_of[j][c]);
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

    __device__ __forceinline__ CombinedRow(float* x, const half_t* sums, const float* scale, int used, int columns,
                                           const int* place_of, const float* share_of, int token)
        : copies{sums, place_of + token * used, share_of + token * used, used, columns},
          unscale(1.0f / *scale),
          x(x + static_cast<uint64_t>(token) * columns) {}

    template <int kCount>
    __device__ __forceinline__ void operator()(int first, int step, float4 (&fours)[kCount]) const {
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sums[kCount][4];
        copies.add_up<uint2>(first, step, sums);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            fours[j] = zero;
            if (first + j * step >= copies.columns) continue;
            float4* to = reinterpret_cast<float4*>(x + first + j * step);
            *to = fours[j] = combined(sums[j], unscale, 0.0f, zero, *to);
        }
    }
};
