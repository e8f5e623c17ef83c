// What products in int8 need of their operands and of their matrices, whatever these were made of.
#include "include/int8.cuh"
#include "include/reduce.cuh"

constexpr int kThreads = INT8_THREADS;
constexpr int kKept = 4;  // sixteens of a row that a thread keeps; it reads and rotates the others twice

// The largest of the bits that a block's threads have, known to all of them.
__device__ __forceinline__ uint32_t block_largest(uint32_t largest) {
    __shared__ uint32_t of_warp[kThreads / 32];
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) largest = max(largest, of_warp[w]);
    return largest;
}

// Calls kept(where, its number) for the first kKept sixteens of a row that are a thread's, and read(where) for the
// others; the lanes of a warp go on together.
template <class Kept, class Read>
__device__ __forceinline__ void each_sixteen(int padded, Kept kept, Read read) {
    int first = threadIdx.x / 32 * 512, own = threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < kKept; ++i)
        if (first + i * kThreads * 16 < padded) kept(own + i * kThreads * 16, i);
    for (int i = kKept; first + i * kThreads * 16 < padded; ++i) read(own + i * kThreads * 16);
}

// out, scales = the rows of an operand (operand.cuh: halves, *scale times their values, rows `stride` apart), rotated
// and rounded; rows of out are `padded` columns, whole groups. Eight lanes take a group, each sixteen columns that are
// neighbours in memory. A block takes a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    round_rows(const half_t* x, int stride, const float* scale, int8_t* out, int padded, float* scales) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * stride;
    out += static_cast<uint64_t>(blockIdx.x) * padded;
    auto rotated = [&](int at, float (&v)[16]) {
        uint4 pieces[2] = {};
        if (at < stride) {  // a whole group of operand order, half a group of the rotation's
            pieces[0] = *reinterpret_cast<const uint4*>(x + at);
            pieces[1] = *reinterpret_cast<const uint4*>(x + at + 8);
        }
        const uint32_t pairs[8] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w,
                                   pieces[1].x, pieces[1].y, pieces[1].z, pieces[1].w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[2 * i] = half_to_float(static_cast<half_t>(pairs[i]));
            v[2 * i + 1] = half_to_float(static_cast<half_t>(pairs[i] >> 16));
        }
        rotate(v);
    };
    float v[kKept][16];
    uint32_t largest = 0;
    each_sixteen(
        padded, [&](int at, int i) { rotated(at, v[i]), largest = largest_of(v[i], largest); },
        [&](int at) {
            float w[16];
            rotated(at, w);
            largest = largest_of(w, largest);
        });
    Rounding rounding(block_largest(largest));
    if (threadIdx.x == 0) scales[blockIdx.x] = rounding.scale / *scale;
    auto write = [&](int at, const float (&w)[16]) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = rounding.byte(w[4 * i]) | rounding.byte(w[4 * i + 1]) << 8 | rounding.byte(w[4 * i + 2]) << 16 |
                       rounding.byte(w[4 * i + 3]) << 24;
        if (at < padded) *reinterpret_cast<uint4*>(out + at) = make_uint4(words[0], words[1], words[2], words[3]);
    };
    each_sixteen(
        padded, [&](int at, int i) { write(at, v[i]); },
        [&](int at) {
            float w[16];
            rotated(at, w);
            write(at, w);
        });
}

// row_norm[row] = a bound of |w[row] · x'| / |x / input|₂, where x' is what rounding leaves of an operand x; *absmax =
// the larger of itself and what no weight is larger than, as bits. input [columns]: the norm weight that x was
// multiplied by, or null for ones. Of `padded` rotated values none is off by more than half a 127th of the largest, and
// so |x'| <= (1 + sqrt(padded) / 254) |x|. A warp takes a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    measure_int8(const int8_t* tiles, const float* scales, int rows, int columns, int groups, const float* input,
                 float* row_norm, uint32_t* absmax) {
    begin_kernel();
    int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    uint32_t loudest = 0;
    for (int i = lane; input != nullptr && i < columns; i += 32)
        loudest = max(loudest, __float_as_uint(fabsf(input[i])));
    loudest = __reduce_max_sync(0xffffffffu, loudest);
    const int8_t* from = tiles + static_cast<uint64_t>(row / kInt8TileRows) * groups * kInt8TileBytes +
                         int8_place(row % kInt8TileRows) * kRotated;
    float sum = 0.0f;
    for (int i = lane; i < groups * kRotated; i += 32) {
        float w = static_cast<float>(from[i / kRotated * kInt8TileBytes + i % kRotated]);
        sum = fmaf(w, w, sum);
    }
    float length = scales[row] * sqrtf(warp_sum(sum));
    if (lane != 0) return;
    float more = 1.0f + sqrtf(static_cast<float>(groups * kRotated)) / 254.0f;
    row_norm[row] = length * more * (input != nullptr ? bits_to_float(loudest) : 1.0f);
    atomicMax(absmax, __float_as_uint(length));
}
