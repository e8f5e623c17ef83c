// out[m, n] = sum over k of x[m, k] * w[n, k] on Hopper, w quantised: dequantised once for each tile, on its way to wgmma.
//
// wgmma computes Yᵀ = W · Xᵀ: a block's tile is WARPGROUPS x 64 rows of W by TOKENS tokens, in stages of SUBSTEPS x 64 columns.
// Its warpgroups are specialised:
//   decoders    DECODERS warpgroups turn raw units into halves in the stage ring, a stage each in turn; their first thread
//               has the copy engine bring x (swizzled) into the stage ring, and quantised tiles into the raw ring
//   consumers   one for each 64 rows of W: wgmma from the stage ring, accumulators in registers, then the epilogue
// For long batches it is cheaper to dequantise once, ahead (weights.cu): compiled for the format Halves, whose tiles are laid
// out as a stage wants them, the first warpgroup has no more to do than to have the copy engine bring both operands.
// The grid is persistent: while a tile is in its epilogue, the rings fill for the next. Each output is one chain of sums
// over k in order, whatever the tile: a token's bits depend neither on the other tokens nor on the configuration.
//
// Compiled for FORMATS, the block formats that its launch may mix (all with the same kElements): a launch multiplies by up
// to three matrices side by side (q, k, v), or by gate and up with their rows interleaved.
#include "include/activation.cuh"
#include "include/sm90.cuh"
#include "quants/all.cuh"

// Weights that weights.cu has dequantised: units of 64, a row tile's in wgmma's swizzle.
struct Halves : Unquantised {
    static constexpr int kBytes = 2 * 64;
    template <class U>
    __device__ static void floats(const U&, int, float (&)[16]) {}
};

// A list of formats as a type -------------------------------------------------------------------------------------------

__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
template <class First, class... Rest>
struct FormatList {
    static constexpr int kElements = First::kElements;
    static constexpr int kTileBytes = larger(kTileRows * First::kBytes, FormatList<Rest...>::kTileBytes);
    static_assert(sizeof...(Rest) == 0 || First::kElements == FormatList<Rest...>::kElements || FormatList<Rest...>::kElements == 0,
                  "formats of one launch have units of one length");
    __device__ static int tile_bytes(int format) {
        return format == 0 ? kTileRows * First::kBytes : FormatList<Rest...>::tile_bytes(format - 1);
    }
    // Weights at .. at+16*kPieces-1 of a row, as pairs of halves.
    template <int kPieces>
    __device__ static void decode(int format, const uint8_t* tile, int row, int at, float scale, uint32_t (&out)[8 * kPieces]) {
        if (format != 0) return FormatList<Rest...>::template decode<kPieces>(format - 1, tile, row, at, scale, out);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece)
            decode_halves<First>(tile, row, at + 16 * piece, scale, reinterpret_cast<uint32_t(&)[8]>(out[8 * piece]));
    }
};
struct NoFormat {
    static constexpr int kBytes = 0;
};
template <>
struct FormatList<NoFormat> {
    static constexpr int kElements = 0, kTileBytes = 0;
    __device__ static int tile_bytes(int) { return 0; }
    template <int kPieces>
    __device__ static void decode(int, const uint8_t*, int, int, float, uint32_t (&)[8 * kPieces]) {}
};
using Formats = FormatList<FORMATS, NoFormat>;
template <class First, class... Rest>
constexpr bool is_halves = false;
template <>
constexpr bool is_halves<Halves> = true;

// Sizes -------------------------------------------------------------------------------------------------------------------

constexpr bool kReady = is_halves<FORMATS>;
constexpr int kStep = 64;                               // columns of a sub-step: what 128 bytes of halves hold
constexpr int kUnitSteps = Formats::kElements / kStep;  // sub-steps that one raw unit gives
constexpr int kSub = SUBSTEPS < kUnitSteps ? SUBSTEPS : kUnitSteps;
constexpr int kXStep = TOKENS * kStep * 2, kWTileBytes = kTileRows * kStep * 2, kWStep = WARPGROUPS * kWTileBytes;
constexpr int kXBytes = kSub * kXStep, kWBytes = kSub * kWStep;
constexpr int kRawBytes = kReady ? 0 : WARPGROUPS * Formats::kTileBytes;
constexpr int kWOffset = STAGES * kXBytes, kRawOffset = kWOffset + STAGES * kWBytes;
constexpr int kBarrierOffset = kRawOffset + RAW_STAGES * kRawBytes;
constexpr int kThreads = 128 * (DECODERS + WARPGROUPS);
constexpr int kTokenGroup = 8;  // token tiles that share W's tiles while these are in the L2 cache
constexpr int kDecodeColumns = kStep * WARPGROUPS / 2;  // of a row, that one decoding thread makes of a sub-step
static_assert(WARPGROUPS == 1 || WARPGROUPS == 2, "a decoding warpgroup has a thread or two for each row");
static_assert(kUnitSteps % kSub == 0, "whole stages in a unit");
static_assert(STAGES >= 2, "a stage is given back when the next has begun");

