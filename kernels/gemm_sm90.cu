// out[m, n] = sum over k of x[m, k] * w[n, k] on Hopper, w quantised: dequantised straight into the registers wgmma reads.
//
// wgmma computes Yᵀ = W · Xᵀ, W from registers, X from shared memory. Each of a block's WARPGROUPS warpgroups takes TILES (1
// or 2) row tiles of W, and TOKENS tokens; with one row tile half of wgmma's 64 rows are zero, which costs nothing where few
// tokens leave the matrix units idle. Two more warps have the copy engine bring x (swizzled, 64 columns a step) and
// quantised tiles (a unit at a time) into two rings. A warpgroup decodes its weights of one step while the matrix units multiply those
// of the step before. x's columns are in operand order (operand.cuh), so a thread's weights of a step are 16 neighbours in
// a row tile's row. The grid is persistent: while one tile is in its epilogue, the rings fill for the next. Each output is
// one chain of sums over k in order, whatever the tile: a token's bits depend neither on other tokens nor on the configuration.
//
// GROUPED: x's rows come in groups, each multiplied by its own matrix of a stack of them (experts).
//
// Compiled for FORMATS, the block formats that its launch may mix (all with the same kElements): a launch multiplies by up
// to three matrices side by side (q, k, v), or by gate and up of one format.
#include "include/activation.cuh"
#include "include/groups.cuh"
#include "include/operand.cuh"
#include "include/sm90.cuh"
#include "quants/all.cuh"
#include "quants/format_list.cuh"

using Formats = FormatList<FORMATS>;

// Sizes -------------------------------------------------------------------------------------------------------------------

constexpr int kStep = kOperandGroup;                           // columns multiplied at a time
constexpr int kUnitSteps = Formats::kElements / kStep;         // steps that one unit gives
constexpr int kSub = STEPS < kUnitSteps ? STEPS : kUnitSteps;  // steps of a stage of x
constexpr int kBlockTiles = WARPGROUPS * TILES;
constexpr int kXStep = TOKENS * kStep * 2, kXBytes = kSub * kXStep, kRawBytes = kBlockTiles * Formats::kTileBytes;
constexpr int kRawOffset = STAGES * kXBytes, kBarrierOffset = kRawOffset + RAW_STAGES * kRawBytes;
constexpr int kConsumers = 128 * WARPGROUPS, kThreads = kConsumers + 128;
constexpr int kTokenGroup = 8;  // token tiles that share W's tiles while these are in the L2 cache
static_assert(kUnitSteps % kSub == 0, "whole stages in a unit");
static_assert(STAGES >= 2 && RAW_STAGES >= 2, "a stage is given back when the next has begun");
static_assert(!GATED || TILES == 2, "gate and up: a row tile of each");

// What rows x has, in tiles of at most TOKENS. Where GROUPED, a kernel before this one made the tiles.
struct Rows {
    int m;
    const Group* groups;
    const int* group_count;

    __device__ int tiles() const { return GROUPED ? *group_count : ceil_div(m, TOKENS); }
    __device__ int first(int tile) const { return GROUPED ? groups[tile].first : tile * TOKENS; }
    __device__ int end(int tile) const { return GROUPED ? groups[tile].end : m; }
    __device__ int expert(int tile) const { return GROUPED ? groups[tile].expert : 0; }
};

struct Matrices {  // up to three, one under another; gate and up for the gated kernel
    const uint8_t* weights[3];
    int rows[3], format[3];
};

// A row tile of W: where its units begin, and where its outputs go.
struct RowTile {
    const uint8_t* raw;        // null where there is no such tile
    int format, rows, column;  // rows: valid ones; column: of the output
};

// Row tiles of so many rows, rounded up so that those of a warpgroup are of one matrix.
__device__ __forceinline__ int whole_tiles(int rows) {
    return ceil_div(rows, kTileRows * TILES) * TILES;
}

