// Powers of two that keep half-precision operands in range, chosen on the device so that no launch waits for the host.
//
// A half holds 2^-24 .. 65504. The scales below come from bounds that no input can exceed, so overflow is impossible. A
// weight is at most its matrix's absmax. An output x of RMSNorm with weight w, of H columns, obeys |x / w|₂ <= sqrt(H),
// so by Cauchy-Schwarz |W_n · x| <= sqrt(H) · |W_n ∘ w|₂. Such a bound is loose by a factor of about sqrt(H), which is
// far less than the 40 binades that a half has.
#include "include/scale_for.cuh"

constexpr int kThreads = OUTPUT_SCALE_THREADS;
static_assert(SINGLE_THREAD == 1, "weight_scale, divide_scale and square_scale have work for one thread");
constexpr int kWeightTop = 13;  // decode_halves' intermediate d * kCenter - m may be a few times the largest weight

// *scale for a matrix whose largest magnitude has the bits *absmax.
extern "C" __global__ void weight_scale(const uint32_t* absmax, float* scale) {
    begin_kernel();
    *scale = scale_for(bits_to_float(*absmax), kWeightTop);
}

// *out = *source / factor. A product whose operand is said to be scaled by *out comes out `factor` times as large.
extern "C" __global__ void divide_scale(const float* source, float factor, float* out) {
    begin_kernel();
    *out = *source / factor;
}

// *out for the squares of values that are scaled by *source: those are at most 2^kHalfTop / *source.
extern "C" __global__ void square_scale(const float* source, float* out) {
    begin_kernel();
    float root = static_cast<float>(1 << kHalfTop) / *source;
    *out = scale_for(root * root, kHalfTop);
}

// *scale for n outputs, of which output i is at most gain * a[i] + |bias_a[i]|; where b is given, at most that times
// gain * b[i] + |bias_b[i]|. The biases may be null. input_scale: null, or the scale of inputs of which nothing else is
// known than that it keeps them in half's range: then gain is for inputs of at most 1. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    output_scale(const float* a, const float* bias_a, const float* b, const float* bias_b, int n, float gain,
                 const float* input_scale, float* scale) {
    begin_kernel();
    if (input_scale != nullptr) gain *= static_cast<float>(1 << kHalfTop) / *input_scale;
    __shared__ float partial[kThreads / 32];
    float largest = 0.0f;
    for (int i = threadIdx.x; i < n; i += kThreads) {
        float bound = gain * a[i] + (bias_a != nullptr ? fabsf(bias_a[i]) : 0.0f);
        if (b != nullptr) bound *= gain * b[i] + (bias_b != nullptr ? fabsf(bias_b[i]) : 0.0f);
        largest = fmaxf(largest, bound);
    }
    for (int offset = 16; offset; offset >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = largest;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < kThreads / 32; ++w) largest = fmaxf(largest, partial[w]);
        *scale = scale_for(largest, kHalfTop);
    }
}
