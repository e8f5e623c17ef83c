// The gates of GLU variants (arXiv 2002.05202).
#pragma once
#include "ptx.cuh"

enum Activation { kSilu = 0, kGeluTanh = 1 };

// silu(g) = g / (1 + exp(-g)); GELU's tanh form, 0.5 g (1 + tanh(z)) with z = sqrt(2/pi) (g + 0.044715 g³), is
// g / (1 + exp(-2z)).
__device__ __forceinline__ float activate(float g, int activation) {
    float z = activation == kSilu ? g : 1.5957691216f * fmaf(0.044715f * g * g, g, g);
    return __fdividef(g, 1.0f + exp2_approx(-1.4426950409f * z));
}
