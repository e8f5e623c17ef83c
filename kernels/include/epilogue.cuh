// What the GEMMs do with the sums in their accumulators before they are written: scales, biases, residuals and
// activations.
#pragma once
#include "activation.cuh"
#include "operand.cuh"
#include "ptx.cuh"

template <class T, int kCount>
__device__ __forceinline__ void clear(T (&values)[kCount]) {
#pragma unroll
    for (T& value : values) value = 0;
}

// By what sums of scaled operands are multiplied: x was scaled by *x_scale, w by *w_scale.
__device__ __forceinline__ float unscale(const float* x_scale, const float* w_scale) {
    return 1.0f / *x_scale / *w_scale;
}

// A thread's sums of a transposed product (Yᵀ): accumulator 4j + 2i + c is an output of row i and of token 8j + c, of
// batch j of 8 tokens. A batch gives, as (i, c, bias), what one of its accumulators stands for, times alpha, plus bias.
template <int kTokens>
struct HalfSums {
    static constexpr bool kSiluScaled = false;  // whether gates and ups come as scaled_silu has them
    const float (&acc)[kTokens / 2];
    float alpha;

    struct Batch {
        const float* acc;
        float alpha;

        __device__ __forceinline__ float operator()(int i, int c, float bias) const {
            return fmaf(acc[2 * i + c], alpha, bias);
        }
    };
    __device__ __forceinline__ Batch batch(int j) const { return {acc + 4 * j, alpha}; }
};

// The biases of output `column`, of an expert's `columns`: 0 where there is no bias (null), or no such output
// (!inside).
struct Biases {
    int expert, columns, column;
    bool inside;

    __device__ __forceinline__ float of(const float* bias) const {
        return bias != nullptr && inside ? bias[expert * columns + column] : 0.0f;
    }
};

// gemm_linear's outputs: float32, with rows `ldo` apart.
struct LinearOutput {
    float* out;
    int ldo;

    // Writes column `column`, the sums' row i, of every pair of tokens that a thread has, from `token` on, where they
    // are before `end`. add: they are added to what is there. A whole token tile has no branch for each output.
    template <int kTokens, class Sums>
    __device__ __forceinline__ void store_transposed(const Sums& sums, int i, float bias, int column, int token,
                                                     int end, int add) const {
        float* to = out + static_cast<uint64_t>(token) * ldo + column;
        if (token - static_cast<int>(threadIdx.x % 4 * 2) + kTokens > end)
            store_all<kTokens>(sums, i, bias, to, [&](int at, float* one, float y) {
                if (token + at < end) add ? reduce_add(one, y) : void(*one = y);
            });
        // The L2 cache adds: nothing is waited for, and as each output is added to once, the sum is always the same.
        else if (add) store_all<kTokens>(sums, i, bias, to, [](int, float* one, float y) { reduce_add(one, y); });
        else store_all<kTokens>(sums, i, bias, to, [](int, float* one, float y) { *one = y; });
    }

    // Calls write(number of a token from the thread's first on, where its output goes, the output).
    template <int kTokens, class Sums, class Write>
    __device__ __forceinline__ void store_all(const Sums& sums, int i, float bias, float* to, Write write) const {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j, to += 8 * static_cast<uint64_t>(ldo))
#pragma unroll
            for (int c = 0; c < 2; ++c) write(8 * j + c, to + c * ldo, sums.batch(j)(i, c, bias));
    }
};

// Where a thread's outputs of a transposed product go that become an operand's: feature `feature` of every pair of
// tokens that it has, rows `ldo` apart. row: the feature's in its row tile, as row_of_thread (gemm_sm90.cu) and
// int8_row (int8.cuh) have it.
struct OperandColumn {
    half_t* out;
    int ldo, features, feature, row;

    __device__ __forceinline__ bool exists() const { return feature < features; }
    // Whether it exists, or fills a group.
    __device__ __forceinline__ bool inside() const {
        return feature < ceil_div(features, kOperandGroup) * kOperandGroup;
    }
    // The value if the feature exists, else 0. A select would be compiled to a branch around each.
    __device__ __forceinline__ float kept(float value) const {
        return bits_to_float(__float_as_uint(value) & (exists() ? ~0u : 0));
    }

    // Writes what make(j, y) gives for tokens token + 8j and the next, where these are before `end`; zeros where the
    // feature is one of those that fill a group.
    //
    // A thread has two neighbouring tokens of one feature in each batch of 8 tokens; so of two batches, lanes of
    // neighbouring features trade a token, then lanes whose pairs of features are 16 apart trade a batch. Each then has
    // four outputs of one token, which are neighbours in operand order.
    template <int kTokens, class Make>
    __device__ __forceinline__ void store(int token, int end, Make make) const {
        bool odd = row & 1, second = row & 16;
        half_t* to = out + operand_position(feature & ~17);
#pragma unroll
        for (int j = 0; j < kTokens / 8; j += 2) {
            OperandPair pair[2];
#pragma unroll
            for (int batch = 0; batch < 2; ++batch) {
                float y[2];
                make(j + batch, y);
                float given = __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 4);
                pair[batch] = odd ? operand_pair(given, y[1]) : operand_pair(y[0], given);
            }
            uint32_t given = __shfl_xor_sync(0xffffffffu, second ? pair[0] : pair[1], 8);
            int t = token + 8 * (j + second) + odd;
            uint2 pairs = second ? make_uint2(given, pair[1]) : make_uint2(pair[0], given);
            if (t < end && inside()) store_operand(to + static_cast<uint64_t>(t) * ldo, pairs);
        }
    }
};

// gemm_activated's outputs, scale * act(x) of `features` features: an operand, with rows `ldo` apart.
struct ActivatedOutput {
    half_t* out;
    int ldo, features;
    float scale;
    int activation;

    // Of feature first + row, the sums' row kRow.
    template <int kTokens, int kRow, class Sums>
    __device__ __forceinline__ void store_transposed(const Sums& sums, const float* bias, int first, int row, int token,
                                                     int end) const {
        OperandColumn column = {out, ldo, features, first + row, row};
        float own_bias = Biases{0, features, first + row, column.exists()}.of(bias);
        if (activation == ACTIVATION_RELU_SQUARED)
            store_all<kTokens, kRow>(column, sums, own_bias, token, end, [](float x) { return relu_squared(x); });
        else if (activation == kGeluTanh)
            store_all<kTokens, kRow>(column, sums, own_bias, token, end,
                                     [](float x) { return gated<kGeluTanh>(x, 1.0f); });
        else {
            int kind = activation;
            store_all<kTokens, kRow>(column, sums, own_bias, token, end,
                                     [kind](float x) { return gated(x, 1.0f, kind); });
        }
    }

    template <int kTokens, int kRow, class Sums, class Activate>
    __device__ __forceinline__ void store_all(const OperandColumn& column, const Sums& sums, float bias, int token,
                                              int end, Activate activate) const {
        column.store<kTokens>(token, end, [&](int j, float (&y)[2]) {
            auto batch = sums.batch(j);
#pragma unroll
            for (int c = 0; c < 2; ++c) y[c] = column.kept(activate(batch(kRow, c, bias)) * scale);
        });
    }
};
