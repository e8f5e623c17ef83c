// The kernels that read quantised weights, compiled once for each block format in use (FORMAT: a struct of quants/).
#include "include/reduce.cuh"
#include "include/types.cuh"
#include "quants/floats.cuh"
#include "quants/kquants.cuh"
#include "quants/legacy.cuh"

// Weights column .. column+7 of a row of `columns`; zeros past its end.
template <class Format>
__device__ __forceinline__ void decode_row8(const uint8_t* row, int column, int columns, float (&out)[8]) {
    if constexpr (Format::kElements == 1) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = column + i < columns ? Format::decode1(row + (column + i) * Format::kBytes) : 0.0f;
    } else if (column < columns) {
        Format::decode8(row + column / Format::kElements * Format::kBytes, column % Format::kElements, out);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = 0.0f;
    }
}

// out[row, :] = half(*scale * w[row, :]), rows `stride` halves apart, zeros from `columns` to there: a GEMM's operand.
// gated: leave room for another matrix between groups of 8 rows, so that gate and up interleave.
extern "C" __global__ void __launch_bounds__(256)
    dequantize(const uint8_t* weights, uint64_t row_bytes, int rows, int columns, half_t* out, int stride, int gated,
               const float* scale) {
    int chunks = stride / 8;
    uint32_t index = blockIdx.x * 256u + threadIdx.x;
    int row = index / chunks, column = index % chunks * 8;
    if (row >= rows) return;
    float w[8];
    decode_row8<FORMAT>(weights + row * row_bytes, column, columns, w);
    float s = *scale;
    uint4 packed = make_uint4(pack_half2(w[0] * s, w[1] * s), pack_half2(w[2] * s, w[3] * s),
                              pack_half2(w[4] * s, w[5] * s), pack_half2(w[6] * s, w[7] * s));
    uint64_t out_row = gated ? row + row / 8 * 8 : row;
    *reinterpret_cast<uint4*>(out + out_row * stride + column) = packed;
}

// out[t, :] = scale * w[tokens[t], :] in float32: the embedding.
extern "C" __global__ void __launch_bounds__(256)
    embed(const uint8_t* weights, uint64_t row_bytes, int columns, const int* tokens, float scale, float* out) {
    const uint8_t* row = weights + tokens[blockIdx.x] * row_bytes;
    for (int column = threadIdx.x * 8; column < columns; column += 256 * 8) {
        float w[8];
        decode_row8<FORMAT>(row, column, columns, w);
        float* to = out + static_cast<uint64_t>(blockIdx.x) * columns + column;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (column + i < columns) to[i] = scale * w[i];
    }
}

// A warp a row: row_norm[row] = |w[row, :] ∘ input|, and *absmax = max |w| (as bits: non-negative floats sort so).
// `input` is the norm weight that the matrix's input was multiplied by, or null for ones.
extern "C" __global__ void __launch_bounds__(256)
    measure(const uint8_t* weights, uint64_t row_bytes, int rows, int columns, const float* input, float* row_norm,
            uint32_t* absmax) {
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float sum = 0.0f, largest = 0.0f;
    for (int column = lane * 8; column < columns; column += 256) {
        float w[8];
        decode_row8<FORMAT>(weights + row * row_bytes, column, columns, w);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float x = input != nullptr && column + i < columns ? w[i] * input[column + i] : w[i];
            sum = fmaf(x, x, sum);
            // Not fmaxf, which would drop a NaN: its bits are above every number's, and are kept.
            largest = bits_to_float(max(__float_as_uint(largest), __float_as_uint(fabsf(w[i]))));
        }
    }
    sum = warp_sum(sum);
    uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(largest));
    if (lane == 0) {
        row_norm[row] = sqrtf(sum);
        atomicMax(absmax, bits);
    }
}
