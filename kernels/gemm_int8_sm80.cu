// out[m, n] = sum over k of x[m, k] * w[n, k], both in int8 (int8.cuh), summed exactly; then times the scales of x's
// row and of w's: with mma.sync and cp.async (tiles_sm80.cuh).
#include "include/epilogue.cuh"
#include "include/int8.cuh"
#include "include/output_blocks.cuh"
#include "include/tiles_sm80.cuh"

constexpr int kBlocks = kThreads <= 128 ? 3 : 1;                         // that a multiprocessor has registers for
constexpr int kStepBytes = 2 * BLOCK_K, kSteps = kRotated / kStepBytes;  // kSteps: of a group of columns
static_assert(kRotated % kStepBytes == 0, "operands are padded to whole steps");

// A thread's share of the copies of a matrix in int8 tiles, or (GATED) of two whose atoms take turns: gate's first.
struct Int8Weights {
    static constexpr int kTurns = GATED ? 2 : 1;  // matrices that take turns
    static constexpr int kCopies = BLOCK_N * kChunks / kThreads, kRowStep = kThreads / kChunks / kTurns;
    static_assert(kThreads / kChunks % (kAtomRows * kTurns) == 0, "a thread's rows are of one matrix, at like places");
    static_assert(kRowStep % kInt8TileRows == 0 || kInt8TileRows % kRowStep == 0,
                  "and in whole tiles, or parts of one");
    const int8_t* matrices[2];
    int rows, groups;  // of each expert's matrix: rows in whole tiles, groups of columns
    const int8_t* source;
    int rows_left, chunk, place;
    uint32_t destination;

    __device__ void begin(int expert, int first) {
        int row = threadIdx.x / kChunks;
        chunk = threadIdx.x % kChunks;
        destination = chunk_offset(row, chunk);
        bool second = GATED && row / kAtomRows % 2;
        if (GATED) row = row / (2 * kAtomRows) * kAtomRows + row % kAtomRows, first /= 2;
        place = row % kInt8TileRows;
        rows_left = rows - first - row;
        uint64_t tile = (static_cast<uint64_t>(GROUPED ? expert : 0) * rows + first + row) / kInt8TileRows;
        source = (second ? matrices[1] : matrices[0]) + tile * groups * kInt8TileBytes;
    }
    __device__ void load(uint32_t stage, int step) const {
        int piece = step % kSteps * kChunks + chunk;
        const int8_t* from = source + step / kSteps * kInt8TileBytes + int8_offset(place, piece * 16);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            constexpr int kTile = kInt8TileRows;
            int tiles = i * kRowStep / kTile, places = i * kRowStep % kTile;
            cp_async16(stage + destination + i * (kThreads / kChunks) * kStepBytes,
                       from + (static_cast<int64_t>(tiles) * groups * kInt8TileBytes + places * kRotated),
                       i * kRowStep < rows_left);
        }
    }
};

// The row of its matrix that stands at a place of all its tiles.
__device__ __forceinline__ int row_at(int place) {
    return (place & ~(kInt8TileRows - 1)) + int8_row(place % kInt8TileRows);
}

#if ACTIVATED

// out[m, f] = *out_scale * act(sums * scales + bias) as an operand, rows `ldo` apart; columns from `features` to there
// become zero. bias, [features], may be null. The others as below.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    gemm_activated(const int8_t* x, const float* x_scale, const int8_t* w, const float* w_scale, int m, int features,
                   int k, half_t* out, int ldo, const float* bias, const float* out_scale, int activation) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators<int>& acc) {
        for_each_pair(tile, 0, 1, [&](int row, int place, int i, int j, int half) {
            int f = row_at(place);
            if (f >= ldo) return;
            float y[2], scale = x_scale[row];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                int at = min(f + c, features - 1);
                float own = int8_output(acc[i][j][2 * half + c], w_scale[at], scale, bias != nullptr ? bias[at] : 0.0f);
                y[c] = f + c < features ? activated(own, activation) * *out_scale : 0.0f;
            }
            store_operand(out + static_cast<uint64_t>(row) * ldo, f, operand_pair(y[0], y[1]));
        });
    };
    Int8Weights weights = {{w, nullptr}, ceil_div(features, kInt8TileRows) * kInt8TileRows, k / kRotated};
    multiply_tiles<int>(x, weights, {m, nullptr, nullptr}, {0, MOST_EXPERTS}, ldo, k / 2, write);
}

#elif !GATED

