// What stands between two matrices without a GEMM of its own: the activation of experts that have no gate, and sums
// that become the operand of another matrix.
#include "include/activation.cuh"
#include "include/operand.cuh"
#include "include/reduce.cuh"

constexpr int kThreads = ACTIVATE_THREADS;

// out[t, :] = *scale * act(x[t, :]), an operand: rows `stride` apart, zeros from `columns` on. x's halves are *x_scale
// times as large as it. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    activate_halves(const half_t* x, const float* x_scale, int columns, int activation, const float* scale, half_t* out,
                    int stride) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    float unscale = 1.0f / *x_scale;
    store_row<kThreads>(out, columns, stride,
                        [&](int i) { return activated(half_to_float(x[i]) * unscale, activation) * *scale; });
}

// out[t, :] = x[t, :] / row_scale[t], an operand, where row_scale[t] is the power of two that leaves the row's largest
// value between 2^14 and 2^15: for values that no bound is known of. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    cast_rows(const float* x, int columns, half_t* out, int stride, float* row_scale) {
    begin_kernel();
    __shared__ uint32_t of_warp[kThreads / 32];
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    uint32_t largest = 0;  // as bits, of which a NaN's are above every number's
    for (int i = threadIdx.x; i < columns; i += kThreads) largest = max(largest, __float_as_uint(fabsf(x[i])));
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) largest = max(largest, of_warp[w]);
    int exponent = min(max(static_cast<int>(largest >> 23) - 127 - 14, -126), 126);
    if (largest == 0) exponent = 0;
    float scale = bits_to_float(static_cast<uint32_t>(127 - exponent) << 23);
    store_row<kThreads>(out, columns, stride, [&](int i) { return x[i] * scale; });
    if (threadIdx.x == 0) row_scale[blockIdx.x] = bits_to_float(static_cast<uint32_t>(127 + exponent) << 23);
}

// x[t, :] += factor * (row_scale[t] * y[t, :] + bias); bias may be null. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    add_rows(float* x, const float* y, const float* row_scale, const float* bias, int columns, float factor) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    y += static_cast<uint64_t>(blockIdx.x) * columns;
    float scale = row_scale[blockIdx.x];
    for (int i = threadIdx.x; i < columns; i += kThreads)
        x[i] = fmaf(fmaf(y[i], scale, bias != nullptr ? bias[i] : 0.0f), factor, x[i]);
}
