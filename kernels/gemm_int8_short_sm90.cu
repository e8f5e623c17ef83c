// As gemm_int8_sm90.cu's grouped gemm_linear, for experts whose rows are so short that a warpgroup holds its 64 rows of
// W in registers, for all tokens of an output tile.
//
// So of each step only x is read from shared memory, and the two warpgroups of a block, which have 64 rows each, take
// turns: while one multiplies a set of kTokens tokens, the other writes the outputs of what it multiplied before. Both
// read the same tokens, one after the other. A producer thread has the copy engine bring, through one ring of stages, W
// of an output tile and then its tokens, set by set; those of a set stay in the ring until both warpgroups have had
// their turn.
#include "include/epilogue_int8.cuh"
#include "include/int8_tiles_sm90.cuh"

// What the host chose (kqprefill/backends/cuda/gemm/int8_short.py), and the sizes that follow.
struct Config : BlockConfig {
    using Formats = Int8Tiles;
};
constexpr int kSteps = K_STEPS;  // groups of columns
constexpr int kTokens = Config::kTokens, kSharers = Config::kSharers;
constexpr int kStagedTokens = EPILOGUE_BYTES / Config::kWarpgroups / 2 / kStagedBytes;  // of TokenRows' two stages each
constexpr int kStageBytes = kTokens * kRotated;  // of a step of x for a set of tokens, or of W for the block's rows
static_assert(kStageBytes == Config::kBlockTiles * kInt8TileBytes, "stages hold either");
static_assert(Config::kStages >= 2 * kSteps,
              "W of an output tile and its first set of tokens, or a set and the next one");
static_assert(Config::kWarpgroups == 2 && Config::kTiles == 2 && Config::kGrouped && !Config::kGated, "the only shape");

// Which of two warpgroups multiplies: each waits for its turn, and gives the turn to the other.
struct Turns {
    static constexpr int kBytes = 2 * Barrier::kBytes;
    uint32_t barriers, phase = 0;

    __device__ __forceinline__ Barrier of(int warpgroup) const { return {barriers + warpgroup * Barrier::kBytes}; }
    __device__ __forceinline__ void init() const { of(0).init(4), of(1).init(4); }  // a warp's arrivals
    // The first turn is warpgroup 0's: its barrier lets it pass as if a phase had ended.
    __device__ __forceinline__ void wait(int warpgroup) { of(warpgroup).wait(phase ^ warpgroup ^ 1), phase ^= 1; }
    __device__ __forceinline__ void give(int warpgroup) const {
        if (threadIdx.x % 32 == 0) of(warpgroup).arrive();
    }
};

using Stages = Ring<Config::kStages, kStageBytes>;
constexpr int kTurnsOffset = Stages::kBytes + Stages::kBarrierBytes, kHeldOffset = kTurnsOffset + Turns::kBytes;
constexpr int kQueueOffset = kHeldOffset + Barrier::kBytes;
constexpr int kEpilogueOffset = ceil_div(kQueueOffset + TileQueue::kBytes, 1024) * 1024;
static_assert(kEpilogueOffset + EPILOGUE_BYTES <= SHARED_BYTES, "what the host launches with");

__device__ __forceinline__ Stages ring_of_block() {
    uint32_t base = shared_address(block_memory());
    return {base, base + Stages::kBytes};
}
__device__ __forceinline__ Turns turns_of_block() {
    return {shared_address(block_memory()) + kTurnsOffset};
}
// A phase ends when all consumer threads have an output tile's W in registers.
__device__ __forceinline__ Barrier weights_held() {
    return {shared_address(block_memory()) + kHeldOffset};
}
__device__ __forceinline__ TileQueue queue_of_block() {
    return {reinterpret_cast<OutputTile*>(block_memory() + kQueueOffset)};
}

