// The gates of GLU variants (arXiv 2002.05202).
#pragma once

enum Activation { kSilu = 0, kGeluTanh = 1 };

__device__ __forceinline__ float activate(float g, int activation) {
    if (activation == kSilu) return __fdividef(g, 1.0f + __expf(-g));
    float inner = 0.7978845608f * fmaf(0.044715f * g * g, g, g);  // sqrt(2/pi) (g + 0.044715 g³)
    return __fdividef(g, 1.0f + __expf(-2.0f * inner));           // 0.5 g (1 + tanh(inner))
}