struct Matrices {  // up to three, one under another; only the first two, interleaved, for the gated kernel
    const uint8_t* weights[3];
    int rows[3], format[3];
};

// 64 rows of W: where their raw tiles begin, and where their outputs go.
struct RowTile {
    const uint8_t* raw;
    int format, rows, column;  // rows: valid ones, 0 where there is no such tile; column: of the output
};

__device__ __forceinline__ RowTile row_tile(const Matrices& matrices, int index, int units, bool gated) {
    if (gated) {
        bool up = index & 1;
        int tile = index >> 1, format = up ? matrices.format[1] : matrices.format[0];
        const uint8_t* weights = up ? matrices.weights[1] : matrices.weights[0];
        return {weights + static_cast<uint64_t>(tile) * units * Formats::tile_bytes(format), format,
                max(0, min(kTileRows, matrices.rows[0] - tile * kTileRows)), tile * kTileRows};
    }
    int column = 0;
#pragma unroll
    for (int which = 0; which < 3; ++which) {
        int tiles = ceil_div(matrices.rows[which], kTileRows);
        if (index < tiles) {
            int format = matrices.format[which];
            return {matrices.weights[which] + static_cast<uint64_t>(index) * units * Formats::tile_bytes(format), format,
                    min(kTileRows, matrices.rows[which] - index * kTileRows), column + index * kTileRows};
        }
        index -= tiles;
        column += matrices.rows[which];
    }
    return {nullptr, 0, 0, 0};
}

struct Rings {
    uint32_t base, full, empty, raw_full, raw_empty;  // shared addresses; the latter of arrays of barriers
    const uint8_t* generic;
};

// The tiles of this block, one after another.
struct Walk {
    int tile, tiles_n, tiles_m;

    __device__ Walk(int row_tiles, int m)
        : tile(blockIdx.x), tiles_n(ceil_div(row_tiles, WARPGROUPS)), tiles_m(ceil_div(m, TOKENS)) {}
    __device__ bool more() const { return tile < tiles_n * tiles_m; }
    __device__ void next() { tile += gridDim.x; }
    __device__ int group() const { return tile / (kTokenGroup * tiles_n); }
    __device__ int width() const { return min(kTokenGroup, tiles_m - group() * kTokenGroup); }
    __device__ int first_row_tile() const { return tile % (kTokenGroup * tiles_n) / width() * WARPGROUPS; }
    __device__ int first_token() const { return (group() * kTokenGroup + tile % (kTokenGroup * tiles_n) % width()) * TOKENS; }
};

// Has the copy engine bring raw units, in the order in which they are decoded, ahead of the decoders. One thread does this
// beside its decoding, so what a tile needs is worked out once, not for each unit.
struct RawCopies {
    const Rings& rings;
    const Matrices& matrices;
    Walk walk;
    int units, unit = 0, bytes = 0;
    bool gated;
    RingPosition<RAW_STAGES> raw;
    const uint8_t* source[WARPGROUPS];
    int size[WARPGROUPS];  // 0 where there is no such tile

    __device__ RawCopies(const Rings& rings, const Matrices& matrices, Walk walk, int units, bool gated)
        : rings(rings), matrices(matrices), walk(walk), units(units), gated(gated) {}

    __device__ void issue() {  // the next unit, if there is one; waits until its slot is free
        if (!walk.more()) return;
        if (unit == 0) {
            bytes = 0;
#pragma unroll
            for (int t = 0; t < WARPGROUPS; ++t) {
                RowTile tile = row_tile(matrices, walk.first_row_tile() + t, units, gated);
                source[t] = tile.raw;
                size[t] = tile.rows ? Formats::tile_bytes(tile.format) : 0;
                bytes += size[t];
            }
        }
        uint32_t full = rings.raw_full + 8 * raw.stage;
        barrier_wait(rings.raw_empty + 8 * raw.stage, raw.phase ^ 1);
        barrier_arrive_expect(full, bytes);
#pragma unroll
        for (int t = 0; t < WARPGROUPS; ++t) {
            if (size[t]) bulk_copy(rings.base + kRawOffset + raw.stage * kRawBytes + t * Formats::kTileBytes, source[t], size[t], full);
            source[t] += size[t];
        }
        raw.advance();
        if (++unit == units) {
            unit = 0;
            walk.next();
        }
    }
};

