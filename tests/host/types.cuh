// kernels/include/types.cuh for a host compiler, as far as kernels/quants/ needs it: CUDA's words, and halves in
// software.
#pragma once
#include <cstdint>
#include <cmath>
#include <cstring>
#include "words.hpp"
#define __device__
#define __host__
#define __forceinline__ inline

typedef uint16_t half_t;
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};

inline float bits_to_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline float half_to_float(half_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float f = exponent == 31 ? (mantissa ? NAN : INFINITY)
              : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                             : std::ldexp(static_cast<float>(mantissa), -24);
    return h & 0x8000 ? -f : f;
}
inline half_t float_to_half(float f) {  // of an integer up to 2048, or one of those times a power of two
    int exponent;
    float fraction = std::frexp(std::fabs(f), &exponent);  // of 0.5 to 1
    uint32_t magnitude = f == 0 ? 0 : (exponent + 14) << 10 | (static_cast<uint32_t>(fraction * 2048) & 1023);
    return static_cast<half_t>(magnitude | (std::signbit(f) ? 0x8000 : 0));
}
inline uint32_t pack_half2(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline uint32_t half2_add(uint32_t a, uint32_t b) {
    return pack_half2(half_to_float(a & 0xffff) + half_to_float(b & 0xffff),
                      half_to_float(a >> 16) + half_to_float(b >> 16));
}
uint32_t half2_multiply(uint32_t, uint32_t);  // decode_halves', which the host does not call
uint32_t half2_fma(uint32_t, uint32_t, uint32_t);
uint32_t low_halves(uint32_t);
uint32_t high_halves(uint32_t);