// The work of one thread: it puts output tiles in the queue, and has the copy engine bring W, and then x, set by set.
// Each of a cluster's sharers brings its share of the tokens, for all of them.
__device__ __forceinline__ void produce(const Stages& ring, TileQueue queue, const Matrices& matrices, int row_tiles,
                                        const void* x_map, const Tokens& x) {
    int rank = blockIdx.x % kSharers;
    ProducerPosition<Config::kStages> at;
    uint32_t phase = 0;
    for (OutputTiles outputs(x, row_tiles); outputs.more(); outputs.next(), phase ^= 1) {
        OutputTile output = OutputTile::of(outputs);
        int first = output.row_tile(row_tiles, 0), tiles = max(0, min(Config::kBlockTiles, row_tiles - first));
        const uint8_t* weights = row_tile<Config>(matrices, first, kSteps, output.expert).weights;
        ring.wait_until_finished(at);
        queue.put(output);
#pragma unroll 1
        for (int step = 0; step < kSteps; ++step, at.advance()) {
            Barrier arrived = ring.begin_filling(at, tiles * kInt8TileBytes);
            for (int i = 0; i < tiles; ++i)
                bulk_copy(ring.stage(at.stage) + i * kInt8TileBytes, weights + (i * kSteps + step) * kInt8TileBytes,
                          kInt8TileBytes, arrived, false);
        }
#pragma unroll 1
        for (int token = output.first; token < output.end; token += kTokens) {
            if (token == output.first + kTokens) weights_held().wait(phase);  // the ring is full of W and a set
#pragma unroll 1
            for (int step = 0; step < kSteps; ++step, at.advance()) {
                Barrier arrived = ring.begin_filling(at, kStageBytes);
                tensor_copy_to<kSharers>(ring.stage(at.stage) + rank * (kStageBytes / kSharers), x_map, step * kRotated,
                                         token + rank * (kTokens / kSharers), arrived);
            }
        }
        if (output.end - output.first <= kTokens) weights_held().wait(phase);
    }
}

// A thread of a consumer warpgroup.
struct Consumer {
    const Stages& ring;
    int warpgroup;
    Turns turns;
    ConsumerPosition<Config::kStages> at;
    uint32_t w[kSteps][4][4];  // of 32 columns each

    // Takes its rows of an output tile's W, as wgmma wants a in registers.
    __device__ __forceinline__ void load_weights() {
        int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;  // a warp has two atoms
        ConsumerPosition<Config::kStages> done = at;
#pragma unroll
        for (int step = 0; step < kSteps; ++step, at.advance()) {
            ring.wait_until_arrived(at);
            uint32_t from = ring.stage(at.stage) + row * kRotated;
#pragma unroll
            for (int k32 = 0; k32 < 4; ++k32) ldmatrix_x4(w[step][k32], from + ((2 * k32 + lane / 16) ^ row % 8) * 16);
        }
        finish_loads();
        weights_held().arrive();
        __syncwarp();
#pragma unroll
        for (int step = 0; step < kSteps; ++step, done.advance()) ring.release_by_warp<kSharers>(done.stage);
    }

    // acc = W · Xᵀ of a set, or of so many of its first tokens.
    template <int kMultiplied>
    __device__ __forceinline__ void multiply(int (&all)[kTokens / 2]) {
        int (&acc)[kMultiplied / 2] = reinterpret_cast<int (&)[kMultiplied / 2]>(all);
        turns.wait(warpgroup);
#pragma unroll
        for (int step = 0; step < kSteps; ++step, at.advance()) {
            ring.wait_until_arrived(at);
            uint64_t x = wgmma_operand(ring.stage(at.stage));
            wgmma_begin();
#pragma unroll
            for (int k32 = 0; k32 < 4; ++k32) wgmma_s8(acc, w[step][k32], x + 2 * k32, step > 0 || k32 > 0);
            wgmma_commit();
            if (step + 1 == kSteps) turns.give(warpgroup ^ 1);
            if (step == 0) continue;
            wgmma_wait<1>();  // the step before this is done with
            ring.release_by_warp<kSharers>(at.previous());
        }
        wgmma_wait<0>();
        ring.release_by_warp<kSharers>(at.previous());
    }
};