// One stage of x, sub-step by sub-step.
__device__ __forceinline__ void copy_x(const Rings& rings, const void* x_map, int stage, int column, int token) {
#pragma unroll
    for (int sub = 0; sub < kSub; ++sub)
        tensor_copy(rings.base + stage * kXBytes + sub * kXStep, x_map, column + sub * kStep, token, rings.full + 8 * stage);
}

// The first warpgroup's work where w needs no decoding: one thread has both operands brought.
__device__ __forceinline__ void produce(const Rings& rings, const Matrices& matrices, const void* x_map, int m, int units, int row_tiles) {
    if (threadIdx.x != 0) return;
    RingPosition<STAGES> stage;
    for (Walk walk(row_tiles, m); walk.more(); walk.next()) {
        int first = walk.first_row_tile(), token = walk.first_token(), bytes = kXBytes;
        const uint8_t* source[WARPGROUPS];
#pragma unroll
        for (int t = 0; t < WARPGROUPS; ++t) {
            source[t] = row_tile(matrices, first + t, units, false).raw;
            if (source[t]) bytes += kWTileBytes;
        }
        for (int unit = 0; unit < units; ++unit, stage.advance()) {
            uint32_t full = rings.full + 8 * stage.stage;
            barrier_wait(rings.empty + 8 * stage.stage, stage.phase ^ 1);
            barrier_arrive_expect(full, bytes);
            copy_x(rings, x_map, stage.stage, unit * kStep, token);
#pragma unroll
            for (int t = 0; t < WARPGROUPS; ++t)
                if (source[t])
                    bulk_copy(rings.base + kWOffset + stage.stage * kWBytes + t * kWTileBytes,
                              source[t] + static_cast<uint64_t>(unit) * kWTileBytes, kWTileBytes, full);
        }
    }
}

__device__ __forceinline__ void decode(const Rings& rings, const Matrices& matrices, const void* x_map, int m, int units,
                                       int row_tiles, bool gated, float scale) {
    int group = threadIdx.x / 128, row = threadIdx.x % kTileRows, half = threadIdx.x % 128 / kTileRows;
    int tile = WARPGROUPS == 2 ? half : 0, column = WARPGROUPS == 2 ? 0 : half * kDecodeColumns;
    int to_row = gated ? row / 8 * 16 + tile * 8 + row % 8 : tile * kTileRows + row;
    RingPosition<STAGES> stage;
    RingPosition<RAW_STAGES> raw;
    RawCopies copies(rings, matrices, Walk(row_tiles, m), units, gated);
    bool producer = threadIdx.x == 0;
    int turn = 0;
    if (producer)
        for (int i = 0; i < RAW_STAGES - 1; ++i) copies.issue();
    for (Walk walk(row_tiles, m); walk.more(); walk.next()) {
        RowTile source = row_tile(matrices, walk.first_row_tile() + tile, units, gated);
        int token = walk.first_token();
        for (int unit = 0; unit < units; ++unit, raw.advance()) {
            if (producer) copies.issue();
            __syncwarp();  // without it, the producer's warp may decode in two parts, its first lane alone: 45% slower
            barrier_wait(rings.raw_full + 8 * raw.stage, raw.phase);
            const uint8_t* raw_tile = rings.generic + kRawOffset + raw.stage * kRawBytes + tile * Formats::kTileBytes;
#pragma unroll
            for (int part = 0; part < kUnitSteps / kSub; ++part, stage.advance()) {
                uint32_t full = rings.full + 8 * stage.stage, empty = rings.empty + 8 * stage.stage;
                if (producer) {
                    barrier_wait(empty, stage.phase ^ 1);
                    barrier_arrive_expect(full, kXBytes);
                    copy_x(rings, x_map, stage.stage, (unit * kUnitSteps + part * kSub) * kStep, token);
                }
                __syncwarp();
                bool ours = turn == group;
                turn = turn + 1 == DECODERS ? 0 : turn + 1;
                if (!ours) continue;
#pragma unroll
                for (int sub = 0; sub < kSub; ++sub) {
                    uint32_t w[kDecodeColumns / 2];
                    if (source.rows)
                        Formats::decode<kDecodeColumns / 16>(source.format, raw_tile, row, (part * kSub + sub) * kStep + column, scale, w);
                    if (sub == 0) barrier_wait(empty, stage.phase ^ 1);
                    if (source.rows) {
                        uint32_t to = rings.base + kWOffset + stage.stage * kWBytes + sub * kWStep;
#pragma unroll
                        for (int chunk = 0; chunk < kDecodeColumns / 8; ++chunk)
                            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + swizzled128(to_row, column / 8 + chunk)),
                                         "r"(w[4 * chunk]), "r"(w[4 * chunk + 1]), "r"(w[4 * chunk + 2]), "r"(w[4 * chunk + 3])
                                         : "memory");
                    }
                }
                fence_async_shared();
                __syncwarp();
                if (threadIdx.x % 32 == 0) barrier_arrive(full);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(rings.raw_empty + 8 * raw.stage);
        }
    }
}

