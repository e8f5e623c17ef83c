// RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) over rows of the float32 residual stream, one block a
// row.
#include "include/operand.cuh"
#include "include/reduce.cuh"
#include "include/rms_norm.cuh"
#include "include/types.cuh"

constexpr int kThreads = NORM_THREADS;

// 1 / sqrt(mean((scale x)²) + epsilon) of a row.
__device__ __forceinline__ float inverse_rms(const float* x, int columns, float epsilon, float scale = 1.0f) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += kThreads) sum = fmaf(x[i], x[i], sum);
    return 1.0f / sqrtf(block_sum<kThreads>(sum) * scale * scale / static_cast<float>(columns) + epsilon);
}

// out[t, :] = *scale * rms_norm(x[t, :]) * weight as an operand: rows are `stride` apart, with zeros from `columns` to
// there. rows: which of x's rows they are, or null for all in order.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm(const float* x, const float* weight, half_t* out, int columns, int stride, float epsilon,
             const float* scale, const int* rows) {
    ask_for_weights<kThreads>(weight, columns);
    begin_kernel();
    int row = block_from_last();
    x += static_cast<uint64_t>(rows != nullptr ? rows[row] : row) * columns;
    out += static_cast<uint64_t>(row) * stride;
    normalise_row<kThreads>(RowThere{x, columns}, weight, out, columns, stride, epsilon, *scale);
}

// As rms_norm, of x less its mean where `centred` is 1, and with a bias (null for none): out = *scale * (norm(x) *
// weight + bias).
extern "C" __global__ void __launch_bounds__(kThreads)
    biased_norm(const float* x, const float* weight, const float* bias, half_t* out, int columns, int stride,
                float epsilon, int centred, const float* scale, const int* rows) {
    begin_kernel();
    x += static_cast<uint64_t>(rows != nullptr ? rows[blockIdx.x] : blockIdx.x) * columns;
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    float mean = 0.0f, squares = 0.0f;
    if (centred) {
        for (int i = threadIdx.x; i < columns; i += kThreads) mean += x[i];
        mean = block_sum<kThreads>(mean) / static_cast<float>(columns);
    }
    for (int i = threadIdx.x; i < columns; i += kThreads) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    float r = 1.0f / sqrtf(block_sum<kThreads>(squares) / static_cast<float>(columns) + epsilon);
    store_row<kThreads>(out, columns, stride, [&](int i) {
        return *scale * fmaf((x[i] - mean) * r, weight[i], bias != nullptr ? bias[i] : 0.0f);
    });
}

// x[t, :] = rms_norm(x[t, :]) * weight; rows are `stride` floats apart.
extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_in_place(float* x, const float* weight, int columns, int stride, float epsilon) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * stride;
    float r = inverse_rms(x, columns, epsilon);
    for (int i = threadIdx.x; i < columns; i += kThreads) x[i] *= r * weight[i];
}

// out[t, :] = *scale * x[t, :] as an operand: rows are `stride` apart, with zeros from `columns` to there.
extern "C" __global__ void __launch_bounds__(kThreads)
    cast(const float* x, half_t* out, int columns, int stride, const float* scale) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    auto value = [&](int i) { return i < columns ? x[i] * *scale : 0.0f; };
    for (int i = 2 * threadIdx.x; i < stride; i += 2 * kThreads)
        store_operand(out, i, operand_pair(value(i), value(i + 1)));
}

// x[t, :] = factor * (x[t, :] + rms_norm(row_scale[t] * y[t, :]) * weight). row_scale: powers of two, or null for ones.
extern "C" __global__ void __launch_bounds__(kThreads)
    add_rms_norm(float* x, const float* y, const float* row_scale, const float* weight, int columns, float epsilon,
                 float factor) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    y += static_cast<uint64_t>(blockIdx.x) * columns;
    float scale = row_scale != nullptr ? row_scale[blockIdx.x] : 1.0f;
    float r = inverse_rms(y, columns, epsilon, scale) * scale;
    for (int i = threadIdx.x; i < columns; i += kThreads) x[i] = fmaf(y[i] * r, weight[i], x[i]) * factor;
}

// x[t, :] = factor * (x[t, :] + rms_norm(s) * weight), of s = rms_norm(y[t, :]) * y_weight + rms_norm(z[t, :]) *
// z_weight.
extern "C" __global__ void __launch_bounds__(kThreads)
    add_norm_of_norms(float* x, const float* y, const float* y_weight, const float* z, const float* z_weight,
                      const float* weight, int columns, float epsilon, float factor) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    y += static_cast<uint64_t>(blockIdx.x) * columns;
    z += static_cast<uint64_t>(blockIdx.x) * columns;
    float of_y = inverse_rms(y, columns, epsilon), of_z = inverse_rms(z, columns, epsilon), squares = 0.0f;
    auto sum = [&](int i) { return fmaf(y[i] * of_y, y_weight[i], z[i] * of_z * z_weight[i]); };
    for (int i = threadIdx.x; i < columns; i += kThreads) squares = fmaf(sum(i), sum(i), squares);
    float r = 1.0f / sqrtf(block_sum<kThreads>(squares) / static_cast<float>(columns) + epsilon);
    for (int i = threadIdx.x; i < columns; i += kThreads) x[i] = fmaf(sum(i) * r, weight[i], x[i]) * factor;
}

// factors[t] = 1 / sqrt(mean(x[t, :]²) + epsilon).
extern "C" __global__ void __launch_bounds__(kThreads)
    row_factors(const float* x, int columns, float epsilon, float* factors) {
    begin_kernel();
    float r = inverse_rms(x + static_cast<uint64_t>(blockIdx.x) * columns, columns, epsilon);
    if (threadIdx.x == 0) factors[blockIdx.x] = r;
}

// vectors[s, :] = the mean over rows[s].x <= t < rows[s].y, one after another, of factors[t] * x[t, :] * weight: of
// RMSNorm's outputs. A thread takes a column; blockIdx.x is s.
extern "C" __global__ void __launch_bounds__(kThreads)
    pool(const float* x, const float* factors, const float* weight, const int2* rows, int columns, float* vectors) {
    begin_kernel();
    int2 own = rows[blockIdx.x];
    int column = blockIdx.y * kThreads + threadIdx.x;
    if (column >= columns) return;
    float sum = 0.0f;
    for (int t = own.x; t < own.y; ++t) sum = fmaf(x[static_cast<uint64_t>(t) * columns + column], factors[t], sum);
    vectors[static_cast<uint64_t>(blockIdx.x) * columns + column] =
        sum / static_cast<float>(own.y - own.x) * weight[column];
}
