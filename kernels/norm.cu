// RMSNorm over rows of the float32 residual stream (arXiv 1910.07467), one block a row.
#include "include/operand.cuh"
#include "include/reduce.cuh"
#include "include/types.cuh"

constexpr int kThreads = 256;

// 1 / sqrt(mean(x²) + epsilon) of a row.
__device__ __forceinline__ float inverse_rms(const float* x, int columns, float epsilon) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += kThreads) sum = fmaf(x[i], x[i], sum);
    return 1.0f / sqrtf(block_sum<kThreads>(sum) / static_cast<float>(columns) + epsilon);
}

// out[t, :] = half(*scale * rms_norm(x[t, :]) * weight) in operand order, rows `stride` halves apart, zeros from `columns` to
// there.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm(const float* x, const float* weight, half_t* out, int columns, int stride, float epsilon,
             const float* scale) {
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    float r = inverse_rms(x, columns, epsilon), s = *scale;
    for (int i = 2 * threadIdx.x; i < stride; i += 2 * kThreads) {
        float low = i < columns ? x[i] * r * weight[i] * s : 0.0f;
        float high = i + 1 < columns ? x[i + 1] * r * weight[i + 1] * s : 0.0f;
        *reinterpret_cast<uint32_t*>(out + operand_position(i)) = pack_half2(low, high);
    }
}

// x[t, :] += rms_norm(y[t, :]) * weight
extern "C" __global__ void __launch_bounds__(kThreads)
    add_rms_norm(float* x, const float* y, const float* weight, int columns, float epsilon) {
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    y += static_cast<uint64_t>(blockIdx.x) * columns;
    float r = inverse_rms(y, columns, epsilon);
    for (int i = threadIdx.x; i < columns; i += kThreads) x[i] = fmaf(y[i] * r, weight[i], x[i]);
}
