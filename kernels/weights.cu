// The kernels that read quantised weights, compiled once for each block format in use (FORMAT: a struct of quants/).
#include "include/operand.cuh"
#include "include/reduce.cuh"
#include "include/types.cuh"
#include "quants/all.cuh"

using Format = FORMAT;
constexpr int kThreads = WEIGHT_THREADS, kSlices = 8;   // kSlices: of a row, in measure
constexpr int kTileBytes = kTileRows * Format::kBytes;  // of a weight tile
static_assert(kThreads == kSlices * kTileRows, "measure: a thread has a slice of a row of a weight tile");

// The weight tile that holds weight `column` of row `row`; a row tile has `units` of them.
__device__ __forceinline__ const uint8_t* tile_at(const uint8_t* weights, int row, int column, int units) {
    return weights + (static_cast<uint64_t>(row / kTileRows) * units + column / Format::kElements) * kTileBytes;
}

__device__ __forceinline__ void decode_at(const uint8_t* weights, int row, int column, int units, float (&out)[16]) {
    decode_floats<Format>(tile_at(weights, row, column, units), row % kTileRows, column % Format::kElements, out);
}

// Makes weight tiles of rows as GGUF stores them: `rows` of row_bytes each (up to 3 bytes before and after them are
// read too). A block takes REPACK_UNITS weight tiles of a row tile through shared memory, so that whole lines are read
// and written.
extern "C" __global__ void __launch_bounds__(kThreads)
    repack(const uint8_t* source, uint64_t row_bytes, int rows, uint8_t* tiles, int units) {
    constexpr int kSpan = REPACK_UNITS * Format::kBytes,
                  kStride = ((kSpan + 7) / 4 | 1) * 4;  // odd words: no bank conflicts
    constexpr int kPieces = Format::kBytes / 16, kTail = Format::kBytes % 16, kTailAt = kPieces * 16;
    __shared__ __align__(4) uint8_t staged[kTileRows * kStride];
    begin_kernel();
    int first = blockIdx.x * REPACK_UNITS, count = min(REPACK_UNITS, units - first);
    int valid =
        static_cast<int>(min(static_cast<uint64_t>(kSpan), row_bytes - static_cast<uint64_t>(first) * Format::kBytes));
    auto start_of = [&](int row) {
        return source + (blockIdx.y * static_cast<uint64_t>(kTileRows) + row) * row_bytes +
               static_cast<uint64_t>(first) * Format::kBytes;
    };
    auto skew_of = [&](int row) { return static_cast<int>(reinterpret_cast<uint64_t>(start_of(row)) & 3); };
    for (int row = threadIdx.x / 32; row < kTileRows; row += kThreads / 32) {
        bool inside = static_cast<int>(blockIdx.y) * kTileRows + row < rows;
        int skew = skew_of(row);
        const uint32_t* from = reinterpret_cast<const uint32_t*>(start_of(row) - skew);
        uint32_t* to = reinterpret_cast<uint32_t*>(staged + row * kStride);
        for (int word = threadIdx.x % 32; 4 * word < kSpan + skew; word += 32) {
            int left = inside ? valid + skew - 4 * word : 0;
            uint32_t bytes = left > 0 ? from[word] : 0;
            to[word] = left > 0 && left < 4 ? bytes & ((1u << 8 * left) - 1) : bytes;
        }
    }
    __syncthreads();
    uint8_t* to = tiles + (static_cast<uint64_t>(blockIdx.y) * units + first) * kTileBytes;
    for (int i = threadIdx.x; i < count * kPieces * kTileRows; i += kThreads) {
        int unit = i / (kPieces * kTileRows), piece = i / kTileRows % kPieces, slot = i % kTileRows;
        int row = slot ^ Unit<Format::kBytes>::swizzle(piece);
        const uint8_t* from = staged + row * kStride + skew_of(row) + unit * Format::kBytes;
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t bytes[4];
#pragma unroll
            for (int b = 0; b < 4; ++b) bytes[b] = repacked_byte<Format>(from, 16 * piece + 4 * w + b);
            words[w] = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
        }
        *reinterpret_cast<uint4*>(to + static_cast<uint64_t>(unit) * kTileBytes + (piece * kTileRows + slot) * 16) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
    for (int i = threadIdx.x; i < count * kTail * kTileRows; i += kThreads) {
        int unit = i / (kTileRows * (kTail ? kTail : 1)), row = i / (kTail ? kTail : 1) % kTileRows,
            at = i % (kTail ? kTail : 1);
        const uint8_t* from = staged + row * kStride + skew_of(row) + unit * Format::kBytes;
        to[static_cast<uint64_t>(unit) * kTileBytes + kTailAt * kTileRows + row * kTail + at] =
            static_cast<uint8_t>(repacked_byte<Format>(from, kTailAt + at));
    }
}

