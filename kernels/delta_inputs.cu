// Gated DeltaNet (arXiv 2412.06464), what comes before the recurrence and what comes after it: the causal convolution
// of q, k and v and the norms of q and k; and the gated norm of what the recurrence gives. For heads of HEAD_DIM, and
// KERNEL taps.
#include "include/activation.cuh"
#include "include/chunks.cuh"
#include "include/gated_norm.cuh"

constexpr int kThreads = DELTA_INPUT_THREADS, kDim = HEAD_DIM, kTaps = KERNEL;
constexpr int kGroups = kThreads / kDim, kGroupRows = kChunk / kGroups;  // of threads that have a column each, and rows
constexpr int kAhead = 16;                                               // rows that are on their way at a time
static_assert(kThreads % kDim == 0 && kDim % 32 == 0, "whole groups of threads, whole warps of columns");

// sums: float32 rows of `channels` values, the heads of q, k and v side by side; taps: [channels, KERNEL]. Writes of
// each chunk and head HEAD_DIM halves of each position, zeros from `count` on: q and k, [chunks, key_heads, kChunk,
// HEAD_DIM], of Euclidean length 1, and v, [chunks, value_heads, ...], times *v_scale. A block takes a chunk (x) of one
// head (y).
extern "C" __global__ void __launch_bounds__(kThreads)
    delta_inputs(const float* sums, const float* taps, const Chunk* chunks, int channels, int key_heads,
                 int value_heads, float epsilon, const float* v_scale, half_t* q, half_t* k, half_t* v) {
    begin_kernel();
    __shared__ float convolved[kChunk][kDim + 1];
    Chunk chunk = chunks[blockIdx.x];
    int head = blockIdx.y, column = threadIdx.x % kDim, first = threadIdx.x / kDim * kGroupRows;
    int channel = head * kDim + column;
    auto load = [&](int position) {
        bool inside = position + chunk.behind >= 0 && position < chunk.count;
        return inside ? sums[static_cast<int64_t>(chunk.row_of(position)) * channels + channel] : 0.0f;
    };
    convolve<kTaps, kGroupRows, kAhead>(taps + channel * kTaps, 0.0f, first, load, [&](int row, float sum) {
        convolved[row][column] = row < chunk.count ? silu(sum) : 0.0f;
    });
    __syncthreads();
    bool is_v = head >= 2 * key_heads, is_k = head >= key_heads;
    int own = is_v ? head - 2 * key_heads : is_k ? head - key_heads : head, heads = is_v ? value_heads : key_heads;
    half_t* out = (is_v ? v : is_k ? k : q) + (static_cast<uint64_t>(blockIdx.x) * heads + own) * (kChunk * kDim);
    int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < kChunk; row += kThreads / 32) {
        float sum = 0.0f;
#pragma unroll
        for (int i = lane; i < kDim; i += 32) sum = fmaf(convolved[row][i], convolved[row][i], sum);
        float factor = is_v ? *v_scale : 1.0f / sqrtf(warp_sum(sum) + epsilon);
#pragma unroll
        for (int i = 2 * lane; i < kDim; i += 64)
            *reinterpret_cast<uint32_t*>(out + row * kDim + i) =
                pack_half2(convolved[row][i] * factor, convolved[row][i + 1] * factor);
    }
}

// out[t, :] = half(*scale * rms_norm(o[t, head, :]) * norm * silu(z[t, head, :])) (gated_norm.cuh).
extern "C" __global__ void __launch_bounds__(kThreads)
    delta_output(const float* o, const float* z, const float* norm, int heads, float epsilon, const float* scale,
                 half_t* out, int stride) {
    begin_kernel();
    gated_norm<kThreads, kDim, silu>(o, z, norm, heads, epsilon, scale, out, stride);
}