__device__ __forceinline__ RowTile row_tile(const Matrices& matrices, int index, int units, int expert) {
    int stacked = GROUPED ? expert * ceil_div(matrices.rows[0], kTileRows) : 0;  // row tiles before this matrix
    if (GATED) {                                                                 // gate's and up's in turn
        int tile = index >> 1, rows = min(kTileRows, matrices.rows[0] - tile * kTileRows);
        const uint8_t* weights = index & 1 ? matrices.weights[1] : matrices.weights[0];
        if (rows <= 0) return {nullptr, 0, 0, tile * kTileRows};
        weights += static_cast<uint64_t>(stacked) * units * Formats::tile_bytes(0);
        return {weights + static_cast<uint64_t>(tile) * units * Formats::tile_bytes(0), 0, rows, tile * kTileRows};
    }
    // Written out: an index into the arguments would put them into local memory.
    int tiles0 = whole_tiles(matrices.rows[0]), tiles1 = whole_tiles(matrices.rows[1]), column = 0;
    int format = matrices.format[0], rows = matrices.rows[0];
    const uint8_t* weights = matrices.weights[0];
    if (GROUPED) {
        if (index * kTileRows >= rows) return {nullptr, 0, 0, 0};
        return {weights + (static_cast<uint64_t>(stacked) + index) * units * Formats::tile_bytes(0), 0,
                min(kTileRows, rows - index * kTileRows), index * kTileRows};
    }
    if (index >= tiles0) {
        column = rows, index -= tiles0;
        weights = matrices.weights[1], rows = matrices.rows[1], format = matrices.format[1];
        if (index >= tiles1) {
            column += rows, index -= tiles1;
            weights = matrices.weights[2], rows = matrices.rows[2], format = matrices.format[2];
        }
    }
    if (index * kTileRows >= rows) return {nullptr, 0, 0, 0};
    return {weights + static_cast<uint64_t>(index) * units * Formats::tile_bytes(format), format,
            min(kTileRows, rows - index * kTileRows), column + index * kTileRows};
}

struct Rings {
    uint32_t base, full, empty, raw_full, raw_empty;  // shared addresses; the latter of arrays of barriers
    const uint8_t* generic;
};

// The tiles of this block, one after another. The blocks of a cluster take the same tokens and neighbouring rows of W.
struct Walk {
    int row_tiles, token_tiles, tile;
    const Rows& x;

    __device__ Walk(int row_tiles, const Rows& x)
        : row_tiles(row_tiles), token_tiles(x.tiles()), tile(blockIdx.x / CLUSTER), x(x) {}
    __device__ int tiles_n() const { return ceil_div(row_tiles, kBlockTiles * CLUSTER); }
    __device__ int tiles_m() const { return token_tiles; }
    __device__ bool more() const { return tile < tiles_n() * tiles_m(); }
    __device__ void next() { tile += gridDim.x / CLUSTER; }
    __device__ int group() const { return tile / (kTokenGroup * tiles_n()); }
    __device__ int within() const { return tile % (kTokenGroup * tiles_n()); }
    __device__ int width() const { return min(kTokenGroup, tiles_m() - group() * kTokenGroup); }
    __device__ int first_row_tile() const {
        return (within() / width() * CLUSTER + blockIdx.x % CLUSTER) * kBlockTiles;
    }
    __device__ int token_tile() const { return group() * kTokenGroup + within() % width(); }
    __device__ int first_token() const { return x.first(token_tile()); }
    __device__ int expert() const { return x.expert(token_tile()); }
};

// The work of kBlockTiles lanes of a warp: each has the copy engine bring a row tile of W, unit by unit. Nothing that runs
// writes weights, so this does not wait for earlier kernels (but where one of them said which).
__device__ __forceinline__ void bring_w(const Rings& rings, const Matrices& matrices, const Rows& rows, int units,
                                        int row_tiles) {
    int lane = threadIdx.x % 32;
    RingPosition<RAW_STAGES> raw;
    for (Walk walk(row_tiles, rows); walk.more(); walk.next()) {
        RowTile tile = row_tile(matrices, walk.first_row_tile() + lane, units, walk.expert());
        int bytes = tile.raw != nullptr ? Formats::tile_bytes(tile.format) : 0;
#pragma unroll 1  // few registers are left
        for (int unit = 0; unit < units; ++unit, raw.advance()) {
            uint32_t full = rings.raw_full + 8 * raw.stage,
                     to = rings.base + kRawOffset + raw.stage * kRawBytes + lane * Formats::kTileBytes;
            barrier_wait(rings.raw_empty + 8 * raw.stage, raw.phase ^ 1);
            barrier_arrive_expect(full, bytes);
            if (bytes) bulk_copy(to, tile.raw, bytes, full);
            tile.raw += bytes;
        }
    }
}

// A step of x: each block of a cluster brings its share of the tokens, for all.
__device__ __forceinline__ void bring_share(uint32_t to, const void* x_map, int column, int token, uint32_t full) {
    int rank = blockIdx.x % CLUSTER;
    if (CLUSTER == 1) tensor_copy(to, x_map, column, token, full);
    else
        tensor_copy(to + rank * (kXStep / CLUSTER), x_map, column, token + rank * (TOKENS / CLUSTER), full,
                    (1 << CLUSTER) - 1);
}

