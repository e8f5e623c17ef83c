// What Hopper's GEMM in int8 does with the sums in its accumulators, where that is not as elsewhere (epilogue.cuh).
#pragma once
#include "epilogue.cuh"
#include "int8.cuh"
#include "sm90.cuh"

// A thread's sums of a transposed product, as HalfSums are: with the scales of its two rows, and of its tokens.
template <int kTokens>
struct Int8Sums {
    const int (&acc)[kTokens / 2];
    float row_scale[2], token_scale[kTokens / 4];  // token_scale: of pairs of tokens that are 8 apart

    __device__ __forceinline__ float operator()(int at, float bias) const {
        return int8_output(acc[at], row_scale[at / 2 % 2], token_scale[at / 4 * 2 + at % 2], bias);
    }
};

// gemm_linear's outputs of a thread's two rows, which are those of int8_row (int8.cuh): float32, with rows `ldo` apart,
// or (kGrouped) halves. Four lanes trade, so that each has four neighbouring columns of one of their tokens: it then
// writes whole words of 16 bytes, and eight lanes the sectors of memory that they are in.
template <int kTokens, bool kGrouped>
struct FourColumns {
    const int (&acc)[kTokens / 2];
    float row_scale[2], bias[2];

    // out: row 0's first column that the lane writes, and `columns` the number of those that there are. token_scale: of
    // the thread's first token, which is `token`; those before `end` are written. add: outputs are added to what is
    // there.
    __device__ __forceinline__ void store(void* out, int ldo, int columns, const float* token_scale, int token, int end,
                                          int add) const {
        constexpr int kPairs = 8;  // of tokens, whose scales are loaded at once
        int slot = threadIdx.x % 32 / 4;
        bool odd = slot & 1, upper = slot & 4;
        bool whole = columns >= 4 && ldo % 4 == 0 && (reinterpret_cast<uint64_t>(out) & (kGrouped ? 7 : 15)) == 0;
#pragma unroll
        for (int first = 0; first < kTokens / 8; first += kPairs) {
            constexpr int kNow = kTokens / 8 < kPairs ? kTokens / 8 : kPairs;
            float scale[kNow][2];
#pragma unroll
            for (int j = 0; j < kNow; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c) scale[j][c] = token_scale[8 * (first + j) + c];
#pragma unroll
            for (int j = 0; j < kNow; ++j) {
                float y[2][2];  // [row][token], then [row][column] of one token, then four columns of one row's
#pragma unroll
                for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        y[i][c] = int8_output(acc[4 * (first + j) + 2 * i + c], row_scale[i], scale[j][c], bias[i]);
                    float given = __shfl_xor_sync(0xffffffffu, odd ? y[i][0] : y[i][1], 4);
                    (odd ? y[i][0] : y[i][1]) = given;
                }
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float given = __shfl_xor_sync(0xffffffffu, upper ? y[0][c] : y[1][c], 16);
                    (upper ? y[0][c] : y[1][c]) = given;
                }
                int t = token + 8 * (first + j) + odd;
                if (t < end) write(out, static_cast<uint64_t>(t) * ldo, columns, whole, y, add);
            }
        }
    }

    __device__ __forceinline__ static void write(void* out, uint64_t row, int columns, bool whole,
                                                 const float (&y)[2][2], int add) {
        if constexpr (kGrouped) {  // whole row tiles
            if (columns <= 0) return;
            uint2 words = make_uint2(pack_half2(y[0][0], y[0][1]), pack_half2(y[1][0], y[1][1]));
            *reinterpret_cast<uint2*>(static_cast<half_t*>(out) + row) = words;
        } else {
            float* to = static_cast<float*>(out) + row;
            float4 four = make_float4(y[0][0], y[0][1], y[1][0], y[1][1]);
            if (whole) {
                add ? reduce_add(to, four) : void(*reinterpret_cast<float4*>(to) = four);
                return;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i < columns) add ? reduce_add(to + i, y[i / 2][i % 2]) : void(to[i] = y[i / 2][i % 2]);
        }
    }
};
