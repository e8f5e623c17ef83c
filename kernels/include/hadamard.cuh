// Groups of 128 columns multiplied by the Hadamard matrix of 128 (of ones and minus ones: sqrt(128) times the
// orthogonal one). The bits of a column's number may be in any order: the matrix is the same.
#pragma once
#include "ptx.cuh"

// A group of floats, of which each of 8 neighbouring lanes has 16. All lanes of a warp call this.
__device__ __forceinline__ void rotate(float (&v)[16]) {
#pragma unroll
    for (int bit = 1; bit < 16; bit *= 2)
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (i & bit) continue;
            float low = v[i], high = v[i | bit];
            v[i] = low + high, v[i | bit] = low - high;
        }
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
        float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] = fmaf(v[i], sign, __shfl_xor_sync(0xffffffffu, v[i], lanes));
    }
}

// A group of halves, by the matrix units, which multiply by the Hadamard matrix of 16: a group is eight "sixteens",
// which are then added to one another and subtracted. kThreads = 16 / kHeld neighbouring lanes share a group, and
// each has eight neighbouring columns of kHeld quarters of it; the bits are the same for any kHeld. In bits, the number
// of a column in its group is
//
//     q q  c c  h s e     q: its quarter; c: the thread, modulo four; h, e: which of the thread's four of a sixteen
//
// and the bits q and s are the number of its sixteen. So eight columns in memory are what a thread has of two rows of
// the instruction's left matrix, those of either s, and four floats that come out of it are neighbours again.
template <int kHeld>
struct GroupShare {
    static constexpr int kThreads = 16 / kHeld;

    // The first column, of the group, of the eight that this thread has of the quarter `i` of those that it holds.
    __device__ __forceinline__ static int column(int i) {
        return (threadIdx.x / 4 % (4 / kHeld) * kHeld + i) * 32 + threadIdx.x % 4 * 8;
    }

    // values = the rotated columns of halves. All lanes of a warp call this.
    __device__ __forceinline__ static void rotate(const uint4 (&halves)[kHeld], float (&values)[kHeld][8]) {
        // Ones and minus ones for the rows of the matrix of 16 whose h is 0, and its columns whose h is 0.
        int of_row = threadIdx.x % 4 * 2, of_column = threadIdx.x % 32 / 4;
        uint32_t ones = 0x3c003c00u ^ (__popc(of_row & of_column) & 1) * 0x80008000u ^ (of_column & 1) << 31;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const uint32_t a[4] = {halves[i].x, halves[i].y, halves[i].z, halves[i].w};
            float sums[2][4];
            mma_m16n8k16_alone(sums[0], a, ones, ones);
            mma_m16n8k16_alone(sums[1], a, ones, ones ^ 0x80008000u);
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float low = sums[h][e], high = sums[h][2 + e];
                    values[i][4 * h + e] = low + high, values[i][4 * h + 2 + e] = low - high;
                }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int bit = 1; bit < kHeld; bit *= 2)
#pragma unroll
                for (int i = 0; i < kHeld; ++i) {
                    if (i & bit) continue;
                    float low = values[i][j], high = values[i | bit][j];
                    values[i][j] = low + high, values[i | bit][j] = low - high;
                }
#pragma unroll
            for (int lanes = 4; lanes < kThreads; lanes *= 2) {
                float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
                for (int i = 0; i < kHeld; ++i)
                    values[i][j] = fmaf(values[i][j], sign, __shfl_xor_sync(0xffffffffu, values[i][j], lanes));
            }
        }
    }
};