// One thread's: to have it bring x, stage by stage.
__device__ __forceinline__ void bring_x(const Rings& rings, const void* x_map, const Rows& rows, int units,
                                        int row_tiles) {
    RingPosition<STAGES> stage;
    for (Walk walk(row_tiles, rows); walk.more(); walk.next()) {
        int token = walk.first_token();
#pragma unroll 1
        for (int step = 0; step < units * kUnitSteps; step += kSub, stage.advance()) {
            uint32_t full = rings.full + 8 * stage.stage;
            barrier_wait(rings.empty + 8 * stage.stage, stage.phase ^ 1);
            barrier_arrive_expect(full, kXBytes);
#pragma unroll
            for (int sub = 0; sub < kSub; ++sub)
                bring_share(rings.base + stage.stage * kXBytes + sub * kXStep, x_map, (step + sub) * kStep, token,
                            full);
        }
    }
}

// A warp is done with a stage of x: each block that brings a share of it must know.
__device__ __forceinline__ void release(uint32_t empty) {
    int lane = threadIdx.x % 32;
    if (CLUSTER == 1 && lane == 0) barrier_arrive(empty);
    if (CLUSTER > 1 && lane < CLUSTER) barrier_arrive_at(empty, lane);
}

using Accumulators = float[TOKENS / 2];

// Which row of its row tiles a thread has. For the gated kernel such that a warp's are eight neighbours in operand order.
__device__ __forceinline__ int row_of_thread() {
    int warp = threadIdx.x / 32 % 4, slot = threadIdx.x % 32 / 4;
    return GATED ? slot / 2 % 2 * 16 + warp * 4 + slot / 4 * 2 + slot % 2 : warp * 8 + slot;
}

struct Consumer {
    const Rings& rings;
    int units, first, row,
        column;  // first: this warpgroup's row tile, of the block's; row, column: this thread's, of a tile and a step
    float scale;
    RingPosition<STAGES> stage;
    RingPosition<RAW_STAGES> raw;

    // acc = W · Xᵀ for this warpgroup's row tiles, of one format. Weights come in two steps: what is multiplied in step i was
    // decoded in step i - 1, and loaded in step i - 2.
    template <class Format>
    __device__ __forceinline__ void multiply_tile(Accumulators& acc) {
        Fields loaded[TILES];
        uint32_t w[2][2][8] = {};
        auto load = [&](int step) {
            const uint8_t* from = rings.generic + kRawOffset + raw.stage * kRawBytes + first * Formats::kTileBytes;
#pragma unroll
            for (int i = 0; i < TILES; ++i)
                loaded[i] = load_fields<Format>(from + i * Formats::kTileBytes, row, step * kStep + column);
        };
        auto decode = [&](int i, int step, uint32_t (&to)[2][8]) {
            if (i < TILES) decode_halves<Format>(loaded[i], step * kStep + column, scale, to[i]);
        };
        barrier_wait(rings.raw_full + 8 * raw.stage, raw.phase);
        load(0);
        decode(0, 0, w[0]);
        decode(1, 0, w[0]);
        load(1);
        for (int unit = 0; unit < units; ++unit) {
            bool more = unit + 1 < units;
#pragma unroll
            for (int step = 0; step < kUnitSteps; ++step) {
                if (step % kSub == 0) barrier_wait(rings.full + 8 * stage.stage, stage.phase);
                uint64_t x = wgmma_operand(rings.base + stage.stage * kXBytes + step % kSub * kXStep);
                uint32_t (&now)[2][8] = w[step % 2], (&next)[2][8] = w[(step + 1) % 2];
                auto multiply = [&](int k16) {
                    wgmma_f16(acc, now[0][2 * k16], now[1][2 * k16], now[0][2 * k16 + 1], now[1][2 * k16 + 1],
                              x + 2 * k16, unit > 0 || step > 0 || k16 > 0);
                };
                // The matrix units take one instruction after another, and a warp that gives them the next waits until there
                // is room: the decoding stands between them, so as to run beside them.
                wgmma_begin();
                multiply(0);
                multiply(1);
                wgmma_commit();
                wgmma_wait<1>();  // the step before this is done with: its registers may be used again, and its stage
                if (step % kSub == 0 && (unit > 0 || step > 0)) release(rings.empty + 8 * stage.previous());
                if (step < kUnitSteps - 1 || more) decode(0, (step + 1) % kUnitSteps, next);
                wgmma_begin();
                multiply(2);
                multiply(3);
                wgmma_commit();
                if (step < kUnitSteps - 1 || more) decode(1, (step + 1) % kUnitSteps, next);
                if (step == kUnitSteps - 2) {  // the unit has been loaded; the next follows
                    barrier_arrive(rings.raw_empty + 8 * raw.stage);
                    raw.advance();
                    if (more) barrier_wait(rings.raw_full + 8 * raw.stage, raw.phase);
                }
                if (step < kUnitSteps - 2 || more) load((step + 2) % kUnitSteps);
                if (step % kSub == kSub - 1) stage.advance();
            }
        }
        wgmma_wait<0>();
        release(rings.empty + 8 * stage.previous());
    }
};

