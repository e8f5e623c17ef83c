// out[m, n] = sum over k of x[m, k] * w[n, k]: halves into float32, with mma.sync and cp.async (sm_80 and later).
//
// A block makes output tiles of BLOCK_M x BLOCK_N, one after another, in steps of BLOCK_K columns that go through a
// ring of STAGES stages in shared memory. Its WARPS_M x WARPS_N warps hold their accumulators in registers, and load
// the fragments of the next 16 columns while the current ones are multiplied. Each output is one chain of sums over k
// in order, whatever the tile: a row's bits depend neither on the other rows nor on the configuration.
//
// Where GROUPED, x's rows come in groups, each multiplied by its own matrix of a stack of them (experts).
#include "include/epilogue.cuh"
#include "include/ptx.cuh"
#include "include/scheduler.cuh"
#include "include/types.cuh"

constexpr int kThreads = 32 * WARPS_M * WARPS_N;
constexpr int kWarpM = BLOCK_M / WARPS_M, kWarpN = BLOCK_N / WARPS_N;
constexpr int kFragsM = kWarpM / 16, kFragsN = kWarpN / 8;
constexpr int kChunks = BLOCK_K / 8;  // 16-byte chunks of a shared-memory row
constexpr int kStageX = BLOCK_M * BLOCK_K * 2, kStageW = BLOCK_N * BLOCK_K * 2, kStage = kStageX + kStageW;  // bytes
constexpr int kTogether = 16;  // token tiles that share a column tile of W while it is in the L2 cache
static_assert(BLOCK_K == 32 || BLOCK_K == 64, "the swizzle knows rows of 64 and 128 bytes");
static_assert(kFragsN % 2 == 0, "ldmatrix.x4 brings two column fragments, and gate and up come in pairs");
static_assert(kOperandGroup % BLOCK_K == 0, "operands are padded to whole steps");
static_assert(THREADS == kThreads, "what the host launches");
static_assert(STAGES * kStage <= SHARED_BYTES, "what the host launches with");

// Byte offset of a 16-byte chunk, swizzled so that the eight rows of an ldmatrix fall into different banks.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
    int swizzle = BLOCK_K == 64 ? row & 7 : row >> 1 & 3;
    return row * BLOCK_K * 2 + (chunk ^ swizzle) * 16;
}

using Tokens = TokenTiles<BLOCK_M, GROUPED>;
// The count is read again for each tile: a register that kept it would be one too many for the large tile.
using OutputTiles = Scheduler<Tokens, BLOCK_N, kTogether, false>;

// Where an output tile is: rows `row` .. row_end - 1 of the output (and of x), columns from `column` on (rows of w).
// expert: which matrix of w it is multiplied by.
struct OutputTile {
    int row, row_end, column, expert;
};

// w has the matrices of experts first .. last - 1 of a stack.
struct Experts {
    int first, last;
};

// A thread's share of the copies of one operand: of each stage, which has kRows rows of BLOCK_K halves.
template <int kRows>
struct Loader {
    static constexpr int kCopies = kRows * kChunks / kThreads, kRowStep = kThreads / kChunks;
    static_assert(kRows * kChunks % kThreads == 0 && kThreads % kChunks == 0, "whole copies for each thread");
    static_assert(kRowStep % 8 == 0, "the swizzle is the same for all of a thread's rows");
    const half_t* source;
    int row_step, rows_left, row;
    uint32_t destination;

    __device__ void begin(const half_t* base, int first_row, int rows, int k) {
        row = threadIdx.x / kChunks;
        int chunk = threadIdx.x % kChunks;
        source = base + static_cast<uint64_t>(first_row + row) * k + chunk * 8;
        row_step = kRowStep * k;
        rows_left = rows - first_row;
        destination = chunk_offset(row, chunk);
    }
    __device__ void load(uint32_t stage, int k_step) const {
#pragma unroll
        for (int i = 0; i < kCopies; ++i)
            cp_async16(stage + destination + i * kRowStep * BLOCK_K * 2, source + (i * row_step + k_step * BLOCK_K),
                       row + i * kRowStep < rows_left);
    }
};

// What a warp multiplies at a time: its rows of x and of w, of 16 columns.
struct Fragments {
    uint32_t x[kFragsM][4], w[kFragsN / 2][4];

    __device__ void load(uint32_t stage, int warp_m, int warp_n, int k16) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kFragsM; ++i)
            ldmatrix_x4(x[i], stage + chunk_offset(warp_m * kWarpM + i * 16 + lane % 16, 2 * k16 + lane / 16));