using Accumulators = float[TOKENS / 2];

// Multiplies this block's tiles; calls write(accumulators, warpgroup, first row tile, first token) after each.
template <class Write>
__device__ __forceinline__ void consume(const Rings& rings, int m, int stages, int row_tiles, Write write) {
    int warpgroup = threadIdx.x / 128 - DECODERS;
    RingPosition<STAGES> stage;
    for (Walk walk(row_tiles, m); walk.more(); walk.next()) {
        Accumulators acc;
        int previous = 0;
        for (int i = 0; i < stages; ++i, stage.advance()) {
            barrier_wait(rings.full + 8 * stage.stage, stage.phase);
            uint64_t w = wgmma_operand(rings.base + kWOffset + stage.stage * kWBytes + warpgroup * kWTileBytes);
            uint64_t x = wgmma_operand(rings.base + stage.stage * kXBytes);
            wgmma_begin();
#pragma unroll
            for (int sub = 0; sub < kSub; ++sub)
#pragma unroll
                for (int k16 = 0; k16 < kStep / 16; ++k16)
                    wgmma_f16(acc, w + sub * (kWStep / 16) + 2 * k16, x + sub * (kXStep / 16) + 2 * k16, i > 0 || sub > 0 || k16 > 0);
            wgmma_commit();
            if (i > 0) {  // the stage before this is done with: it may be filled again
                wgmma_wait<1>();
                if (threadIdx.x % 32 == 0) barrier_arrive(rings.empty + 8 * previous);
            }
            previous = stage.stage;
        }
        wgmma_wait<0>();
        if (threadIdx.x % 32 == 0) barrier_arrive(rings.empty + 8 * previous);
        write(acc, warpgroup, walk.first_row_tile(), walk.first_token());
    }
}

template <class Write>
__device__ __forceinline__ void run(const Matrices& matrices, const void* x_map, int m, int k, const float* w_scale,
                                    int row_tiles, bool gated, Write write) {
    extern __shared__ __align__(1024) uint8_t shared[];
    uint32_t base = shared_address(shared), barriers = base + kBarrierOffset;
    Rings rings = {base, barriers, barriers + 8 * STAGES, barriers + 16 * STAGES, barriers + 16 * STAGES + 8 * RAW_STAGES, shared};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(rings.full + 8 * i, kReady ? 1 : 1 + 4);  // the producer, and each warp of the decoder whose turn it is
            barrier_init(rings.empty + 8 * i, 4 * WARPGROUPS);
        }
        for (int i = 0; i < RAW_STAGES; ++i) {
            barrier_init(rings.raw_full + 8 * i, 1);
            barrier_init(rings.raw_empty + 8 * i, 4 * DECODERS);
        }
        fence_barrier_init();
    }
    __syncthreads();
    int units = ceil_div(k, Formats::kElements);
    if (threadIdx.x / 128 < DECODERS) {
        give_up_registers<DECODER_REGISTERS>();
        if constexpr (kReady) produce(rings, matrices, x_map, m, units, row_tiles);
        else decode(rings, matrices, x_map, m, units, row_tiles, gated, *w_scale);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume(rings, m, units * (kUnitSteps / kSub), row_tiles, write);
    }
}

#if !GATED

