// out[m, n] = sum over k of x[m, k] * w[n, k] on Hopper, both in int8 (int8.cuh), summed exactly; then times the scales
// of x's row and of w's.
//
// wgmma computes Yᵀ = W · Xᵀ, both from shared memory. Each of a block's consumer warpgroups multiplies one or two row
// tiles of W by the tokens of a token tile; with one row tile half of wgmma's 64 rows are whatever lies there, and are
// not looked at. Two or three producer warps have the copy engine bring groups of 128 columns of both into a ring of
// stages, for one output tile after another: the grid is persistent. Integer sums are the same in whatever order and
// tile.
//
// A launch multiplies by up to three matrices side by side (q, k, v), or by gate and up; or, grouped, each group of x's
// rows by its own matrix of a stack of them (experts).
#include "include/epilogue_heads.cuh"
#include "include/epilogue_int8.cuh"
#include "include/gemm_int8_sm90.cuh"

// The matrices of a launch, and their rows' scales: those of the first row of each, less the rows before it in out.
struct Weights {
    Matrices matrices;
    const float* scales[3];
    int groups, row_tiles;  // groups of columns; row tiles of all

    // Row tile i of this thread's warpgroup in an output tile.
    __device__ __forceinline__ RowTile row_tile_of_warpgroup(const OutputTile& to, int i) const {
        int own = threadIdx.x / 128 * Config::kTiles + i;
        return row_tile<Config>(matrices, to.row_tile(row_tiles, own), groups, 0);
    }
    // Of a row of a row tile, 0 for one that there is not.
    __device__ __forceinline__ float scale(const RowTile& tile, int row, int matrix, int expert) const {
        if (row >= tile.rows) return 0.0f;
        const float* of = matrix == 0 ? scales[0] : matrix == 1 ? scales[1] : scales[2];
        return of[(Config::kGrouped ? expert * matrices.rows[0] : 0) + tile.column + row];
    }
};

// Producers -----------------------------------------------------------------------------------------------------------

// Calls fill(where a step goes, its number) of each step of a stage, for all stages of all of this block's output
// tiles; each is called for with begin(stage's position, steps in it), which gives the barrier.
template <class Begin, class Fill>
__device__ __forceinline__ void produce_tile(const Config::Steps& ring, ProducerPosition<Config::kStages>& at,
                                             int groups, Begin begin, Fill fill) {
#pragma unroll 1
    for (int step = 0; step < groups; step += Config::kStageSteps, at.advance()) {
        int count = min(Config::kStageSteps, groups - step);
        Barrier arrived = begin(count);
        uint32_t to = ring.stage(at.stage);
#pragma unroll
        for (int sub = 0; sub < Config::kStageSteps; ++sub)
            if (sub < count) fill(to + sub * Config::kStepBytes, step + sub, arrived);
    }
}

// The work of kCopies threads: each has the copy engine bring a row tile of W, or an atom of one, a step at a time.
// Nothing that may still run writes weights, so this does not wait for earlier kernels (except where one lists the
// token tiles). angle_stages: those after each output tile that only produce_x fills.
__device__ __forceinline__ void produce_weights(const Config::Steps& ring, const Weights& w, const Tokens& x, int copy,
                                                int angle_stages) {
    constexpr int kAtoms = kInt8TileBytes / Config::kCopyBytes, kCopyBytes = Config::kCopyBytes;
    int own = copy / kAtoms, atom = copy % kAtoms;
    int place = Config::kPaired ? own / 2 * 2 * kAtoms + 2 * atom + own % 2 : own;
    ProducerPosition<Config::kStages> at;
    for (OutputTiles outputs(x, w.row_tiles); outputs.more(); outputs.next()) {
        OutputTile output = OutputTile::of(outputs);
        RowTile tile = row_tile<Config>(w.matrices, output.row_tile(w.row_tiles, own), w.groups, output.expert);
        const uint8_t* from = tile.weights;
        auto begin = [&](int count) { return ring.begin_filling(at, from != nullptr ? count * kCopyBytes : 0); };
        auto fill = [&](uint32_t to, int step, Barrier arrived) {
            if (from != nullptr)
                bulk_copy(to + place * kCopyBytes, from + step * kInt8TileBytes + atom * kCopyBytes, kCopyBytes,
                          arrived, !Config::kGrouped && x.m <= kPassing);
        };
        produce_tile(ring, at, w.groups, begin, fill);
        for (int i = 0; i < angle_stages; ++i, at.advance()) ring.begin_filling(at, 0);
    }
}

// Whether that is worth it: of few tokens; and where no earlier kernel lists the token tiles.
constexpr bool kLooksAhead = Config::kTokens <= 128 && !Config::kGrouped;

