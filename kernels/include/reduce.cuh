// Reductions over a warp and a block, in a fixed order: the same bits every time.
#pragma once
#include "types.cuh"

// sum + |v|².
__device__ __forceinline__ float add_squares(float sum, const float4& v) {
    return fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, sum))));
}

// The sum over a warp, known to all its lanes.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

// The sum over the threads before this one of a block of kThreads, whose v is not negative; all: that over all of them.
// It may be called again at once.
template <int kThreads>
__device__ int block_scan(int v, int& all) {
    static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps, and a lane for each");
    __shared__ int of_warp[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = v;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        int below = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += below;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int before = 0;
    all = 0;
#pragma unroll 8  // all of them at once would take more registers than there are
    for (int w = 0; w < kThreads / 32; ++w) {
        if (w < warp) before += of_warp[w];
        all += of_warp[w];
    }
    __syncthreads();
    return before + sum - v;
}

// The sum over a block of kThreads threads, known to all of them. It may be called again at once.
template <int kThreads>
__device__ float block_sum(float v) {
    static_assert(kThreads % 32 == 0, "whole warps");
    __shared__ float partial[kThreads / 32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) total += partial[w];
    __syncthreads();
    return total;
}
