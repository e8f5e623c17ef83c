// The powers of two by which values become halves.
#pragma once
#include "types.cuh"

constexpr int kHalfTop = 15;  // the largest scaled value is at most 2^15, a factor 2 under overflow

// The largest power of two by which `bound` may be multiplied without passing 2^top, or half of it; within 2^-kMost and
// 2^kMost, and 1 for a bound of 0.
template <int kMost = 126>
__device__ __forceinline__ float scale_for(float bound, int top) {
    int exponent = static_cast<int>(__float_as_uint(bound) >> 23 & 0xff) - 127 + 1;  // bound < 2^exponent
    int e = bound > 0.0f ? min(max(top - exponent, -kMost), kMost) : 0;
    return bits_to_float(static_cast<uint32_t>(e + 127) << 23);
}
