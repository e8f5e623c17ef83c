// out[m, n] = sum over k of x[m, k] * w[n, k] on Hopper, w quantised: it is decoded straight into the registers that
// wgmma reads.
//
// wgmma computes Yᵀ = W · Xᵀ, with W from registers and X from shared memory. Each of a block's consumer warpgroups
// multiplies one or two row tiles of W by the tokens of a token tile; with one row tile half of wgmma's 64 rows are
// zero, which costs nothing where few tokens leave the matrix units idle. Two producer warps have the copy engine bring
// x (swizzled, 64 columns a step) and weight tiles (a unit at a time) into two rings. A consumer decodes its weights of
// one step while the matrix units multiply those of the step before. x's columns are in operand order (operand.cuh), so
// a thread's weights of a step are 16 neighbours in a row. The grid is persistent: while one output tile is in its
// epilogue, the rings fill for the next. Each output is one chain of sums over k in order, whatever the tile: a token's
// bits depend neither on other tokens nor on the configuration.
//
// A launch multiplies by up to three matrices side by side (q, k, v), or by gate and up; or, grouped, each group of x's
// rows by its own matrix of a stack of them (experts). The matrices' block formats may differ.
#include "include/consumer_sm90.cuh"
#include "include/epilogue_heads.cuh"

// Producers -----------------------------------------------------------------------------------------------------------

// The work of kBlockTiles lanes of a warp: each has the copy engine bring a row tile of W, a weight tile at a time.
// Nothing that may still run writes weights, so this does not wait for earlier kernels (except where one lists the
// token tiles).
__device__ __forceinline__ void produce_weights(const Rings& rings, const Matrices& matrices, const Tokens& x,
                                                int units, int row_tiles) {
    int lane = threadIdx.x % 32;
    ProducerPosition<Config::kRawStages> at;
    for (OutputTiles outputs(x, row_tiles); outputs.more(); outputs.next()) {
        RowTile tile =
            row_tile<Config>(matrices, row_tile_of_block(outputs.column_tile(), outputs.column_tiles(), lane), units,
                             x.expert(outputs.token_tile()));
        int bytes = tile.weights != nullptr ? Formats::tile_bytes(tile.format) : 0;
        // How often a weight tile is brought again.
        int again = Formats::kMixed ? Formats::served(tile.format) - 1 : 0;
        // Few registers are left.
#pragma unroll 1
        for (int unit = 0; unit < units; ++unit, at.advance()) {
            uint32_t to = rings.raw.stage(at.stage) + lane * Formats::kTileBytes;
            Barrier arrived = rings.raw.begin_filling(at, bytes);
            if (bytes) bulk_copy(to, tile.weights, bytes, arrived, !Config::kGrouped && x.m <= kPassing);
            tile.weights += Formats::kMixed && unit % 2 < again ? 0 : bytes;
        }
    }
}

// Has the copy engine bring a step of x. Each of a cluster's sharers brings its share of the tokens, for all of them.
__device__ __forceinline__ void copy_step(uint32_t to, const void* x_map, int column, int token, Barrier arrived) {
    constexpr int kSharers = Config::kSharers;
    int rank = blockIdx.x % kSharers;
    tensor_copy_to<kSharers>(to + rank * (Config::kStepBytes / kSharers), x_map, column,
                             token + rank * (Config::kTokens / kSharers), arrived);
}

// The work of one thread: it has the copy engine bring x, a stage at a time, and angles (AngleStages), if there are
// any.
__device__ __forceinline__ void produce_x(const Rings& rings, const void* x_map, const void* angle_map, const Tokens& x,
                                          int units, int row_tiles) {
    ProducerPosition<Config::kStages> at;
    for (OutputTiles outputs(x, row_tiles); outputs.more(); outputs.next()) {
        int token = x.first(outputs.token_tile());
#pragma unroll 1
        for (int step = 0; step < units * Config::kUnitSteps; step += Config::kStageSteps, at.advance()) {
            Barrier arrived = rings.x.begin_filling(at, Config::kStageBytes);
#pragma unroll
            for (int sub = 0; sub < Config::kStageSteps; ++sub)
                copy_step(rings.x.stage(at.stage) + sub * Config::kStepBytes, x_map, (step + sub) * Config::kStep,
                          token, arrived);
        }
        if constexpr (Config::kHeadDim != 0) Angles::produce(rings.x, at, 0, angle_map, token);
    }
}

