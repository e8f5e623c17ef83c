// What products in int8 need of their matrices, and of rows that are sorted by expert.
#include "include/int8.cuh"
#include "include/reduce.cuh"

constexpr int kThreads = INT8_THREADS;

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