// Multiplies this block's tiles; calls write(accumulators, alpha, row tiles, row, first token, their end, expert) after each: accumulators
// 4j + 2i and 4j + 2i + 1 of a thread are row `row` of row tile i, tokens 8j + lane%4*2 and the next.
template <class Write>
__device__ __forceinline__ void consume(const Rings& rings, const Matrices& matrices, const Rows& rows, int units,
                                        int row_tiles, float alpha, float scale, Write write) {
    Consumer consumer = {rings,
                         units,
                         static_cast<int>(threadIdx.x) / 128 * TILES,
                         row_of_thread(),
                         static_cast<int>(threadIdx.x) % 4 * 16,
                         scale};
    for (Walk walk(row_tiles, rows); walk.more(); walk.next()) {
        auto tile = [&](int i) { return row_tile(matrices, walk.first_row_tile() + consumer.first + i, units, 0); };
        Accumulators acc;
        Formats::multiply_tile(tile(0).format, consumer, acc);
        RowTile tiles[TILES];
#pragma unroll
        for (int i = 0; i < TILES; ++i) tiles[i] = tile(i);
        write(acc, alpha, tiles, consumer.row, walk.first_token(), rows.end(walk.token_tile()), walk.expert());
    }
}

__device__ __forceinline__ void sync_cluster() {
    if (CLUSTER == 1) __syncthreads();
    else cluster_sync();
}

template <class Write>
__device__ __forceinline__ void run(const Matrices& matrices, const void* x_map, const Rows& rows, int k,
                                    const float* x_scale, const float* w_scale, int row_tiles, Write write) {
    extern __shared__ __align__(1024) uint8_t shared[];
    uint32_t base = shared_address(shared), barriers = base + kBarrierOffset;
    Rings rings = {
        base, barriers, barriers + 8 * STAGES, barriers + 16 * STAGES, barriers + 16 * STAGES + 8 * RAW_STAGES, shared};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(rings.full + 8 * i, 1);
            barrier_init(rings.empty + 8 * i, 4 * WARPGROUPS * CLUSTER);
        }
        for (int i = 0; i < RAW_STAGES; ++i) {
            barrier_init(rings.raw_full + 8 * i, kBlockTiles);
            barrier_init(rings.raw_empty + 8 * i, kConsumers);  // each thread for itself: what it read, it has read
        }
        fence_barrier_init();
    }
    sync_cluster();
    int units = ceil_div(k, Formats::kElements);
    if (threadIdx.x < kConsumers) {
        take_registers<CONSUMER_REGISTERS>();
        begin_kernel();
        consume(rings, matrices, rows, units, row_tiles, 1.0f / *x_scale / *w_scale, *w_scale, write);
    } else {
        give_up_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < kConsumers + kBlockTiles) {
            if (GROUPED) begin_kernel();
            bring_w(rings, matrices, rows, units, row_tiles);
        }
        if (threadIdx.x == kConsumers + 32) {
            begin_kernel();
            bring_x(rings, x_map, rows, units, row_tiles);
        }
        __syncwarp();
    }
    if (CLUSTER > 1)
        cluster_sync();  // until then others may write to this block's shared memory and arrive at its barriers
}

#if !GATED