// Consumers -----------------------------------------------------------------------------------------------------------

// Multiplies this block's output tiles; calls write(accumulators, alpha, row tiles, row, first token, end, expert, the
// position after it in x's ring) after each. Accumulators 4j + 2i and 4j + 2i + 1 of a thread are row `row` of row tile
// i, and tokens 8j + lane % 4 * 2 and the next, counted from the first token of the token tile, which ends before token
// `end`.
template <class Write>
__device__ __forceinline__ void consume(const Rings& rings, const Matrices& matrices, const Tokens& x, int units,
                                        int row_tiles, float alpha, float scale, Write write) {
    int thread = threadIdx.x;
    Consumer consumer = {rings, units, thread / 128 * Config::kTiles, row_of_thread(), thread % 4 * 16, scale, 0};
    for (OutputTiles outputs(x, row_tiles); outputs.more(); outputs.next()) {
        auto tile = [&](int i) {
            return row_tile<Config>(
                matrices, row_tile_of_block(outputs.column_tile(), outputs.column_tiles(), consumer.first + i), units,
                0);
        };
        Accumulators acc;
        // Else the next tile's first wgmma, which does not read them, would have them kept in their registers.
        if (Config::kHeadDim != 0) clear(acc);
        if (Config::kGrouped) consumer.tokens = x.end(outputs.token_tile()) - x.first(outputs.token_tile());
        if constexpr (Config::kGated) consumer.template multiply_tile<Formats::Gate, Formats::Up>(acc);
        else Formats::multiply_tile(tile(0).format, consumer, acc);
        // Else what follows from it would be kept through the products.
        if (Config::kHeadDim != 0) forget(outputs.index);
        RowTile tiles[Config::kTiles];
#pragma unroll
        for (int i = 0; i < Config::kTiles; ++i) tiles[i] = tile(i);
        write(acc, alpha, tiles, consumer.row, x.first(outputs.token_tile()), x.end(outputs.token_tile()),
              x.expert(outputs.token_tile()), consumer.stage);
    }
}

// Kernels -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Rings rings_of_block() {
    uint32_t base = shared_address(block_memory()), barriers = base + Config::kBarrierOffset;
    return {{base, barriers}, {base + Config::kRawOffset, barriers + Config::XRing::kBarrierBytes}, block_memory()};
}

// The work of a block: it makes its rings, and has its warps produce or consume. `write` is the epilogue (see consume).
// angle_map: of heads, the tensor map of their angles (AngleStages), or null where nothing is rotated.
template <class Write>
__device__ __forceinline__ void run(const Matrices& matrices, const void* x_map, const Tokens& x, int k,
                                    const float* x_scale, const float* w_scale, int row_tiles, Write write,
                                    const void* angle_map = nullptr) {
    constexpr int kConsumers = Config::kConsumers;
    Rings rings = rings_of_block();
    if (threadIdx.x == 0) {
        rings.x.init(1, 4 * Config::kWarpgroups * Config::kSharers);
        for (int i = 0; i < Config::kRawStages; ++i) {
            rings.raw.arrived(i).init(Config::kBlockTiles);
            rings.raw.finished(i).init(kConsumers);  // each consumer for itself: what it read, it has read
        }
        fence_barrier_init();
    }
    sync_blocks<Config::kCluster>();
    int units = ceil_div(k, Formats::kElements);
    if (threadIdx.x < kConsumers) {
        take_registers<Config::kConsumerRegisters>();
        begin_kernel();
        consume(rings, matrices, x, units, row_tiles, unscale(x_scale, w_scale), *w_scale, write);
    } else {
        give_up_registers<Config::kProducerRegisters>();
        if (threadIdx.x < kConsumers + Config::kBlockTiles) {
            if (Config::kGrouped) begin_kernel();
            produce_weights(rings, matrices, x, units, row_tiles);
        }
        if (threadIdx.x == kConsumers + 32) {
            prefetch_map(x_map);
            begin_kernel();
            produce_x(rings, x_map, angle_map, x, units, row_tiles);
        }
        __syncwarp();
    }
    if (Config::kCluster > 1)
        cluster_sync();  // until then others may write to this block's shared memory and arrive at its barriers
}