// out[m, n] = *out_scale * (sums * scales + bias), halves, or IN_BLOCKS (output_blocks.cuh), with rows `ldo` apart, for
// each group of x's rows by the matrix of its expert; w0, scales0: a stack of them, of rows0 rows each. bias, [rows0]
// for each expert, may be null.
extern "C" __global__ void __cluster_dims__(Config::kCluster, 1, 1) __launch_bounds__(Config::kThreads, 1)
    gemm_linear(const int8_t* w0, const float* scales0, int rows0, const void* x_map, const float* x_scale, int m,
                void* out, int ldo, const float* out_scale, const float* bias, const Group* groups,
                const int* group_count) {
    constexpr int kConsumers = Config::kConsumers;
    Matrices matrices = {{reinterpret_cast<const uint8_t*>(w0), nullptr, nullptr}, {rows0, 0, 0}, {0, 0, 0}};
    int row_tiles = ceil_div(rows0, kTileRows);
    Tokens x = {m, groups, group_count};
    Stages ring = ring_of_block();
    if (threadIdx.x == 0) {
        ring.init(1, 4 * Config::kWarpgroups * kSharers);
        turns_of_block().init();
        weights_held().init(Config::kConsumers);
        fence_barrier_init();
    }
    sync_blocks<Config::kCluster>();
    if (threadIdx.x < kConsumers) {
        take_registers<Config::kConsumerRegisters>();
        begin_kernel();
        int warp = threadIdx.x / 32 % 4, slot = threadIdx.x % 32 / 4, own = threadIdx.x / 128 * Config::kTiles;
        Consumer consumer = {ring, static_cast<int>(threadIdx.x) / 128, turns_of_block()};
        TileQueue queue = queue_of_block();
        float factor = *out_scale;  // a power of two
        for (int left = OutputTiles(x, row_tiles).more() ? 1 : 0; left > 0;) {
            ring.wait_until_arrived(consumer.at);
            OutputTile to = queue.get<kSharers>();
            queue.next();
            left = to.left;
            RowTile tile = row_tile<Config>(matrices, to.row_tile(row_tiles, own + warp / 2), kSteps, to.expert);
            float scale[2], row_bias[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int row = int8_row(warp % 2 * 16 + 8 * i + slot);
                bool there = row < tile.rows;
                scale[i] = load_where(there, scales0 + to.expert * rows0 + tile.column + row, 0.0f) * factor;
                row_bias[i] = Biases{to.expert, rows0, tile.column + row, there}.of(bias) * factor;
            }
            int column = to.row_tile(row_tiles, own) * kTileRows;
            ExpertOutput<kTokens, RowOrder::kAtoms, kStagedTokens, IN_BLOCKS> output = {
                out, ldo, rows0, column, Config::kTiles, block_memory() + kEpilogueOffset};
            consumer.load_weights();
#pragma unroll 1
            for (int token = to.first; token < to.end; token += kTokens) {
                AllScales<kTokens> scales(x_scale + token);
                int acc[kTokens / 2];
                clear(acc);  // else the first wgmma, which does not read them, would have the last set's kept
                if (to.end - token <= kTokens / 2) consumer.multiply<kTokens / 2>(acc);
                else consumer.multiply<kTokens>(acc);
                output.store(Int8Sums<kTokens, AllScales<kTokens>>{acc, scale, scales}, row_bias, token, to.end);
            }
        }
    } else {
        give_up_registers<Config::kProducerRegisters>();
        if (threadIdx.x == kConsumers) {
            begin_kernel();
            produce(ring, queue_of_block(), matrices, row_tiles, x_map, x);
        }
        __syncwarp();
    }
    if (Config::kCluster > 1)
        cluster_sync();  // until then others may write to this block's shared memory and arrive at its barriers
}
