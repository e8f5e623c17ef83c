// Causal grouped-query attention over whole prompts on Hopper: FlashAttention with wgmma and the copy engine
// (arXiv 2407.08608).
//
// A block takes one query tile of kBlockQ queries of one head. Each of two consumer warpgroups has 64 of these queries,
// keeps their softmax state and outputs in registers, and walks the keys in key blocks that begin at multiples of
// BLOCK_KV of the sequence. A producer warp has the copy engine bring keys and values. While the matrix units multiply
// one key block's weights by its values, the scores of the next, which were multiplied before, become weights. As in
// attention_sm80.cu, what a query sees, and in which order it sums, depends on its position alone. Compiled for one
// HEAD_DIM of q and k and one VALUE_DIM of v, multiples of 64. A block makes PART_DIM columns of the output: where
// these are not all, as many blocks as there are parts go through the same scores. The CLUSTER blocks of a cluster have
// neighbouring heads of q, which have the same keys and values: each block brings its share of these to all of them.
#include "include/operand.cuh"
#include "include/sm90.cuh"
#include "include/softmax.cuh"

constexpr int kWarpgroups = 2, kBlockQ = 64 * kWarpgroups, kConsumers = 128 * kWarpgroups, kThreads = kConsumers + 128;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;      // of a thread
constexpr int kPanels = HEAD_DIM / 64, kValuePanels = PART_DIM / 64;  // of 64 columns (128 bytes) each
constexpr int kPanelQ = kBlockQ * 128, kPanelKv = BLOCK_KV * 128;     // bytes
constexpr int kOwnRows = BLOCK_KV / CLUSTER;                          // of a key block, that a block brings
using KeyRing = Ring<STAGES, kPanels * kPanelKv>;                     // a stage is a key block of k
using ValueRing = Ring<STAGES, kValuePanels * kPanelKv>;              // or, of v, the block's columns
// In shared memory: the query tile, a ring of k and one of v; then the query tile's barrier and the rings'.
constexpr int kRings = kPanels * kPanelQ, kBarriers = kRings + KeyRing::kBytes + ValueRing::kBytes;
static_assert(HEAD_DIM % 64 == 0 && PART_DIM % 64 == 0 && VALUE_DIM % PART_DIM == 0, "whole panels");
static_assert(HEAD_DIM <= MAX_HEAD_DIM, "what rope.cu writes");
static_assert(THREADS == kThreads, "what the host launches");
static_assert(kBarriers + Barrier::kBytes + KeyRing::kBarrierBytes + ValueRing::kBarrierBytes <= SHARED_BYTES,
              "what the host launches with");

template <int kStageBytes>
__device__ __forceinline__ void load_key_block(const Ring<STAGES, kStageBytes>& ring,
                                               const ProducerPosition<STAGES>& at, const void* map, int column,
                                               int row) {
    Barrier arrived = ring.begin_filling(at, kStageBytes);
    uint32_t to = ring.stage(at.stage) + blockIdx.x % CLUSTER * (kOwnRows * 128);
#pragma unroll
    for (int panel = 0; panel < kStageBytes / kPanelKv; ++panel)
        tensor_copy_to<CLUSTER>(to + panel * kPanelKv, map, column + 64 * panel, row, arrived);
}

// A consumer warp has finished with a key block.
template <int kStageBytes>
__device__ __forceinline__ void release(const Ring<STAGES, kStageBytes>& ring, ConsumerPosition<STAGES>& at) {
    ring.template release_by_warp<CLUSTER>(at.stage);
    at.advance();
}

