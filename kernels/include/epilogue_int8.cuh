// What Hopper's GEMM in int8 does with the sums in its accumulators, where that is not as elsewhere (epilogue.cuh).
#pragma once
#include "epilogue_sm90.cuh"
#include "int8.cuh"

// The scales of a token tile's tokens. They are loaded before the sums are made, a few by each lane, and handed around
// in the warp when they are needed.
template <int kTokens>
struct TokenScales {
    static constexpr int kOwn = kTokens < 64 ? 1 : kTokens / 64;
    float own[kOwn][2];  // of pairs of tokens that are 64 apart

    // first: of the tile's first token; where a tile has fewer than 64, more are read.
    __device__ __forceinline__ explicit TokenScales(const float* first) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
            for (int c = 0; c < 2; ++c) own[i][c] = first[64 * i + threadIdx.x % 32 * 2 + c];
    }
    // Of token 8j + lane % 4 * 2 + c. All lanes of a warp call this.
    __device__ __forceinline__ float of(int j, int c) const {
        return __shfl_sync(0xffffffffu, own[j / 8][c], j % 8 * 4 + threadIdx.x % 4);
    }
};

// The same where a thread has registers for all that it needs.
template <int kTokens>
struct AllScales {
    float own[kTokens / 8][2];

    __device__ __forceinline__ explicit AllScales(const float* first) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) own[j][c] = first[8 * j + threadIdx.x % 4 * 2 + c];
    }
    __device__ __forceinline__ float of(int j, int c) const { return own[j][c]; }
};

// A thread's sums of a transposed product, as HalfSums are: with the scales of its two rows, and of its tokens.
template <int kTokens, class Scales = TokenScales<kTokens>>
struct Int8Sums {
    static constexpr bool kSiluScaled = true;
    const int (&acc)[kTokens / 2];
    const float (&row_scale)[2];
    const Scales& tokens;

    struct Batch {
        const int* acc;
        const float (&row_scale)[2];
        float token_scale[2];

        __device__ __forceinline__ float operator()(int i, int c, float bias) const {
            return int8_output(acc[2 * i + c], row_scale[i], token_scale[c], bias);
        }
    };
    // All lanes of a warp call this.
    __device__ __forceinline__ Batch batch(int j) const {
        return {acc + 4 * j, row_scale, {tokens.of(j, 0), tokens.of(j, 1)}};
    }
};

// gemm_linear's outputs of a thread's two rows, which are those of int8_row (int8.cuh): float32, with rows `ldo` apart.
// Four lanes trade, so that each has four neighbouring columns of one of their tokens: it then writes words of 16 bytes
// at once, and eight lanes whole sectors of memory; but where not kWhole, the words of an output are not aligned, and
// columns may end within one.
template <int kTokens, bool kWhole>
struct FourColumns {
    const Int8Sums<kTokens>& sums;
    const float (&bias)[2];

    // out: row 0's first column that the lane writes, and `columns` the number of those that there are. token: the
    // thread's first; those before `end` are written. add: outputs are added to what is there.
    __device__ __forceinline__ void store(float* out, int ldo, int columns, int token, int end, int add) const {
        if (add) store_all<true>(out, ldo, columns, token, end);
        else store_all<false>(out, ldo, columns, token, end);
    }

    template <bool kAdd>
    __device__ __forceinline__ void store_all(float* out, int ldo, int columns, int token, int end) const {
        int slot = threadIdx.x % 32 / 4;
        bool odd = slot & 1, upper = slot & 4;
        token += odd;
        if (columns <= 0) end = 0;
        uint64_t at = static_cast<uint64_t>(token) * ldo, step = 8 * static_cast<uint64_t>(ldo);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j, at += step) {
            float y[2][2];
            auto batch = sums.batch(j);
            // y: [row][token], then [row][column] of one token, then four columns of one row's.
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int c = 0; c < 2; ++c) y[i][c] = batch(i, c, bias[i]);
                float given = __shfl_xor_sync(0xffffffffu, odd ? y[i][0] : y[i][1], 4);
                y[i][0] = odd ? given : y[i][0], y[i][1] = odd ? y[i][1] : given;
            }
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float given = __shfl_xor_sync(0xffffffffu, upper ? y[0][c] : y[1][c], 16);
                y[0][c] = upper ? given : y[0][c], y[1][c] = upper ? y[1][c] : given;
            }
            if (token + 8 * j < end) write<kAdd>(out + at, columns, y);
        }
    }

    template <bool kAdd>
    __device__ __forceinline__ static void write(float* to, int columns, const float (&y)[2][2]) {
        if constexpr (kWhole) {
            float4 four = make_float4(y[0][0], y[0][1], y[1][0], y[1][1]);
            if constexpr (kAdd) reduce_add(to, four);
            else *reinterpret_cast<float4*>(to) = four;
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i >= columns) continue;
                if constexpr (kAdd) reduce_add(to + i, y[i / 2][i % 2]);
                else to[i] = y[i / 2][i % 2];
            }
        }
    }
};
