// What the GEMMs do with the sums in their accumulators before they are written: scales, biases, residuals and gates.
#pragma once
#include "activation.cuh"
#include "operand.cuh"
#include "ptx.cuh"

// By what sums of scaled operands are multiplied: x was scaled by *x_scale, w by *w_scale.
__device__ __forceinline__ float unscale(const float* x_scale, const float* w_scale) {
    return 1.0f / *x_scale / *w_scale;
}

// The biases of an output: their element `at`; 0 where there is no bias (null), or no such output (!inside).
struct Biases {
    int at;
    bool inside;

    __device__ __forceinline__ float of(const float* bias) const { return bias != nullptr && inside ? bias[at] : 0.0f; }
};

// gemm_linear's outputs, which may be added to a residual: written to rows `ldo` floats apart.
struct LinearOutput {
    float* out;
    int ldo;

    // Writes two neighbouring columns of a row, the second only if `both`. residual may be null, or out itself.
    __device__ __forceinline__ void store_columns(int row, int column, float a, float b, bool both,
                                                  const float* residual) const {
        uint64_t at = static_cast<uint64_t>(row) * ldo + column;
        if (both && ldo % 2 == 0) {  // both of a pair's addresses are then 8-byte aligned
            float2 r =
                residual != nullptr ? *reinterpret_cast<const float2*>(residual + at) : make_float2(0.0f, 0.0f);
            *reinterpret_cast<float2*>(out + at) = make_float2(a + r.x, b + r.y);
        } else {
            out[at] = residual != nullptr ? a + residual[at] : a;
            if (both) out[at + 1] = residual != nullptr ? b + residual[at + 1] : b;
        }
    }
};
