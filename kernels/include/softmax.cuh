// What the attention kernels share: query tiles, and the online softmax (arXiv 2307.08691) of scores as mma and wgmma
// hold them. A thread has scores of two rows: numbers 4j and 4j + 1 are the first row's, 4j + 2 and 4j + 3 the
// second's, both at columns 8j and 8j + 1 counted from the thread's own first column.
#pragma once
#include "ptx.cuh"

constexpr float kLog2E = 1.4426950408889634f;

// A query tile, made by the host: `rows` queries from row `q_row` of q, the first at `position` of its sequence. Its
// keys and values are walked in key blocks of BLOCK_KV, which begin at multiples of BLOCK_KV of the sequence. The first
// `shared` of these blocks lie where the sequence's token 0 would be row `shared_row` of k and v, the others where it
// would be row `kv_row`: two sequences that begin alike have the first blocks in common. The sequence has `keys` keys.
struct QueryTile {
    int q_row, rows, position, kv_row, shared, shared_row, keys;

    // The row of k and v at which key block `index` begins.
    __device__ int key_row(int index, int block) const {
        return (index < shared ? shared_row : kv_row) + index * block;
    }

    // Some query of the tile sees keys first_key .. end_key - 1. window: how many keys a query sees, itself included
    // (0: all); with BOTH_WAYS as many after it, too.
    __device__ int first_key(int window) const { return window > 0 ? max(0, position - window + 1) : 0; }
    __device__ int end_key(int window) const {
        if (!BOTH_WAYS) return position + rows;
        return window > 0 ? min(keys, position + rows + window - 1) : keys;
    }
};

// What makes exponents of 2 of scores: softmax's scale, or, with a soft-cap, cap * tanh(scale * score / cap).
struct Scale {
    float factor, cap_factor, softcap;

    __device__ Scale(float scale, float softcap)
        : factor((softcap > 0.0f ? softcap : scale) * kLog2E), cap_factor(scale / softcap), softcap(softcap) {}
    template <int kScores>
    __device__ void cap(float (&scores)[kScores]) const {  // 2 / (1 + exp(-2z)) - 1 is tanh(z)
        if (softcap <= 0.0f) return;
#pragma unroll
        for (int i = 0; i < kScores; ++i)
            scores[i] =
                fmaf(2.0f, reciprocal_approx(1.0f + exp2_approx(-2.0f * kLog2E * cap_factor * scores[i])), -1.0f);
    }
};

// A head's sink (arXiv 2309.17453) as an exponent of 2, -inf where there is none; sinks may be null.
__device__ __forceinline__ float sink_of(const float* sinks, int head) {
    return sinks != nullptr ? sinks[head] * kLog2E : __int_as_float(0xff800000);
}

// Makes the scores of keys that a query does not see -inf. behind: by how many positions the thread's first row is past
// its first column; left: how many keys the sequence has from that column on.
template <int kScores>
__device__ __forceinline__ void mask(float (&scores)[kScores], int behind, int left, int window) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
        int column = i / 4 * 8 + i % 2, distance = behind + i % 4 / 2 * 8 - column;
        bool hidden = BOTH_WAYS ? column >= left : distance < 0;
        if (BOTH_WAYS) distance = abs(distance);
        if (hidden || (window > 0 && distance >= window)) scores[i] = __int_as_float(0xff800000);
    }
}

// By how many powers of two a weight may be more than one: halves hold 2^15, and sums of weights are floats.
constexpr float kMostExponent = 8.0f;

// The softmax of a thread's two rows over the keys that were seen so far.
struct Softmax {
    // The scores that have a weight of one: a key block's largest. A later key block has this changed only where its
    // largest would weigh more than 2^kMostExponent, which is rare, so that sums seldom have to be multiplied (as in
    // FlashAttention-4). They are finite, so that a row that has seen nothing yet makes no NaN of -inf - -inf.
    float unit[2] = {-1e30f, -1e30f}, row_sum[2] = {0.0f, 0.0f};

    // Makes weights of scores. correction: what earlier weights, and what was summed with them, are to be multiplied
    // by. Returns whether that is anything but one for a row of the warp.
    template <int kScores>
    __device__ __forceinline__ bool update(float (&scores)[kScores], float factor, float (&correction)[2]) {
        bool changed = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = unit[r];
#pragma unroll
            for (int i = 2 * r; i < kScores; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
            bool heavier = (largest - unit[r]) * factor > kMostExponent;
            if (!heavier) largest = unit[r];
            correction[r] = exp2_approx((unit[r] - largest) * factor);
            unit[r] = largest, changed |= heavier;
            float sum = 0.0f, offset = largest * factor;
#pragma unroll
            for (int i = 2 * r; i < kScores; i += 4)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    scores[i + c] = exp2_approx(fmaf(scores[i + c], factor, -offset));
                    sum += scores[i + c];
                }
            row_sum[r] = fmaf(row_sum[r], correction[r], sum);
        }
        return __any_sync(0xffffffffu, changed);
    }
    // 1 / the sum of row r's weights, to which the sink (sink_of) adds its own.
    __device__ float inverse_sum(int r, float factor, float sink) const {
        float sum = row_sum[r];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        return 1.0f / (sum + exp2_approx(fmaf(-unit[r], factor, sink)));
    }
};
