// What is told of a row of logits: the greedy token, its logit, and the log of the sum of exponentials.
#include "include/reduce.cuh"
#include "include/types.cuh"

struct Summary {
    int token;  // the lowest id among the largest logits; -1 if any logit is NaN
    float logit;
    float log_sum_exp;  // relative to logit: log-probability of the greedy token is -log_sum_exp
};

constexpr int kThreads = 1024;

// logits = cap(scale * logits), cap(y) = softcap * tanh(y / softcap) where softcap > 0 (arXiv 2408.00118).
extern "C" __global__ void __launch_bounds__(kThreads) finish_logits(float* logits, uint64_t n, float scale, float softcap) {
    begin_kernel();
    uint64_t i = blockIdx.x * static_cast<uint64_t>(kThreads) + threadIdx.x;
    if (i >= n) return;
    float y = scale * logits[i];
    logits[i] = softcap > 0.0f ? softcap * tanhf(y / softcap) : y;
}

extern "C" __global__ void __launch_bounds__(kThreads) summarise(const float* logits, int n, Summary* out) {
    begin_kernel();
    __shared__ float best_value[kThreads / 32];
    __shared__ int best_index[kThreads / 32];
    __shared__ int any_nan;
    if (threadIdx.x == 0) any_nan = 0;
    __syncthreads();
    float value = -__int_as_float(0x7f800000);
    int index = 0x7fffffff;
    bool nan = false;
    for (int i = threadIdx.x; i < n; i += kThreads) {
        float x = logits[i];
        nan |= x != x;
        if (x > value || (x == value && i < index)) value = x, index = i;
    }
    if (nan) any_nan = 1;
    auto take = [&](float v, int i) {
        if (v > value || (v == value && i < index)) value = v, index = i;
    };
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
        take(__shfl_xor_sync(0xffffffffu, value, offset), __shfl_xor_sync(0xffffffffu, index, offset));
    if (threadIdx.x % 32 == 0) best_value[threadIdx.x / 32] = value, best_index[threadIdx.x / 32] = index;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) take(best_value[w], best_index[w]);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += kThreads) sum += expf(logits[i] - value);
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) *out = Summary{any_nan ? -1 : index, value, logf(sum)};
}
