// Gated causal convolutions by themselves (LFM2, arXiv 2511.23404), for KERNEL taps: three thirds of what a matrix
// makes, of which the first and the last are multiplied, convolved, and multiplied by the second.
#include "include/operand.cuh"
#include "include/reduce.cuh"
#include "include/scale_for.cuh"

constexpr int kThreads = CONVOLUTION_THREADS, kTaps = KERNEL;

// *scale for the outcome. row_norms: of the matrix's rows, an input row's length being at most gain; sum_bias: null or
// its biases. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    convolution_scale(const float* row_norms, const float* sum_bias, const float* taps, int columns, float gain,
                      float* scale) {
    begin_kernel();
    __shared__ float largest[kThreads];
    float most = 0.0f;
    auto bound = [&](int row) { return gain * row_norms[row] + (sum_bias != nullptr ? fabsf(sum_bias[row]) : 0.0f); };
    for (int i = threadIdx.x; i < columns; i += kThreads) {
        float sum = 0.0f;
        for (int j = 0; j < kTaps; ++j) sum += fabsf(taps[i * kTaps + j]);
        most = fmaxf(most, sum * bound(i) * bound(columns + i) * bound(2 * columns + i));
    }
    largest[threadIdx.x] = most;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int t = 0; t < kThreads; ++t) most = fmaxf(most, largest[t]);
    *scale = scale_for(most, kHalfTop);
}

// product[t, :] = the first third of sums [n, 3 * columns] times the last. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    convolution_inputs(const float* sums, int columns, float* product) {
    begin_kernel();
    sums += static_cast<uint64_t>(blockIdx.x) * (3 * columns);
    product += static_cast<uint64_t>(blockIdx.x) * columns;
    for (int i = threadIdx.x; i < columns; i += kThreads) product[i] = sums[i] * sums[2 * columns + i];
}

// out[t, :] = *scale * sums[t, second third] * the sum over j of taps[:, j] * product[row j of t], an operand with rows
// `stride` apart, zeros from `columns` on. rows: int32 [n, KERNEL], the rows of product that the taps go over, the
// token's own last; -32768 or less where the sequence has none. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    convolve(const float* sums, const float* product, const float* taps, const int* rows, int columns,
             const float* scale, half_t* out, int stride) {
    begin_kernel();
    sums += static_cast<uint64_t>(blockIdx.x) * (3 * columns) + columns;
    rows += static_cast<uint64_t>(blockIdx.x) * kTaps;
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    int row[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) row[j] = rows[j];
    store_row<kThreads>(out, columns, stride, [&](int i) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kTaps; ++j)
            if (row[j] > -32768)
                sum = fmaf(taps[i * kTaps + j], product[static_cast<int64_t>(row[j]) * columns + i], sum);
        return *scale * sums[i] * sum;
    });
}
