// Rotary embedding of one element (arXiv 2104.09864).
#pragma once
#include "types.cuh"

// Element i, below 2 * pairs, of x rotated by its pair's angle. angles: cosine and sine of each of `pairs` pairs, which
// are neighbours (interleaved) or `pairs` elements apart.
__device__ __forceinline__ float rotated(const float* x, int i, const float2* angles, int pairs, bool interleaved) {
    int pair = interleaved ? i / 2 : i % pairs;
    bool second = interleaved ? i & 1 : i >= pairs;
    float turned = x[interleaved ? i ^ 1 : second ? i - pairs : i + pairs] * angles[pair].y;
    return fmaf(x[i], angles[pair].x, second ? turned : -turned);
}