// The work of one thread: it puts output tiles in the queue, and has the copy engine bring x, and angles (AngleStages),
// where there are any. Each of a cluster's sharers brings its share of the tokens, for all of them. Where kLooksAhead,
// the first output tile is looked up before earlier kernels are waited for.
__device__ __forceinline__ void produce_x(const Config::Steps& ring, TileQueue queue, const void* x_map,
                                          const void* angle_map, const Weights& w, const Tokens& x) {
    constexpr int kSharers = Config::kSharers;
    int rank = blockIdx.x % kSharers;
    bool begun = !kLooksAhead;
    ProducerPosition<Config::kStages> at;
    for (OutputTiles outputs(x, w.row_tiles); outputs.more(); outputs.next()) {
        OutputTile output = OutputTile::of(outputs);
        int token = output.first;
        ring.wait_until_finished(at);
        queue.put(output);
        if (!begun) begin_kernel(), begun = true;
        auto begin = [&](int count) { return ring.begin_filling(at, count * Config::kXBytes); };
        auto fill = [&](uint32_t to, int step, Barrier arrived) {
            tensor_copy_to<kSharers>(to + Config::kWBytes + rank * (Config::kXBytes / kSharers), x_map, step * kRotated,
                                     token + rank * (Config::kTokens / kSharers), arrived);
        };
        produce_tile(ring, at, w.groups, begin, fill);
        if constexpr (Config::kHeadDim != 0) Angles::produce(ring, at, Config::kWBytes, angle_map, token);
    }
}

// Consumers -----------------------------------------------------------------------------------------------------------

// A thread of a consumer warpgroup.
struct Consumer {
    const Config::Steps& ring;
    int groups, offset;  // offset: of this warpgroup's row tiles in a step
    ConsumerPosition<Config::kStages> at;

    // acc = W · Xᵀ for this warpgroup's row tiles. Of an expert's last token tile only so many tokens are multiplied as
    // it may have.
    __device__ __forceinline__ void multiply(Accumulators& acc, int tokens) {
        constexpr int kTokens = Config::kTokens;
        if constexpr (Config::kGrouped && kTokens >= 64)
            if (tokens <= kTokens / 4) return multiply_tokens<kTokens / 4>(acc);
        if constexpr (Config::kGrouped && kTokens >= 32)
            if (tokens <= kTokens / 2) return multiply_tokens<kTokens / 2>(acc);
        if constexpr (Config::kGrouped && kTokens == 256)  // no faster, but without it gate and up's program spills
            if (tokens <= kTokens / 4 * 3) return multiply_tokens<kTokens / 4 * 3>(acc);
        multiply_tokens<kTokens>(acc);
    }

    template <int kTokens>
    __device__ __forceinline__ void multiply_tokens(Accumulators& all) {
        int (&acc)[kTokens / 2] = reinterpret_cast<int (&)[kTokens / 2]>(all);
        for (int step = 0; step < groups; step += Config::kStageSteps, at.advance()) {
            ring.wait_until_arrived(at);
            uint32_t from = ring.stage(at.stage);
            wgmma_begin();
#pragma unroll
            for (int sub = 0; sub < Config::kStageSteps; ++sub, from += Config::kStepBytes) {
                if (step + sub >= groups) break;
                uint64_t w = wgmma_operand(from + offset), x = wgmma_operand(from + Config::kWBytes);
#pragma unroll
                for (int k32 = 0; k32 < kRotated / 32; ++k32)
                    wgmma_s8(acc, w + 2 * k32, x + 2 * k32, step > 0 || sub > 0 || k32 > 0);
            }
            wgmma_commit();
            wgmma_wait<1>();  // the stage before this is done with
            if (step > 0) ring.release_by_warp<Config::kSharers>(at.previous());
        }
        wgmma_wait<0>();
        ring.release_by_warp<Config::kSharers>(at.previous());
    }
};

// What a thread needs of its two rows when they have been multiplied: it is loaded before, and comes meanwhile.
struct Rows {
    int rows, column;  // of its row tile: how many there are, and the first one's column of the output
    float scale[2], bias[2];
};

