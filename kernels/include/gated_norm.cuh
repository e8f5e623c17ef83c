// The norm of what a recurrence gives, under a gate: the last step before its output matrix.
#pragma once
#include "operand.cuh"
#include "reduce.cuh"

// out[:] = half(*scale * rms_norm(o[head, :]) * norm * gate(z[head, :])), a token's row of an operand, zeros behind the
// heads' columns. o, z: [n, heads * kDim]. A block takes a token, a warp its heads in turn.
template <int kThreads, int kDim, float (*gate)(float)>
__device__ __forceinline__ void gated_norm(const float* o, const float* z, const float* norm, int heads, float epsilon,
                                           const float* scale, half_t* out, int stride) {
    int lane = threadIdx.x % 32, columns = heads * kDim;
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    for (int head = threadIdx.x / 32; head < heads; head += kThreads / 32) {
        uint64_t at = static_cast<uint64_t>(blockIdx.x) * columns + head * kDim;
        float sum = 0.0f;
        for (int i = lane; i < kDim; i += 32) sum = fmaf(o[at + i], o[at + i], sum);
        float r = *scale / sqrtf(warp_sum(sum) / static_cast<float>(kDim) + epsilon);
        for (int i = 2 * lane; i < kDim; i += 64) {
            float2 value = *reinterpret_cast<const float2*>(o + at + i),
                   before = *reinterpret_cast<const float2*>(z + at + i);
            store_operand(
                out, head * kDim + i,
                operand_pair(value.x * r * norm[i] * gate(before.x), value.y * r * norm[i + 1] * gate(before.y)));
        }
    }
    for (int i = columns + 2 * threadIdx.x; i < stride; i += 2 * kThreads) store_operand(out, i, 0u);
}