#if ACTIVATED

// out[m, f] = *out_scale * act(sums / (*x_scale * *w_scale) + bias) as an operand, rows `ldo` apart. bias, [features],
// may be null. Columns from `features` to the next multiple of 64 become zero. x_map as below.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_activated(const uint8_t* weights, int features, const void* x_map, int m, int k, half_t* out, int ldo,
                   const float* x_scale, const float* w_scale, const float* bias, const float* out_scale,
                   int activation) {
    Matrices matrices = {{weights, nullptr, nullptr}, {features, 0, 0}, {0, 0, 0}};
    int row_tiles = ceil_div(features, kOperandGroup) * (kOperandGroup / kTileRows);
    Tokens x = {m, nullptr, nullptr};
    auto write = [&](Accumulators& acc, float alpha, const RowTile(&tiles)[Config::kTiles], int row, int token, int end,
                     int expert, RingPlace&) {
        token += threadIdx.x % 4 * 2;
        ActivatedOutput output = {out, ldo, features, *out_scale, activation};
        HalfSums<Config::kTokens> sums = {acc, alpha};
        output.store_transposed<Config::kTokens, 0>(sums, bias, tiles[0].column, row, token, end);
        if constexpr (Config::kTiles == 2)
            output.store_transposed<Config::kTokens, 1>(sums, bias, tiles[1].column, row, token, end);
    };
    run(matrices, x_map, x, k, x_scale, w_scale, row_tiles, write);
}

#elif HEAD_DIM