// Multiplies this block's output tiles; calls begin(output tile) before each, which gives Rows, and after it
// write(accumulators, Rows, scales, output tile, the position after it in the ring).
template <class Begin, class Write>
__device__ __forceinline__ void consume(const Config::Steps& ring, TileQueue queue, const Weights& w,
                                        const float* x_scale, const Tokens& x, Begin begin, Write write) {
    int first = threadIdx.x / 128 * Config::kTiles;
    Consumer consumer = {ring, w.groups, first * kInt8TileBytes};
    // No launch has more blocks than output tiles, but for experts, whose number of tiles is known on the device only.
    if (Config::kGrouped && !OutputTiles(x, w.row_tiles).more()) return;
    for (int left = 1; left > 0;) {
        ring.wait_until_arrived(consumer.at);
        OutputTile to = queue.get<Config::kSharers>();
        Rows rows = begin(to);
        TokenScales<Config::kTokens> scales(x_scale + to.first);
        Accumulators acc;
        // Else the next tile's first wgmma, which does not read them, would have them kept in their registers.
        if (Config::kHeadDim != 0 || (Config::kGated && !Config::kGrouped)) clear(acc);
        consumer.multiply(acc, to.end - to.first);
        if (!Config::kGrouped) to = queue.get<Config::kSharers>();  // again: else registers spill, but for experts
        queue.next();
        write(acc, rows, scales, to, consumer.at);
        left = to.left;
    }
}

// Kernels -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Config::Steps ring_of_block() {
    uint32_t base = shared_address(block_memory());
    return {base, base + Config::Steps::kBytes};
}
__device__ __forceinline__ TileQueue queue_of_block() {
    return {reinterpret_cast<OutputTile*>(block_memory() + Config::kQueueOffset)};
}

// The work of a block: it makes its ring, and has its warps produce or consume. begin, write: see consume.
// angle_map: of heads, the tensor map of their angles (AngleStages), or null where nothing is rotated.
template <class Begin, class Write>
__device__ __forceinline__ void run(const Weights& w, const void* x_map, const float* x_scale, const Tokens& x,
                                    Begin begin, Write write, const void* angle_map = nullptr) {
    constexpr int kConsumers = Config::kConsumers;
    Config::Steps ring = ring_of_block();
    if (threadIdx.x == 0) {
        ring.init(Config::kCopies + 1, 4 * Config::kWarpgroups * Config::kSharers);
        fence_barrier_init();
    }
    sync_blocks<Config::kCluster>();
    if (threadIdx.x < kConsumers) {
        take_registers<Config::kConsumerRegisters>();
        begin_kernel();
        consume(ring, queue_of_block(), w, x_scale, x, begin, write);
    } else {
        give_up_registers<Config::kProducerRegisters>();
        // A warp's lanes ask for their copies one after another: two warps do so at once, and the one between them asks
        // for x.
        int warp = threadIdx.x / 32 - kConsumers / 32, copy = warp / 2 * Config::kCopiesOfWarp + threadIdx.x % 32;
        if (warp % 2 == 0 && threadIdx.x % 32 < Config::kCopiesOfWarp && copy < Config::kCopies) {
            if (Config::kGrouped) begin_kernel();
            produce_weights(ring, w, x, copy, angle_map != nullptr ? Angles::kPanels : 0);
        }
        if (threadIdx.x == kConsumers + 32) {
            if (kLooksAhead) prefetch_map(x_map);
            else begin_kernel();
            produce_x(ring, queue_of_block(), x_map, angle_map, w, x);
        }
        __syncwarp();
    }
    if (Config::kCluster > 1)
        cluster_sync();  // until then others may write to this block's shared memory and arrive at its barriers
}

__device__ __forceinline__ const uint8_t* bytes(const int8_t* tiles) {
    return reinterpret_cast<const uint8_t*>(tiles);
}

#if ACTIVATED

// out[m, f] = *out_scale * act(sums * scales + bias) as an operand, rows `ldo` apart. bias, [features], may be null.
// Columns from `features` to the next multiple of 64 become zero. The others as below.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_activated(const int8_t* weights, const float* w_scales, int features, const void* x_map, const float* x_scale,
                   int m, int k, half_t* out, int ldo, const float* bias, const float* out_scale, int activation) {
    Weights w = {{{bytes(weights), nullptr, nullptr}, {features, 0, 0}, {0, 0, 0}},
                 {w_scales, nullptr, nullptr},
                 k / kRotated,
                 ceil_div(features, kOperandGroup) * (kOperandGroup / kTileRows)};
    Tokens x = {m, nullptr, nullptr};
    int warp = threadIdx.x / 32 % 4, row = int8_row(warp % 2 * 16 + threadIdx.x % 32 / 4);  // and the row 4 below it
    bool has_rows = warp / 2 < Config::kTiles;
    auto begin = [&](const OutputTile& to) -> Rows {
        RowTile tile = w.row_tile_of_warpgroup(to, warp / 2);
        return {tile.rows, tile.column, {w.scale(tile, row, 0, to.expert), w.scale(tile, row + 4, 0, to.expert)}};
    };
    auto write = [&](const Accumulators& acc, const Rows& rows, const TokenScales<Config::kTokens>& scales,
                     const OutputTile& to, RingPlace&) {
        Int8Sums<Config::kTokens> sums = {acc, rows.scale, scales};
        ActivatedOutput output = {out, ldo, features, *out_scale, activation};
        int its_end = has_rows ? to.end : 0;  // no branch: wgmma's registers must not depend on one
        int token = to.first + threadIdx.x % 4 * 2;
        output.store_transposed<Config::kTokens, 0>(sums, bias, rows.column, row, token, its_end);
        output.store_transposed<Config::kTokens, 1>(sums, bias, rows.column, row + 4, token, its_end);
    };
    run(w, x_map, x_scale, x, begin, write);
}

