// RMSNorm (arXiv 1910.07467) of a row.
#pragma once
#include "operand.cuh"
#include "reduce.cuh"

// out = scale * rms_norm(x) * weight as an operand, with zeros from `columns` to `stride`, by a block of kThreads. A
// thread takes four columns in turn of each 4 * kThreads; the first kKept such fours it reads once and keeps, the
// others it reads again.
template <int kThreads>
__device__ __forceinline__ void normalise_row(const float* x, const float* weight, half_t* out, int columns, int stride,
                                              float epsilon, float scale) {
    constexpr int kKept = 4;
    bool aligned = columns % 4 == 0;
    auto load = [&](const float* from, int i) {
        if (aligned)
            return i < columns ? *reinterpret_cast<const float4*>(from + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        return make_float4(i < columns ? from[i] : 0.0f, i + 1 < columns ? from[i + 1] : 0.0f,
                           i + 2 < columns ? from[i + 2] : 0.0f, i + 3 < columns ? from[i + 3] : 0.0f);
    };
    float4 kept[kKept];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kKept; ++j) kept[j] = load(x, 4 * (threadIdx.x + j * kThreads));
#pragma unroll
    for (int j = 0; j < kKept; ++j) sum = add_squares(sum, kept[j]);
    for (int i = 4 * (threadIdx.x + kKept * kThreads); i < columns; i += 4 * kThreads)
        sum = add_squares(sum, load(x, i));
    float r = scale / sqrtf(block_sum<kThreads>(sum) / static_cast<float>(columns) + epsilon);
    auto write = [&](const float4& v, int i) {
        if (i >= stride) return;
        float4 w = load(weight, i);
        store_operand(out, i, operand_pair(v.x * r * w.x, v.y * r * w.y));
        store_operand(out, i + 2, operand_pair(v.z * r * w.z, v.w * r * w.w));
    };
#pragma unroll
    for (int j = 0; j < kKept; ++j) write(kept[j], 4 * (threadIdx.x + j * kThreads));
    for (int i = 4 * (threadIdx.x + kKept * kThreads); i < stride; i += 4 * kThreads) write(load(x, i), i);
}