#pragma unroll
        for (int j = 0; j < kFragsN / 2; ++j)
            ldmatrix_x4(w[j],
                        stage + kStageX +
                            chunk_offset(warp_n * kWarpN + j * 16 + lane / 16 * 8 + lane % 8, 2 * k16 + lane / 8 % 2));
    }
};

using Accumulators = float[kFragsM][kFragsN][4];

// Multiplies this block's output tiles; calls write(output tile, accumulators) after each, while the first stages of
// the next are on their way.
template <class Write>
__device__ __forceinline__ void multiply_tiles(const half_t* x, const half_t* w, const Tokens& rows, Experts experts,
                                               int n, int k, Write write) {
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t ring = shared_address(shared);
    int warp = threadIdx.x / 32, warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
    int k_steps = k / BLOCK_K;
    OutputTiles tiles(rows, n);
    Loader<BLOCK_M> load_x;
    Loader<BLOCK_N> load_w;
    auto load_stage = [&](int step) {
        if (step < k_steps) {
            uint32_t stage = ring + step % STAGES * kStage;
            load_x.load(stage, step);
            load_w.load(stage + kStageX, step);
        }
        cp_async_commit();
    };
    auto begin = [&](OutputTile tile) {
        load_x.begin(x, tile.row, tile.row_end, k);
        load_w.begin(GROUPED ? w + static_cast<uint64_t>(tile.expert) * n * k : w, tile.column, n, k);
#pragma unroll
        for (int step = 0; step < STAGES - 1; ++step) load_stage(step);
    };
    auto current = [&]() -> OutputTile {
        int token_tile = tiles.token_tile();
        return {rows.first(token_tile), rows.end(token_tile), tiles.column_tile() * BLOCK_N,
                GROUPED ? rows.expert(token_tile) - experts.first : 0};
    };
    if (GROUPED) tiles.skip_absent(experts.first, experts.last);
    if (GROUPED && !tiles.more()) return;
    begin(current());
    while (true) {
        Accumulators acc;
#pragma unroll
        for (int i = 0; i < kFragsM; ++i)
#pragma unroll
            for (int j = 0; j < kFragsN; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) acc[i][j][c] = 0.0f;

        Fragments fragments[2];
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fragments[0].load(ring, warp_m, warp_n, 0);
        for (int step = 0; step < k_steps; ++step) {
            constexpr int kSubs = BLOCK_K / 16;
            uint32_t stage = ring + step % STAGES * kStage;
#pragma unroll
            for (int sub = 0; sub < kSubs; ++sub) {
                if (sub == kSubs - 1) {  // the next stage must have come, and everyone be done with the one before this
                    cp_async_wait<STAGES - 2>();
                    __syncthreads();
                    stage = ring + (step + 1) % STAGES * kStage;
                }
                fragments[(sub + 1) % 2].load(stage, warp_m, warp_n, (sub + 1) % kSubs);
                if (sub == 0) load_stage(step + STAGES - 1);
                const Fragments& now = fragments[sub % 2];
#pragma unroll
                for (int i = 0; i < kFragsM; ++i)
#pragma unroll
                    for (int j = 0; j < kFragsN; ++j)
                        mma_m16n8k16(acc[i][j], now.x[i], now.w[j / 2][j % 2 * 2], now.w[j / 2][j % 2 * 2 + 1]);
            }
        }
        cp_async_wait<0>();
        __syncthreads();  // everyone is done with the ring
        OutputTile tile = current();
        tiles.next();
        if (GROUPED) tiles.skip_absent(experts.first, experts.last);
        if (tiles.more()) begin(current());
        write(tile, acc);
        if (!tiles.more()) return;
    }
}

// Calls write(row, column, i, j, half) for each pair of neighbouring outputs that this thread holds of the tile's own
// rows: they are acc[i][j][2 * half] and the next, at `row` and `column` of the output. Of the fragments j it takes
// those from first_frag on, frag_step apart.
template <class Write>
__device__ __forceinline__ void for_each_pair(OutputTile tile, int first_frag, int frag_step, Write write) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row0 = tile.row + warp / WARPS_N * kWarpM + lane / 4,
        column0 = tile.column + warp % WARPS_N * kWarpN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kFragsM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = row0 + i * 16 + half * 8;
            if (row >= tile.row_end) continue;
#pragma unroll
            for (int j = first_frag; j < kFragsN; j += frag_step) write(row, column0 + j * 8, i, j, half);
        }
}

#if ACTIVATED