#elif HEAD_DIM

// q, k and v: heads of what the matrices make of x, one under another (Heads in epilogue_heads.cuh). bias: of all of
// the launch's outputs, or null. angle_map: see run. The others as below.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_heads(const int8_t* w0, const float* scales0, int rows0, const int8_t* w1, const float* scales1, int rows1,
               const int8_t* w2, const float* scales2, int rows2, const void* x_map, const float* x_scale, int m, int k,
               const float* bias, half_t* q_out, half_t* k_out, half_t* v_out, int nq, int nkv, const float* q_norm,
               const float* k_norm, float epsilon, const void* angle_map, const float* q_scale, const float* k_scale,
               const float* v_scale, const int* kv_rows) {
    using Epilogue = HeadsEpilogue<Config, NORMED, INTERLEAVED, 16>;
    static_assert(Epilogue::kSharedBytes == EPILOGUE_BYTES, "what the host counts with");
    Weights w = {{{bytes(w0), bytes(w1), bytes(w2)}, {rows0, rows1, rows2}, {0, 1, 2}},
                 {scales0, scales1 - rows0, scales2 - rows0 - rows1},
                 k / kRotated,
                 (rows0 + rows1 + rows2) / kTileRows};
    Tokens x = {m, nullptr, nullptr};
    Heads heads = {q_out, k_out, v_out, nq, nkv, q_norm, k_norm, epsilon, q_scale, k_scale, v_scale, kv_rows};
    if (threadIdx.x == 0) Epilogue::init(block_memory());
    uint32_t parity = 0;  // of the output tile's number
    int row = int8_row(threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4);
    auto begin = [&](const OutputTile& to) -> Rows {
        Rows own;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            RowTile tile = w.row_tile_of_warpgroup(to, i);
            own.scale[i] = w.scale(tile, row, tile.format, 0);
            own.bias[i] = Biases{0, 0, tile.column + row, tile.rows > 0}.of(bias);
            if (i == 0) own.rows = tile.rows, own.column = tile.column;
        }
        return own;
    };
    auto write = [&](const Accumulators& acc, const Rows& rows, const TokenScales<Config::kTokens>& scales,
                     const OutputTile& to, RingPlace& at) {
        Epilogue epilogue = {heads, block_memory(), parity};
        parity ^= 1;
        Int8Sums<Config::kTokens> sums = {acc, rows.scale, scales};
        Config::Steps ring = ring_of_block();
        AngleReader<Config, Config::Steps, RingPlace> angles = {ring, at, Config::kWBytes, angle_map != nullptr};
        epilogue.store(sums, rows.bias, rows.column, row, to.first, rows.rows > 0 ? to.end : 0, angles);
    };
    run(w, x_map, x_scale, x, begin, write, angle_map);
}

#elif !GATED

