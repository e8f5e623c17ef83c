// RMSNorm (arXiv 1910.07467) of a row.
#pragma once
#include "operand.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

// This block's number, counted from the last one. Rows that were written last are still in the L2 cache, and the next
// kernel begins with those that were made last here.
__device__ __forceinline__ int block_from_last() {
    return gridDim.x - 1 - blockIdx.x;
}

// The sum of a row, known to all threads that share it: a block of kThreads has kRows rows side by side. Each thread
// stands for kRows threads of a block that has one row, and has their sums, which are added up in that block's order.
template <int kThreads, int kRows>
__device__ __forceinline__ float sum_of_row(const float (&sums)[kRows]) {
    constexpr int kAll = kThreads / 32, kWarps = kAll / kRows;
    float total = 0.0f;
    if constexpr (kWarps == 1) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) total += warp_sum(sums[i]);
    } else {
        __shared__ float partial[kRows][kAll];
        int warp = threadIdx.x / 32;
        float (&own)[kAll] = partial[warp / kWarps];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            float sum = warp_sum(sums[i]);
            if (threadIdx.x % 32 == 0) own[i * kWarps + warp % kWarps] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < kAll; ++w) total += own[w];
    }
    return total;
}

// Asks for a norm's weights, where few rows would wait for them to come from memory. Nothing that may still run writes
// weights, so this is called before begin_kernel.
constexpr int kFewRows = 256;  // one for each block
template <int kThreads>
__device__ __forceinline__ void ask_for_weights(const float* weight, int columns) {
    constexpr int kLine = 32;  // floats of a line of the L2 cache
    if (gridDim.x <= kFewRows)
        for (int i = threadIdx.x * kLine; i < columns; i += kThreads * kLine) prefetch(weight + i);
}

// Columns i to i + 3 of a row of `columns`: zeros beyond these. whole: whether `columns` are whole fours.
__device__ __forceinline__ float4 four_columns(const float* row, int columns, bool whole, int i) {
    if (whole) return i < columns ? *reinterpret_cast<const float4*>(row + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return make_float4(i < columns ? row[i] : 0.0f, i + 1 < columns ? row[i + 1] : 0.0f,
                       i + 2 < columns ? row[i + 2] : 0.0f, i + 3 < columns ? row[i + 3] : 0.0f);
}

// What a norm reads: a row that is there.
struct RowThere {
    const float* x;
    int columns;

    template <int kCount>
    __device__ __forceinline__ void operator()(int first, int step, float4 (&fours)[kCount]) const {
        bool whole = columns % 4 == 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) fours[j] = four_columns(x, columns, whole, first + j * step);
    }
};

// out = scale * rms_norm(x) * weight as an operand, with zeros from `columns` to `stride`, by those threads of a block
// of kThreads that share a row, of kRows side by side; all of its threads call this, once. Each takes four columns in
// turn. read(first, step, fours) gives these for the first time, those that begin at column first, first + step and so
// on: what its row, read.x, has there (RowThere), or what it has just put there (CombinedRow in combine.cuh). The first
// kKept fours a thread keeps; the others, which only a single row may have, it reads again. The bits are the same for
// any kRows and kKept.
template <int kThreads, int kRows = 1, int kKept = 4, class Read>
__device__ __forceinline__ void normalise_row(const Read& read, const float* weight, half_t* out, int columns,
                                              int stride, float epsilon, float scale) {
    constexpr int kStep = 4 * kThreads / kRows;
    bool whole = columns % 4 == 0;
    int first = kRows == 1 ? threadIdx.x * 4 : threadIdx.x * 4 % kStep;
    float4 kept[kKept];
    float sums[kRows] = {};
    read(first, kStep, kept);
#pragma unroll
    for (int j = 0; j < kKept; ++j) sums[j % kRows] = add_squares(sums[j % kRows], kept[j]);
    if constexpr (kRows == 1)
        for (int i = first + kKept * kStep; i < columns; i += kStep) {
            float4 four[1];
            read(i, 0, four);
            sums[0] = add_squares(sums[0], four[0]);
        }
    float r = scale / sqrtf(sum_of_row<kThreads>(sums) / static_cast<float>(columns) + epsilon);
    auto write = [&](const float4& v, int i, half_t* to) {
        if (i >= stride) return;
        float4 w = four_columns(weight, columns, whole, i);
        store_operand(to, operand_pair(v.x * r * w.x, v.y * r * w.y), operand_pair(v.z * r * w.z, v.w * r * w.w));
    };
    static_assert(kStep % kOperandGroup == 0, "a thread's fours have one place in their groups");
    half_t* to = out + operand_position(first);
#pragma unroll
    for (int j = 0; j < kKept; ++j) write(kept[j], first + j * kStep, to + j * kStep);
    if constexpr (kRows == 1)
        for (int i = first + kKept * kStep; i < stride; i += kStep)
            write(four_columns(read.x, columns, whole, i), i, to + (i - first));
}