// out[m, f] = *out_scale * act(sums / (*x_scale * *w_scale) + bias) as an operand, rows `ldo` apart. w has room for
// `width` rows, of which `features` are there. bias, [features], may be null. Columns from `features` to `width` become
// zero.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_activated(const half_t* x, const half_t* w, int m, int features, int width, int k, half_t* out, int ldo,
                   const float* x_scale, const float* w_scale, const float* bias, const float* out_scale,
                   int activation) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators& acc) {
        float alpha = unscale(x_scale, w_scale), scale = *out_scale;
        for_each_pair(tile, 0, 1, [&](int row, int column, int i, int j, int half) {
            if (column >= width) return;
            float y[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                bool inside = column + c < features;
                float own_bias = bias != nullptr && inside ? bias[column + c] : 0.0f;
                float sum = fmaf(acc[i][j][2 * half + c], alpha, own_bias);
                y[c] = inside ? activated(sum, activation) * scale : 0.0f;
            }
            store_operand(out + static_cast<uint64_t>(row) * ldo, column, operand_pair(y[0], y[1]));
        });
    };
    multiply_tiles(x, w, {m, nullptr, nullptr}, {0, 0}, width, k, write);
}

#else

// out = sums / (*x_scale * *w_scale) + bias + residual, float32, rows `ldo` apart. bias (a row for each expert) and
// residual may be null, and residual may be out itself. Grouped: halves, times *out_scale; n is even, and no residual.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_linear(const half_t* x, const half_t* w, int m, int n, int k, void* out, int ldo, const float* x_scale,
                const float* w_scale, const float* out_scale, const float* bias, const float* residual,
                const Group* groups, const int* group_count, int first_expert, int last_expert) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators& acc) {
        float alpha = unscale(x_scale, w_scale);
        bool paired = ldo % 2 == 0;  // both of a pair's addresses are then 8-byte aligned
        for_each_pair(tile, 0, 1, [&](int row, int column, int i, int j, int half) {
            if (column >= n) return;
            bool both = column + 1 < n;
            uint64_t at = static_cast<uint64_t>(row) * ldo + column;
            auto bias_of = [&](int c) {
                return bias != nullptr && column + c < n ? bias[tile.expert * n + column + c] : 0.0f;
            };
            float a = fmaf(acc[i][j][2 * half], alpha, bias_of(0)),
                  b = fmaf(acc[i][j][2 * half + 1], alpha, bias_of(1));
            float* to = static_cast<float*>(out) + at;
            if (GROUPED) {
                float scale = *out_scale;
                *reinterpret_cast<uint32_t*>(static_cast<half_t*>(out) + at) = pack_half2(a * scale, b * scale);
            } else if (both && paired) {
                float2 r =
                    residual != nullptr ? *reinterpret_cast<const float2*>(residual + at) : make_float2(0.0f, 0.0f);
                *reinterpret_cast<float2*>(to) = make_float2(a + r.x, b + r.y);
            } else {
                to[0] = residual != nullptr ? a + residual[at] : a;
                if (both) to[1] = residual != nullptr ? b + residual[at + 1] : b;
            }
        });
    };
    multiply_tiles(x, w, {m, groups, group_count}, {first_expert, last_expert}, n, k, write);
}

// out[m, f] = *out_scale * act(gate) * up as an operand, rows `ldo` apart. w's rows are gate and up, 8 and 8 in turn
// (dequantize's `gated`), with room for `width` of each. gate_bias and up_bias, [features] for each expert, may be
// null. Columns from `features` to `width` become zero.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_gated(const half_t* x, const half_t* w, int m, int features, int width, int k, half_t* out, int ldo,
               const float* x_scale, const float* w_scale, const float* gate_bias, const float* up_bias,
               const float* out_scale, int activation, const Group* groups, const int* group_count, int first_expert,
               int last_expert) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators& acc) {
        float alpha = unscale(x_scale, w_scale), scale = *out_scale;
        for_each_pair(tile, 0, 2, [&](int row, int column, int i, int j, int half) {
            int f = column / 16 * 8 + column % 8;
            if (f >= width) return;
            float y[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                bool inside = f + c < features;
                auto bias_of = [&](const float* bias) {
                    return bias != nullptr && inside ? bias[tile.expert * features + f + c] : 0.0f;
                };
                float gate = fmaf(acc[i][j][2 * half + c], alpha, bias_of(gate_bias)),
                      up = fmaf(acc[i][j + 1][2 * half + c], alpha, bias_of(up_bias));
                y[c] = inside ? gated(gate, up, activation) * scale : 0.0f;
            }
            OperandPair pair = operand_pair(y[0], y[1]);
            store_operand(out + static_cast<uint64_t>(row) * ldo, f, pair);
        });
    };
    multiply_tiles(x, w, {m, groups, group_count}, {first_expert, last_expert}, 2 * width, k, write);
}

#endif