// As in attention_sm80.cu, but q, k and v come by tensor maps: boxes of 64 halves by kBlockQ, kOwnRows and kOwnRows
// rows.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(kThreads, 1)
    attention(const void* q_map, const void* k_map, const void* v_map, half_t* out, const QueryTile* tiles, int nq,
              int nkv, int value_dim, int out_stride, float scale, const float* q_scale, const float* k_scale,
              int window, float softcap, const float* sinks) {
    extern __shared__ __align__(1024) uint8_t shared[];
    uint32_t base = shared_address(shared), barriers = base + kBarriers + Barrier::kBytes;
    Barrier q_arrived = {base + kBarriers};
    KeyRing keys = {base + kRings, barriers};
    ValueRing values = {keys.stages + KeyRing::kBytes, keys.barriers + KeyRing::kBarrierBytes};
    if (threadIdx.x == 0) {
        q_arrived.init(1);
        for (int i = 0; i < STAGES; ++i) {  // a consumer warp arrives once
            keys.arrived(i).init(1);
            values.arrived(i).init(1);
            keys.finished(i).init(4 * kWarpgroups * CLUSTER);
            values.finished(i).init(4 * kWarpgroups * CLUSTER);
        }
        fence_barrier_init();
    }
    QueryTile tile = tiles[blockIdx.y];  // only uploads write these, too
    if (threadIdx.x == kConsumers) prefetch_map(q_map), prefetch_map(k_map), prefetch_map(v_map);
    sync_blocks<CLUSTER>();
    begin_short_kernel();
    int head = blockIdx.x, first_column = blockIdx.z * PART_DIM;  // of the head's values
    int first_block = tile.first_key(window) / BLOCK_KV, end_block = ceil_div(tile.end_key(window), BLOCK_KV);

    if (threadIdx.x >= kConsumers) {
        give_up_registers<kProducerRegisters>();
        if (threadIdx.x != kConsumers) return;
        q_arrived.arrive_expecting(kPanels * kPanelQ);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
            tensor_copy(base + panel * kPanelQ, q_map, head * HEAD_DIM + 64 * panel, tile.q_row, q_arrived);
        ProducerPosition<STAGES> at;
        int kv_head = head / (nq / nkv);
        for (int index = first_block; index < end_block; ++index, at.advance()) {
            int key_row = tile.key_row(index, BLOCK_KV) + blockIdx.x % CLUSTER * kOwnRows;
            load_key_block(keys, at, k_map, kv_head * HEAD_DIM, key_row);
            load_key_block(values, at, v_map, kv_head * VALUE_DIM + first_column, key_row);
        }
        if (CLUSTER > 1) cluster_sync_by_thread();
        return;
    }
    take_registers<kConsumerRegisters>();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, pair = lane % 4 * 2;
    uint32_t q = base + threadIdx.x / 128 * (64 * 128);
    Scale to_log2(scale / *q_scale / *k_scale, softcap);
    int position = tile.position + row;

    float scores[BLOCK_KV / 2], output[PART_DIM / 2];
    uint32_t weights[BLOCK_KV / 4];
    Softmax softmax;
    ConsumerPosition<STAGES> key_at, value_at;
    auto multiply_keys = [&] {
        keys.wait_until_arrived(key_at);
        wgmma_begin();
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d)
            wgmma_f16(scores, wgmma_operand(q + d / 4 * kPanelQ) + d % 4 * 2,
                      wgmma_operand(keys.stage(key_at.stage) + d / 4 * kPanelKv) + d % 4 * 2, d > 0);
        wgmma_commit();
    };
    auto multiply_values = [&](bool accumulate) {
        values.wait_until_arrived(value_at);
        wgmma_begin();
#pragma unroll
        for (int s = 0; s < BLOCK_KV / 16; ++s)
            wgmma_f16<true>(output, weights[4 * s], weights[4 * s + 1], weights[4 * s + 2], weights[4 * s + 3],
                            wgmma_operand(values.stage(value_at.stage), kPanelKv) + s * (16 * 128 / 16),
                            accumulate || s > 0);
        wgmma_commit();
    };
    // Makes weights (floats) of a key block's scores; correction: the factors by which earlier outputs shrink. Returns
    // whether any of the warp's do.
    auto weigh = [&](int index, float (&correction)[2]) {
        to_log2.cap(scores);
        int behind = position - index * BLOCK_KV - pair, warp_first = tile.position + warp * 16;
        bool diagonal = (index + 1) * BLOCK_KV > warp_first + 1,
             window_edge = window > 0 && index * BLOCK_KV <= warp_first + 15 - window;
        if (BOTH_WAYS || diagonal || window_edge) mask(scores, behind, tile.keys - index * BLOCK_KV - pair, window);
        return softmax.update(scores, to_log2.factor, correction);
    };
    auto pack = [&] {
#pragma unroll
        for (int i = 0; i < BLOCK_KV / 4; ++i) weights[i] = pack_half2(scores[2 * i], scores[2 * i + 1]);
    };

    q_arrived.wait(0);
    multiply_keys();
    wgmma_wait<0>();
    release(keys, key_at);
    float correction[2];
    weigh(first_block, correction);
    pack();
    for (int index = first_block + 1; index < end_block; ++index) {
        multiply_keys();
        multiply_values(index > first_block + 1);
        wgmma_wait<1>();  // the scores are there; the values are still being multiplied
        release(keys, key_at);
        // The softmax is to run while the values are multiplied. ptxas moves a wait for these up, before the softmax,
        // but not across a branch: so both waits stand behind this one.
        if (weigh(index, correction)) {
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < PART_DIM / 2; ++i) output[i] *= correction[i / 2 % 2];
        }
        wgmma_wait<0>();
        release(values, value_at);
        pack();
    }
    multiply_values(end_block > first_block + 1);
    wgmma_wait<0>();

    float sink = sink_of(sinks, head);
#pragma unroll
    for (int r = 0; r < 2; ++r, row += 8) {
        float inverse = softmax.inverse_sum(r, to_log2.factor, sink);
        if (row >= tile.rows) continue;
        half_t* to = out + static_cast<uint64_t>(tile.q_row + row) * out_stride;
        // A thread has a pair of each 8 columns. In operand order, those of every other 8 are neighbours: of each 64
        // columns, j = 0, 2, 4, 6 are 16 bytes, and j = 1, 3, 5, 7 another 16.
#pragma unroll
        for (int j = 0; j < PART_DIM / 8; j += j % 2 ? 7 : 1) {
            int column = head * VALUE_DIM + first_column + 8 * j + pair;
            OperandPair pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                pairs[i] = operand_pair(output[4 * (j + 2 * i) + 2 * r] * inverse,
                                        output[4 * (j + 2 * i) + 2 * r + 1] * inverse);
            store_operand(to, column, pairs);
        }
    }
    // Until then others may write to this block's shared memory, and arrive at its barriers.
    if (CLUSTER > 1) __syncwarp(), cluster_sync();
}