// out = acc / (*x_scale * *w_scale) + bias (+ out, if `add`), float32, rows `ldo` apart: the matrices' outputs side by side.
// bias, a row for each expert, may be null. x_map: x's tensor map, boxes of 64 halves by TOKENS. groups, group_count: see Rows.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(kThreads, BLOCKS)
    gemm_linear(const uint8_t* w0, int rows0, int format0, const uint8_t* w1, int rows1, int format1, const uint8_t* w2,
                int rows2, int format2, const void* x_map, int m, int k, float* out, int ldo, const float* x_scale,
                const float* w_scale, const float* bias, int add, const Group* groups, const int* group_count) {
    Matrices matrices = {{w0, w1, w2}, {rows0, rows1, rows2}, {format0, format1, format2}};
    int row_tiles = whole_tiles(rows0) + whole_tiles(rows1) + whole_tiles(rows2);
    Rows rows = {m, groups, group_count};
    run(matrices, x_map, rows, k, x_scale, w_scale, row_tiles,
        [&](Accumulators& acc, float alpha, const RowTile(&tiles)[TILES], int row, int token, int end, int expert) {
            token += threadIdx.x % 4 * 2;
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                if (row >= tiles[i].rows) continue;
                int column = tiles[i].column + row;
                float b = bias != nullptr ? bias[expert * rows0 + column] : 0.0f;
                float* to = out + static_cast<uint64_t>(token) * ldo + column;
#pragma unroll
                for (int j = 0; j < TOKENS / 8; ++j, to += 8 * static_cast<uint64_t>(ldo))
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        float y = fmaf(acc[4 * j + 2 * i + c], alpha, b);
                        // The L2 cache adds: nothing is waited for, and as each output is added to once, the sum is always the same.
                        if (token + 8 * j + c < end) add ? reduce_add(to + c * ldo, y) : void(to[c * ldo] = y);
                    }
            }
        });
}

#else

// out[m, f] = half(*out_scale * act(gate) * up), rows `ldo` apart, in operand order; gate_bias and up_bias [features], for each
// expert, may be null. Columns from `features` to the next multiple of 64 become zero.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(kThreads, BLOCKS)
    gemm_gated(const uint8_t* gate, const uint8_t* up, int features, const void* x_map, int m, int k, half_t* out,
               int ldo, const float* x_scale, const float* w_scale, const float* gate_bias, const float* up_bias,
               const float* out_scale, int activation, const Group* groups, const int* group_count) {
    Matrices matrices = {{gate, up, nullptr}, {features, features, 0}, {0, 0, 0}};
    int row_tiles = 2 * ceil_div(features, kOperandGroup) * (kOperandGroup / kTileRows);
    Rows rows = {m, groups, group_count};
    run(matrices, x_map, rows, k, x_scale, w_scale, row_tiles,
        [&](Accumulators& acc, float alpha, const RowTile(&tiles)[TILES], int row, int token, int end, int expert) {
            token += threadIdx.x % 4 * 2;
            int f = tiles[0].column + row;
            float scale = *out_scale;
            bool inside = f < ceil_div(features, kOperandGroup) * kOperandGroup;
            float gate_b = gate_bias != nullptr && f < features ? gate_bias[expert * features + f] : 0.0f;
            float up_b = up_bias != nullptr && f < features ? up_bias[expert * features + f] : 0.0f;
            // Of the outputs of 16 tokens, in two batches of 8: a thread has two neighbouring tokens of one f in each. Lanes of
            // neighbouring f trade a token, then those of neighbouring pairs of f trade a batch, so that each writes four
            // neighbours of one token.
            bool odd = row & 1, second = row & 16;
            uint32_t keep = f < features ? ~0u : 0;  // a select would be compiled to a branch around each
            half_t* to = out + operand_position(f & ~17);
            static_assert(TOKENS % 16 == 0, "whole batches");
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j += 2) {
                uint32_t pair[2];
#pragma unroll
                for (int batch = 0; batch < 2; ++batch) {
                    float y[2];
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        int at = 4 * (j + batch) + c;
                        float g = fmaf(acc[at], alpha, gate_b), u = fmaf(acc[at + 2], alpha, up_b);
                        y[c] = bits_to_float(__float_as_uint(gated(g, u, activation) * scale) & keep);
                    }
                    float given = __shfl_xor_sync(0xffffffffu, odd ? y[0] : y[1], 4);
                    pair[batch] = odd ? pack_half2(given, y[1]) : pack_half2(y[0], given);
                }
                uint32_t given = __shfl_xor_sync(0xffffffffu, second ? pair[0] : pair[1], 8);
                int t = token + 8 * (j + second) + odd;
                uint2 four = second ? make_uint2(given, pair[1]) : make_uint2(pair[0], given);
                if (t < end && inside) *reinterpret_cast<uint2*>(to + static_cast<uint64_t>(t) * ldo) = four;
            }
        });
}

#endif