// out = acc / (*x_scale * *w_scale) + bias + residual, float32, rows `ldo` apart: the matrices' outputs side by side. bias
// and residual may be null, and residual may be out itself. x_map: x's tensor map, boxes of 64 halves by TOKENS.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    gemm_linear(const uint8_t* w0, int rows0, int format0, const uint8_t* w1, int rows1, int format1, const uint8_t* w2,
                int rows2, int format2, const void* x_map, int m, int k, float* out, int ldo, const float* x_scale,
                const float* w_scale, const float* bias, const float* residual) {
    Matrices matrices = {{w0, w1, w2}, {rows0, rows1, rows2}, {format0, format1, format2}};
    int row_tiles = ceil_div(rows0, kTileRows) + ceil_div(rows1, kTileRows) + ceil_div(rows2, kTileRows);
    run(matrices, x_map, m, k, w_scale, row_tiles, false, [&](Accumulators& acc, int warpgroup, int first_tile, int token0) {
        int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4, token = token0 + lane % 4 * 2;
        RowTile tile = row_tile(matrices, first_tile + warpgroup, 0, false);
        float alpha = 1.0f / *x_scale / *w_scale;
#pragma unroll
        for (int h = 0; h < 2; ++h, row += 8) {
            if (row >= tile.rows) continue;
            int column = tile.column + row;
            float b = bias != nullptr ? bias[column] : 0.0f;
            uint64_t at = static_cast<uint64_t>(token) * ldo + column;
            // Tokens in batches: their residuals are all on the way before the first is waited for.
            constexpr int kBatch = TOKENS / 8 < 4 ? TOKENS / 8 : 4;
#pragma unroll
            for (int j0 = 0; j0 < TOKENS / 8; j0 += kBatch) {
                float r[kBatch][2] = {};
                if (residual != nullptr) {
#pragma unroll
                    for (int j = 0; j < kBatch; ++j)
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (token + 8 * (j0 + j) + c < m) r[j][c] = residual[at + (8 * (j0 + j) + c) * static_cast<uint64_t>(ldo)];
                }
#pragma unroll
                for (int j = 0; j < kBatch; ++j)
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        if (token + 8 * (j0 + j) + c < m)
                            out[at + (8 * (j0 + j) + c) * static_cast<uint64_t>(ldo)] = fmaf(acc[4 * (j0 + j) + 2 * h + c], alpha, b) + r[j][c];
            }
        }
    });
}

#else  // GATED, with two warpgroups: one pair of row tiles, gate and up

// out[m, f] = half(*out_scale * act(gate) * up), rows `ldo` apart; gate_bias and up_bias [features] may be null. Over Halves,
// `gate` holds both matrices, interleaved. Columns from `features` to ldo (a multiple of 64, less than 64 more) become zero.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    gemm_gated(const uint8_t* gate, int gate_format, const uint8_t* up, int up_format, int features, const void* x_map, int m,
               int k, half_t* out, int ldo, const float* x_scale, const float* w_scale, const float* gate_bias,
               const float* up_bias, const float* out_scale, int activation) {
    int row_tiles = 2 * ceil_div(features, kTileRows);
    Matrices matrices = {{gate, up, nullptr}, {kReady ? row_tiles * kTileRows : features, kReady ? 0 : features, 0}, {gate_format, up_format, 0}};
    run(matrices, x_map, m, k, w_scale, row_tiles, !kReady, [&](Accumulators& acc, int warpgroup, int first_tile, int token0) {
        int lane = threadIdx.x % 32, token = token0 + lane % 4 * 2;
        int f = first_tile / 2 * kTileRows + warpgroup * 32 + threadIdx.x % 128 / 32 * 8 + lane / 4;
        float alpha = 1.0f / *x_scale / *w_scale, scale = *out_scale;
        float gate_b = gate_bias != nullptr && f < features ? gate_bias[f] : 0.0f;
        float up_b = up_bias != nullptr && f < features ? up_bias[f] : 0.0f;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
            float y[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float g = fmaf(acc[4 * j + c], alpha, gate_b), u = fmaf(acc[4 * j + 2 + c], alpha, up_b);
                y[c] = f < features ? activate(g, activation) * u * scale : 0.0f;
            }
            // Lanes of neighbouring f trade a token, so that each writes two neighbours of one: 4 bytes at a time.
            bool odd = lane / 4 & 1;
            float given = __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 4);
            uint32_t pair = odd ? pack_half2(given, y[1]) : pack_half2(y[0], given);
            int t = token + 8 * j + odd;
            if (t < m && f < ldo) *reinterpret_cast<uint32_t*>(out + static_cast<uint64_t>(t) * ldo + (f & ~1)) = pair;
        }
    });
}

#endif
