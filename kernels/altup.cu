// Several residual streams (AltUp, arXiv 2301.13310), float32 [kStreams, n, columns], and gates of which few are open,
// as Gemma 3n has them. A block takes a token.
#include "include/activation.cuh"
#include "include/operand.cuh"
#include "include/reduce.cuh"

constexpr int kThreads = ALTUP_THREADS, kStreams = ALTUP_STREAMS;

// The Euclidean length of a row.
__device__ __forceinline__ float length_of(const float* x, int columns) {
    float squares = 0.0f;
    for (int i = threadIdx.x; i < columns; i += kThreads) squares = fmaf(x[i], x[i], squares);
    return sqrtf(block_sum<kThreads>(squares));
}

// coefficients[i] = the sum over j of matrix[i, j] * tanh(modalities[j]), of `count` of them, for all of a block's
// threads.
__device__ __forceinline__ void mix(const float* matrix, const float* modalities, int count, float* coefficients) {
    if (threadIdx.x < count) {
        float sum = 0.0f;
        for (int j = 0; j < kStreams; ++j) sum = fmaf(matrix[threadIdx.x * kStreams + j], tanhf(modalities[j]), sum);
        coefficients[threadIdx.x] = sum;
    }
    __syncthreads();
}

// Stream 0 is x [n, columns]; the others are y's thirds [n, kStreams - 1, columns], each row as long as x's.
extern "C" __global__ void __launch_bounds__(kThreads)
    altup_streams(const float* x, const float* y, int columns, float* streams) {
    begin_kernel();
    uint64_t row = static_cast<uint64_t>(blockIdx.x) * columns, stream = static_cast<uint64_t>(gridDim.x) * columns;
    float wanted = length_of(x + row, columns);
    for (int i = threadIdx.x; i < columns; i += kThreads) streams[row + i] = x[row + i];
    for (int k = 1; k < kStreams; ++k) {
        const float* from = y + (kStreams - 1) * row + (k - 1) * columns;
        float factor = wanted / length_of(from, columns);
        for (int i = threadIdx.x; i < columns; i += kThreads) streams[k * stream + row + i] = from[i] * factor;
    }
}

// streams[to] += the sum over sources of c[to, source] * streams[source], where c is the matrix [kStreams², kStreams]
// times tanh(modalities [n, kStreams]); x is the first of them.
extern "C" __global__ void __launch_bounds__(kThreads)
    altup_predict(float* streams, const float* modalities, const float* matrix, int columns, float* x) {
    begin_kernel();
    __shared__ float c[kStreams * kStreams];
    uint64_t row = static_cast<uint64_t>(blockIdx.x) * columns, stream = static_cast<uint64_t>(gridDim.x) * columns;
    mix(matrix, modalities + static_cast<uint64_t>(blockIdx.x) * kStreams, kStreams * kStreams, c);
    for (int i = threadIdx.x; i < columns; i += kThreads) {
        float was[kStreams];
#pragma unroll
        for (int k = 0; k < kStreams; ++k) was[k] = streams[k * stream + row + i];
#pragma unroll
        for (int to = 0; to < kStreams; ++to) {
            float sum = was[to];
#pragma unroll
            for (int k = 0; k < kStreams; ++k) sum = fmaf(c[to * kStreams + k], was[k], sum);
            streams[to * stream + row + i] = sum;
            if (to == 0) x[row + i] = sum;
        }
    }
}

// streams[k] += (1 + c[k]) * (made - streams[0]), where c is the matrix [kStreams, kStreams] times tanh(modalities);
// first = stream 0 then, times weight.
extern "C" __global__ void __launch_bounds__(kThreads)
    altup_correct(float* streams, const float* modalities, const float* matrix, const float* made, const float* weight,
                  int columns, float* first) {
    begin_kernel();
    __shared__ float c[kStreams];
    uint64_t row = static_cast<uint64_t>(blockIdx.x) * columns, stream = static_cast<uint64_t>(gridDim.x) * columns;
    mix(matrix, modalities + static_cast<uint64_t>(blockIdx.x) * kStreams, kStreams, c);
    for (int i = threadIdx.x; i < columns; i += kThreads) {
        float change = made[row + i] - streams[row + i];
#pragma unroll
        for (int k = 0; k < kStreams; ++k) {
            float corrected = fmaf(1.0f + c[k], change, streams[k * stream + row + i]);
            streams[k * stream + row + i] = corrected;
            if (k == 0) first[row + i] = corrected * weight[i];
        }
    }
}

// x[t, :] += y[t, third number `third`] * |streams[0]| / |that|, and is divided by kStreams if it is the last; y: [n,
// kStreams - 1, columns]. With the first third x begins as stream 0.
extern "C" __global__ void __launch_bounds__(kThreads)
    altup_merge(const float* streams, const float* y, int third, int columns, float* x) {
    begin_kernel();
    uint64_t row = static_cast<uint64_t>(blockIdx.x) * columns;
    const float* from = y + (kStreams - 1) * row + third * columns;
    float factor = length_of(streams + row, columns) / length_of(from, columns);
    float share = third == kStreams - 2 ? 1.0f / kStreams : 1.0f;
    for (int i = threadIdx.x; i < columns; i += kThreads) {
        float was = third == 0 ? streams[row + i] : x[row + i];
        x[row + i] = fmaf(from[i], factor, was) * share;
    }
}

// x[t, :] *= row_scale[t].
extern "C" __global__ void __launch_bounds__(kThreads) scale_rows(float* x, const float* row_scale, int columns) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    for (int i = threadIdx.x; i < columns; i += kThreads) x[i] *= row_scale[blockIdx.x];
}

// out[t, :] = *scale * gelu(max(g - mean - sparsity * deviation, 0)) * u, an operand with rows `stride` apart; g and u:
// the halves of x [n, 2 * columns], mean and (sample) deviation those of a token's g.
extern "C" __global__ void __launch_bounds__(kThreads)
    sparse_gates(const float* x, int columns, float sparsity, const float* scale, half_t* out, int stride) {
    begin_kernel();
    const float *g = x + static_cast<uint64_t>(blockIdx.x) * (2 * columns), *u = g + columns;
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    float sum = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x; i < columns; i += kThreads) sum += g[i];
    float mean = block_sum<kThreads>(sum) / static_cast<float>(columns);
    for (int i = threadIdx.x; i < columns; i += kThreads) squares = fmaf(g[i] - mean, g[i] - mean, squares);
    float least = mean + sparsity * sqrtf(block_sum<kThreads>(squares) / static_cast<float>(columns - 1));
    store_row<kThreads>(out, columns, stride, [&](int i) {
        float open = g[i] - least;
        return gated(open < 0.0f ? 0.0f : open, u[i], kGeluTanh) * *scale;
    });
}