// Makes gemm_sm80.cu's operand of `rows` rows of w from row `first` on: halves of *scale * w, with zeros from the
// matrix's columns to `stride`, at rows first_out .. of out, `stride` apart. A thread makes 16. gated: after each 8
// rows, room for 8 rows of another matrix is left, so that gate and up take turns.
extern "C" __global__ void __launch_bounds__(kThreads)
    dequantize(const uint8_t* weights, int units, int first, int rows, half_t* out, int stride, int first_out,
               int gated, const float* scale) {
    begin_kernel();
    uint32_t index = blockIdx.x * static_cast<uint32_t>(kThreads) + threadIdx.x;
    int row = index / (stride / 16), column = index % (stride / 16) * 16;
    bool inside = row < rows;
    if (!inside) row = column = 0;  // its lane is still needed below
    uint32_t w[8];
    Fields fields = load_fields<Format>(tile_at(weights, first + row, column, units), (first + row) % kTileRows,
                                        column % Format::kElements);
    decode_halves<Format>(fields, column % Format::kElements, *scale, w);
    // Four lanes have the 64 weights of an operand's group, each of them pairs from everywhere in the group's operand
    // order. They trade, first with the lane two away and then with the next, so that each can write 32 bytes in a run.
#pragma unroll
    for (int distance = 2; distance; distance /= 2) {
        bool upper = threadIdx.x & distance;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            if (pair & distance) continue;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t &low = w[2 * pair + i], &high = w[2 * (pair + distance) + i];
                uint32_t given = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
                (upper ? low : high) = given;
            }
        }
    }
    if (!inside) return;
    half_t* to = out + static_cast<uint64_t>(first_out + (gated ? row + row / 8 * 8 : row)) * stride;
    uint4* chunks = reinterpret_cast<uint4*>(to + column);
    chunks[0] = make_uint4(w[0], w[2], w[4], w[6]);
    chunks[1] = make_uint4(w[1], w[3], w[5], w[7]);
}

// out[t, :] = factor * w[tokens[t], :] in float32: the embedding. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    embed(const uint8_t* weights, int units, int columns, const int* tokens, float factor, float* out) {
    begin_kernel();
    int row = tokens[blockIdx.x];
    for (int column = threadIdx.x * 16; column < columns; column += kThreads * 16) {
        float w[16];
        decode_at(weights, row, column, units, w);
        float* to = out + static_cast<uint64_t>(blockIdx.x) * columns + column;
        bool whole = columns % 4 == 0;  // fours, which are written at once
#pragma unroll
        for (int i = 0; i < 16; i += 4)
            if (whole && column + i < columns)
                *reinterpret_cast<float4*>(to + i) =
                    make_float4(factor * w[i], factor * w[i + 1], factor * w[i + 2], factor * w[i + 3]);
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (!whole && column + i < columns) to[i] = factor * w[i];
    }
}

// out[m, j, i] = w[m * height + i, j] in float32: of matrices of `height` rows, one under another, each transposed. A
// block takes a row tile, a warp all of its rows.
extern "C" __global__ void __launch_bounds__(kThreads)
    decode_transposed(const uint8_t* weights, int units, int rows, int columns, int height, float* out) {
    begin_kernel();
    int row = blockIdx.x * kTileRows + threadIdx.x % kTileRows, slice = threadIdx.x / kTileRows;
    out += static_cast<uint64_t>(row / height) * height * columns + row % height;
    for (int column = slice * 16; column < columns; column += kSlices * 16) {
        float w[16];
        decode_at(weights, row, column, units, w);
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (row < rows && column + i < columns) out[static_cast<uint64_t>(column + i) * height] = w[i];
    }
}

// row_norm[row] = |w[row, :] ∘ input|₂, and *absmax = the larger of itself and max |w|, as bits: those of floats that
// are not negative have their order. input [columns]: the norm weight that the matrix's input was multiplied by, or
// null for ones. A block takes a row tile.
extern "C" __global__ void __launch_bounds__(kThreads) measure(const uint8_t* weights, int units, int rows, int columns,
                                                               const float* input, float* row_norm, uint32_t* absmax) {
    begin_kernel();
    __shared__ float partial[kSlices][kTileRows];
    int row = threadIdx.x % kTileRows, slice = threadIdx.x / kTileRows;
    float sum = 0.0f;
    // As bits, and not by fmaxf, which would drop a NaN: a NaN's bits are above every number's, and stay.
    uint32_t largest = 0;
    for (int column = slice * 16; column < columns; column += kSlices * 16) {
        float w[16];
        decode_at(weights, blockIdx.x * kTileRows + row, column, units, w);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float x = input != nullptr && column + i < columns ? w[i] * input[column + i] : w[i];
            sum = fmaf(x, x, sum);
            largest = max(largest, __float_as_uint(fabsf(w[i])));
        }
    }
    partial[slice][row] = sum;
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (threadIdx.x % 32 == 0) atomicMax(absmax, largest);
    __syncthreads();
    if (slice == 0 && blockIdx.x * kTileRows + row < rows) {
#pragma unroll
        for (int s = 1; s < kSlices; ++s) sum += partial[s][row];
        row_norm[blockIdx.x * kTileRows + row] = sqrtf(sum);
    }
}