// Writes the pairs of halves pair(row, place, i, j, half), each of two neighbouring places' outputs, of all fragments
// i, j of this thread, in blocks (output_blocks.cuh): rows `ldo` bytes apart, of `columns` columns. Four neighbouring
// lanes have a block of a row.
template <class Pair>
__device__ __forceinline__ void store_blocks(OutputTile tile, uint8_t* out, int ldo, int columns, Pair pair) {
    constexpr int kAtoms = kOutputBlock / kAtomRows;
    static_assert(kFragsN % kAtoms == 0, "a warp has whole blocks");
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first = tile.column + warp % WARPS_N * kWarpN, row0 = tile.row + warp / WARPS_N * kWarpM + lane / 4;
#pragma unroll
    for (int i = 0; i < 2 * kFragsM; ++i)
#pragma unroll
        for (int j = 0; j < kFragsN; j += kAtoms) {
            int row = row0 + i * 8, block = first + j * 8;
            uint32_t pairs[kAtoms], most = 0;
#pragma unroll
            for (int atom = 0; atom < kAtoms; ++atom) {
                pairs[atom] = pair(min(row, tile.row_end - 1), block + atom * 8 + lane % 4 * 2, i / 2, j + atom, i % 2);
                most = larger_halves(most, pairs[atom]);
            }
            most = half2_max(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = half2_max(most, __shfl_xor_sync(0xffffffffu, most, 2));
            half_t largest = larger_half(most);
            if (row >= tile.row_end || block >= output_integers(columns)) continue;
            BlockRounding rounding(largest);
            uint8_t* to = out + static_cast<uint64_t>(row) * ldo;
#pragma unroll
            for (int atom = 0; atom < kAtoms; ++atom)
                *reinterpret_cast<uint16_t*>(to + output_place(row_at(block + atom * 8 + lane % 4 * 2))) =
                    static_cast<uint16_t>(rounding.four(pairs[atom], pairs[atom]));
            if (lane % 4 == 0) *reinterpret_cast<half_t*>(to + output_largest(columns, block)) = largest;
        }
}

// out = sums * scales + bias (+ out, if `add`), float32, rows `ldo` apart. Grouped: halves, or IN_BLOCKS, times
// *out_scale, and no `add`. w: n rows, or so many for each expert. bias, as many, may be null. k: columns, whole
// groups.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    gemm_linear(const int8_t* x, const float* x_scale, const int8_t* w, const float* w_scale, int m, int n, int k,
                void* out, int ldo, const float* out_scale, const float* bias, int add, const Group* groups,
                const int* group_count) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators<int>& acc) {
        auto compute = [&](float (&own)[2], int row, int column, int i, int j, int half) {
            float scale = x_scale[row];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                int at = tile.expert * n + min(column + c, n - 1);
                own[c] = int8_output(acc[i][j][2 * half + c], GROUPED ? w_scale[at] * *out_scale : w_scale[at], scale,
                                     bias == nullptr ? 0.0f
                                     : GROUPED       ? bias[at] * *out_scale
                                                     : bias[at]);
            }
        };
#if IN_BLOCKS
        store_blocks(tile, static_cast<uint8_t*>(out), ldo, n, [&](int row, int place, int i, int j, int half) {
            int column = row_at(place);
            float own[2];
            compute(own, row, column, i, j, half);
            return pack_half2(column < n ? own[0] : 0.0f, column + 1 < n ? own[1] : 0.0f);
        });
#else
        // Both of a pair's addresses are then 8-byte aligned.
        bool paired = ldo % 2 == 0 && reinterpret_cast<uint64_t>(out) % sizeof(float2) == 0;
        for_each_pair(tile, 0, 1, [&](int row, int place, int i, int j, int half) {
            int column = row_at(place);
            if (column >= n) return;
            float own[2];
            compute(own, row, column, i, j, half);
            uint64_t at = static_cast<uint64_t>(row) * ldo + column;
            float* to = static_cast<float*>(out) + at;
            if (GROUPED) *reinterpret_cast<uint32_t*>(static_cast<half_t*>(out) + at) = pack_half2(own[0], own[1]);
            else if (paired && column + 1 < n) {
                float2 before = add ? *reinterpret_cast<const float2*>(to) : make_float2(0.0f, 0.0f);
                *reinterpret_cast<float2*>(to) =
                    add ? make_float2(own[0] + before.x, own[1] + before.y) : make_float2(own[0], own[1]);
            } else
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    if (column + c < n) to[c] = add ? own[c] + to[c] : own[c];
        });
#endif
    };
    Int8Weights weights = {{w, nullptr}, ceil_div(n, kInt8TileRows) * kInt8TileRows, k / kRotated};
    multiply_tiles<int>(x, weights, {m, groups, group_count}, {0, MOST_EXPERTS}, n, k / 2, write);
}

#else

// out[m, f] = *out_scale * act(gate) * up as an operand, rows `ldo` apart; columns from `features` to there become
// zero. gate_bias and up_bias, [features] for each expert, may be null. The others as above.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    gemm_gated(const int8_t* x, const float* x_scale, const int8_t* gate, const float* gate_scale, const int8_t* up,
               const float* up_scale, int m, int features, int k, half_t* out, int ldo, const float* gate_bias,
               const float* up_bias, const float* out_scale, int activation, const Group* groups,
               const int* group_count) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators<int>& acc) {
        for_each_pair(tile, 0, 2, [&](int row, int place, int i, int j, int half) {
            int f = row_at(place / 16 * 8 + place % 8);
            if (f >= ldo) return;
            float y[2], scale = x_scale[row];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                int at = tile.expert * features + min(f + c, features - 1);
                float g = int8_output(acc[i][j][2 * half + c], gate_scale[at], scale,
                                      gate_bias != nullptr ? gate_bias[at] : 0.0f),
                      u = int8_output(acc[i][j + 1][2 * half + c], up_scale[at], scale,
                                      up_bias != nullptr ? up_bias[at] : 0.0f);
                y[c] = f + c < features ? gated(g, u, activation) * *out_scale : 0.0f;
            }
            store_operand(out + static_cast<uint64_t>(row) * ldo, f, operand_pair(y[0], y[1]));
        });
    };
    Int8Weights weights = {{gate, up}, ceil_div(features, kInt8TileRows) * kInt8TileRows, k / kRotated};
    multiply_tiles<int>(x, weights, {m, groups, group_count}, {0, MOST_EXPERTS}, 2 * ldo, k / 2, write);
}

#endif
