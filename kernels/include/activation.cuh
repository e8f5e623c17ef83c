// The gates of GLU variants (arXiv 2002.05202), and what recurrences and gated attention have in their place.
#pragma once
#include "ptx.cuh"

enum Activation { kSilu = ACTIVATION_SILU, kGeluTanh = ACTIVATION_GELU_TANH, kSwigluOai = ACTIVATION_SWIGLU_OAI };

// act(g) * u. SiLU is g / (1 + exp(-g)). GELU's tanh form, 0.5 g (1 + tanh(z)) with z = sqrt(2/pi) (g + 0.044715 g³),
// is g / (1 + exp(-2z)). gpt-oss's (ggml_swiglu_oai) is SiLU with a slope of 1.702 times u + 1, with g and u clamped
// first.
__device__ __forceinline__ float gated(float g, float u, int activation) {
    float z = g;
    if (activation == kGeluTanh) z = 1.5957691216f * fmaf(0.044715f * g * g, g, g);
    if (activation == kSwigluOai) {
        g = g > 7.0f ? 7.0f : g, u = (u > 7.0f ? 7.0f : u < -7.0f ? -7.0f : u) + 1.0f;  // NaN stays
        z = 1.702f * g;
    }
    return g * reciprocal_approx(1.0f + exp2_approx(-1.4426950409f * z)) * u;
}

// The same for many values: one branch for all of them is better than one for each.
template <int kActivation>
__device__ __forceinline__ float gated(float g, float u) {
    return gated(g, u, kActivation);
}

// silu(g) * u of g times kSiluSlope, which is -log2(e), and of u times kPerSlope, one over it: two products less than
// `gated`, where scales that g and u have anyway take these factors.
constexpr float kSiluSlope = -1.4426950409f, kPerSlope = -0.6931471806f;
__device__ __forceinline__ float scaled_silu(float g, float u) {
    return g * reciprocal_approx(1.0f + exp2_approx(g)) * u;
}

// max(x, 0)² (arXiv 2109.08668); NaN stays.
__device__ __forceinline__ float relu_squared(float x) {
    return x < 0.0f ? 0.0f : x * x;
}

// act(x), of a network without a gate: GELU, or relu_squared.
__device__ __forceinline__ float activated(float x, int activation) {
    return activation == ACTIVATION_RELU_SQUARED ? relu_squared(x) : gated(x, 1.0f, activation);
}

// With the library's exponential: once for each value, where `gated` is for the inner loops of GEMMs.
__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + expf(-x));
}

__device__ __forceinline__ float softplus(float x) {
    return x > 20.0f ? x : log1pf(expf(x));
}

__device__ __forceinline__ float silu(float x) {
    return x / (1.0f + expf(-x));
}