// q, k and v: heads of what the matrices make of x, one under another (Heads in epilogue_heads.cuh). bias: of all of
// the launch's outputs, or null. angle_map: see run. x_map as below.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_heads(const uint8_t* w0, int rows0, int format0, const uint8_t* w1, int rows1, int format1, const uint8_t* w2,
               int rows2, int format2, const void* x_map, int m, int k, const float* x_scale, const float* w_scale,
               const float* bias, half_t* q_out, half_t* k_out, half_t* v_out, int nq, int nkv, const float* q_norm,
               const float* k_norm, float epsilon, const void* angle_map, const float* q_scale, const float* k_scale,
               const float* v_scale, const int* kv_rows) {
    using Epilogue = HeadsEpilogue<Config, NORMED, INTERLEAVED, 8>;
    static_assert(Epilogue::kSharedBytes == EPILOGUE_BYTES, "what the host counts with");
    Matrices matrices = {{w0, w1, w2}, {rows0, rows1, rows2}, {format0, format1, format2}};
    int row_tiles = count_row_tiles<Config>(rows0) + count_row_tiles<Config>(rows1) + count_row_tiles<Config>(rows2);
    Tokens x = {m, nullptr, nullptr};
    Heads heads = {q_out, k_out, v_out, nq, nkv, q_norm, k_norm, epsilon, q_scale, k_scale, v_scale, kv_rows};
    if (threadIdx.x == 0) Epilogue::init(block_memory());
    uint32_t parity = 0;  // of the output tile's number
    auto write = [&](Accumulators& acc, float alpha, const RowTile(&tiles)[Config::kTiles], int row, int token, int end,
                     int, RingPlace& at) {
        Epilogue epilogue = {heads, block_memory(), parity};
        parity ^= 1;
        float biases[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            biases[i] = load_where(bias != nullptr && tiles[i].rows > 0, bias + tiles[i].column + row, 0.0f);
        Config::XRing ring = rings_of_block().x;
        AngleReader<Config, Config::XRing, RingPlace> angles = {ring, at, 0, angle_map != nullptr};
        epilogue.store(HalfSums<Config::kTokens>{acc, alpha}, biases, tiles[0].column, row, token,
                       tiles[0].rows > 0 ? end : 0, angles);
    };
    run(matrices, x_map, x, k, x_scale, w_scale, row_tiles, write, angle_map);
}

#elif !GATED

// out = sums / (*x_scale * *w_scale) + bias (+ out, if `add`), float32, rows `ldo` apart: the matrices' outputs side by
// side. Grouped: halves, times *out_scale, and no `add`. bias, a row for each expert, may be null. x_map: x's tensor
// map, boxes of 64 halves by TOKENS / SHARERS rows. groups and group_count: the token tiles, where they are grouped.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_linear(const uint8_t* w0, int rows0, int format0, const uint8_t* w1, int rows1, int format1, const uint8_t* w2,
                int rows2, int format2, const void* x_map, int m, int k, void* out, int ldo, const float* x_scale,
                const float* w_scale, const float* out_scale, const float* bias, int add, const Group* groups,
                const int* group_count) {
    Matrices matrices = {{w0, w1, w2}, {rows0, rows1, rows2}, {format0, format1, format2}};
    int row_tiles = count_row_tiles<Config>(rows0) + count_row_tiles<Config>(rows1) + count_row_tiles<Config>(rows2);
    Tokens x = {m, groups, group_count};
    auto write = [&](Accumulators& acc, float alpha, const RowTile(&tiles)[Config::kTiles], int row, int token, int end,
                     int expert, RingPlace&) {
        if constexpr (Config::kGrouped) {  // an expert's matrix has whole row tiles
            float scale = *out_scale;      // a power of two
            float biases[2] = {};
#pragma unroll
            for (int i = 0; i < Config::kTiles; ++i)
                biases[i] = Biases{expert, rows0, tiles[i].column + row, tiles[i].rows > 0}.of(bias) * scale;
            int column = tiles[0].rows > 0 ? tiles[0].column : rows0;
            ExpertOutput<Config::kTokens, RowOrder::kPlain> output = {
                out, ldo, rows0, column, Config::kTiles, block_memory() + Config::kEpilogueOffset};
            output.store(HalfSums<Config::kTokens>{acc, alpha * scale}, biases, token, end);
        } else {
            token += threadIdx.x % 4 * 2;
#pragma unroll
            for (int i = 0; i < Config::kTiles; ++i) {
                if (row >= tiles[i].rows) continue;
                int column = tiles[i].column + row;
                float own_bias = Biases{expert, rows0, column, true}.of(bias);
                LinearOutput output = {static_cast<float*>(out), ldo};
                HalfSums<Config::kTokens> sums = {acc, alpha};
                output.store_transposed<Config::kTokens>(sums, i, own_bias, column, token, end, add);
            }
        }
    };
    run(matrices, x_map, x, k, x_scale, w_scale, row_tiles, write);
}

#else

// out[m, f] = *out_scale * act(gate) * up as an operand, rows `ldo` apart. gate_bias and up_bias, [features] for each
// expert, may be null. Columns from `features` to the next multiple of 64 become zero. x_map, groups and group_count as
// above.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_gated(const uint8_t* gate, const uint8_t* up, int features, const void* x_map, int m, int k, half_t* out,
               int ldo, const float* x_scale, const float* w_scale, const float* gate_bias, const float* up_bias,
               const float* out_scale, int activation, const Group* groups, const int* group_count) {
    // Where there are two formats, gate has the first.
    Matrices matrices = {
        {gate, up, nullptr}, {features, features, 0}, {0, kSame<Formats::Gate, Formats::Up> ? 0 : 1, 0}};
    int row_tiles = 2 * ceil_div(features, kOperandGroup) * (kOperandGroup / kTileRows);
    Tokens x = {m, groups, group_count};
    auto write = [&](Accumulators& acc, float alpha, const RowTile(&tiles)[Config::kTiles], int row, int token, int end,
                     int expert, RingPlace&) {
        GatedOutput output = {out, ldo, features, *out_scale, activation, block_memory() + Config::kEpilogueOffset};
        HalfSums<Config::kTokens> sums = {acc, alpha};
        output.store_transposed<Config::kTokens, Config::kWarpgroups>(sums, gate_bias, up_bias, expert, tiles[0].column,
                                                                      row, token, end);
    };
    run(matrices, x_map, x, k, x_scale, w_scale, row_tiles, write);
}

#endif