// out = sums * scales + bias (+ out, if `add`), float32, rows `ldo` apart: the matrices' outputs side by side. Grouped:
// halves, or IN_BLOCKS (output_blocks.cuh), times *out_scale, and no `add`. bias, a row for each expert, may be null.
// k: columns, whole groups. x_map: x's tensor map, boxes of 128 bytes by TOKENS / SHARERS rows. x_scale: with TOKENS
// more than there are rows. groups and group_count: the token tiles, where they are grouped.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_linear(const int8_t* w0, const float* scales0, int rows0, const int8_t* w1, const float* scales1, int rows1,
                const int8_t* w2, const float* scales2, int rows2, const void* x_map, const float* x_scale, int m,
                int k, void* out, int ldo, const float* out_scale, const float* bias, int add, const Group* groups,
                const int* group_count) {
    Weights w = {{{bytes(w0), bytes(w1), bytes(w2)}, {rows0, rows1, rows2}, {0, 1, 2}},
                 {scales0, scales1 - rows0, scales2 - rows0 - rows1},
                 k / kRotated,
                 count_row_tiles<Config>(rows0) + count_row_tiles<Config>(rows1) + count_row_tiles<Config>(rows2)};
    Tokens x = {m, groups, group_count};
    int warp = threadIdx.x / 32 % 4, slot = threadIdx.x % 32 / 4;
    auto begin = [&](const OutputTile& to) -> Rows {
        RowTile tile = w.row_tile_of_warpgroup(to, warp / 2);
        if (warp / 2 >= Config::kTiles) tile.rows = 0;
        Rows own = {tile.rows, tile.column};
        float scale = Config::kGrouped ? *out_scale : 1.0f;  // a power of two
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int row = int8_row(warp % 2 * 16 + 8 * i + slot);
            own.scale[i] = w.scale(tile, row, tile.format, to.expert) * scale;
            own.bias[i] = Biases{to.expert, rows0, tile.column + row, row < tile.rows}.of(bias) * scale;
        }
        if (Config::kGrouped)  // of all of the warpgroup's row tiles
            own.column = to.row_tile(w.row_tiles, threadIdx.x / 128 * Config::kTiles) * kTileRows;
        return own;
    };
    auto write = [&](const Accumulators& acc, const Rows& rows, const TokenScales<Config::kTokens>& scales,
                     const OutputTile& to, RingPlace&) {
        Int8Sums<Config::kTokens> sums = {acc, rows.scale, scales};
        if constexpr (Config::kGrouped) {
            ExpertOutput<Config::kTokens, RowOrder::kAtoms, 16, IN_BLOCKS> output = {
                out, ldo, rows0, rows.column, Config::kTiles, block_memory() + Config::kEpilogueOffset};
            output.store(sums, rows.bias, to.first, to.end);
        } else {
            int own = warp % 2 * 8 + (slot >> 2) * 4 + (slot >> 1 & 1) * 16;  // the first column that the lane writes
            FourColumns<Config::kTokens, Config::kWhole> outputs = {sums, rows.bias};
            outputs.store(static_cast<float*>(out) + rows.column + own, ldo, rows.rows - own,
                          to.first + threadIdx.x % 4 * 2, to.end, add);
        }
    };
    run(w, x_map, x_scale, x, begin, write);
}

#else

// out[m, f] = *out_scale * act(gate) * up as an operand, rows `ldo` apart. gate_bias and up_bias, [features] for each
// expert, may be null. Columns from `features` to the next multiple of 64 become zero, but of tokens that are not
// finite. The others as above.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_gated(const int8_t* gate, const float* gate_scales, const int8_t* up, const float* up_scales, int features,
               const void* x_map, const float* x_scale, int m, int k, half_t* out, int ldo, const float* gate_bias,
               const float* up_bias, const float* out_scale, int activation, const Group* groups,
               const int* group_count) {
    Weights w = {{{bytes(gate), bytes(up), nullptr}, {features, features, 0}, {0, 0, 0}},
                 {gate_scales, up_scales, nullptr},
                 k / kRotated,
                 2 * ceil_div(features, kOperandGroup) * (kOperandGroup / kTileRows)};
    Tokens x = {m, groups, group_count};
    int row = int8_row(threadIdx.x / 32 % 4 * 8 + threadIdx.x % 32 / 4);
    // SiLU's factors, and the operand's scale, are in the rows' scales (scaled_silu), and in the biases.
    auto begin = [&](const OutputTile& to) -> Rows {
        RowTile tile = w.row_tile_of_warpgroup(to, 0);
        Biases biases = {to.expert, features, tile.column + row, tile.column + row < features};
        float of_gate = activation == kSilu ? kSiluSlope : 1.0f;
        float of_up = activation == kSilu ? *out_scale * kPerSlope : 1.0f;
        return {tile.rows,
                tile.column,
                {w.scale(tile, row, 0, to.expert) * of_gate, w.scale(tile, row, 1, to.expert) * of_up},
                {biases.of(gate_bias) * of_gate, biases.of(up_bias) * of_up}};
    };
    auto write = [&](const Accumulators& acc, const Rows& rows, const TokenScales<Config::kTokens>& scales,
                     const OutputTile& to, RingPlace&) {
        Int8Sums<Config::kTokens> sums = {acc, rows.scale, scales};
        GatedOutput output = {out, ldo, features, *out_scale, activation, block_memory() + Config::kEpilogueOffset};
        output.store<Config::kTokens, Config::kWarpgroups>(sums, rows.bias, rows.column, row, to.first, to.end);
    };
    run(w, x_map, x_scale, x, begin, write);
}

#endif
