// Causal grouped-query attention over whole prompts on Hopper: FlashAttention with wgmma and the copy engine (arXiv 2407.08608).
//
// A block takes one tile of kBlockQ queries of one head: a warpgroup has 64 of them, keeps their softmax state and outputs in
// registers, and walks the keys in tiles of BLOCK_KV that begin at multiples of BLOCK_KV of the sequence. One more warp has
// the copy engine bring keys and values. While the matrix units multiply a tile's weights by its values, the next tile's
// scores, which were multiplied before, become weights. As in attention_sm80.cu, what a query sees, and in which order it
// sums, depends on its position alone. Compiled for one HEAD_DIM, a multiple of 64.
#include "include/operand.cuh"
#include "include/sm90.cuh"
#include "include/softmax.cuh"

constexpr int kWarpgroups = 2, kBlockQ = 64 * kWarpgroups, kConsumers = 128 * kWarpgroups, kThreads = kConsumers + 128;
constexpr int kPanels = HEAD_DIM / 64;  // of 64 columns, 128 bytes, each
constexpr int kPanelQ = kBlockQ * 128, kPanelKv = BLOCK_KV * 128, kTileBytes = kPanels * kPanelKv;
constexpr int kRing = kPanels * kPanelQ, kBarriers = kRing + 2 * STAGES * kTileBytes;
static_assert(HEAD_DIM % 64 == 0, "whole panels");

struct Ring {  // of tiles of keys or of values, by shared addresses
    uint32_t tiles, full, empty;

    __device__ uint32_t tile(int stage) const { return tiles + stage * kTileBytes; }
};

__device__ __forceinline__ void bring(const Ring& ring, const RingPosition<STAGES>& at, const void* map, int column,
                                      int row) {
    barrier_wait(ring.empty + 8 * at.stage, at.phase ^ 1);
    barrier_arrive_expect(ring.full + 8 * at.stage, kTileBytes);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
        tensor_copy(ring.tile(at.stage) + panel * kPanelKv, map, column + 64 * panel, row, ring.full + 8 * at.stage);
}

__device__ __forceinline__ void give_back(const Ring& ring, const RingPosition<STAGES>& at) {
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty + 8 * at.stage);
}

// As in attention_sm80.cu, but q, k and v by tensor maps: boxes of 64 halves by kBlockQ, BLOCK_KV and BLOCK_KV rows.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention(const void* q_map, const void* k_map, const void* v_map, half_t* out, const Tile* tiles, int nq, int nkv,
              int head_dim, int out_stride, float scale, const float* q_scale, const float* k_scale, int window,
              float softcap, const float* sinks) {
    extern __shared__ __align__(1024) uint8_t shared[];
    uint32_t base = shared_address(shared), barrier = base + kBarriers, q_full = barrier;
    Ring keys = {base + kRing, barrier + 8, barrier + 8 + 8 * STAGES};
    Ring values = {keys.tiles + STAGES * kTileBytes, keys.empty + 8 * STAGES, keys.empty + 16 * STAGES};
    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(keys.full + 8 * i, 1);
            barrier_init(values.full + 8 * i, 1);
            barrier_init(keys.empty + 8 * i, 4 * kWarpgroups);
            barrier_init(values.empty + 8 * i, 4 * kWarpgroups);
        }
        fence_barrier_init();
    }
    __syncthreads();
    begin_kernel();
    Tile tile = tiles[blockIdx.y];
    int head = blockIdx.x;
    int first = window > 0 ? max(0, tile.position - window + 1) : 0;
    int begin = first / BLOCK_KV, end = ceil_div(tile.position + tile.rows, BLOCK_KV);

    if (threadIdx.x >= kConsumers) {
        give_up_registers<24>();
        if (threadIdx.x != kConsumers) return;
        barrier_arrive_expect(q_full, kPanels * kPanelQ);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
            tensor_copy(base + panel * kPanelQ, q_map, head * HEAD_DIM + 64 * panel, tile.q_row, q_full);
        RingPosition<STAGES> at;
        int column = head / (nq / nkv) * HEAD_DIM;
        for (int index = begin; index < end; ++index, at.advance()) {
            int key_row = tile.key_row(index, BLOCK_KV);
            bring(keys, at, k_map, column, key_row);
            bring(values, at, v_map, column, key_row);
        }
        return;
    }
    take_registers<240>();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, pair = lane % 4 * 2;
    uint32_t q = base + threadIdx.x / 128 * (64 * 128);
    Scale to_log2(scale / *q_scale / *k_scale, softcap);
    int position = tile.position + row;

    float scores[BLOCK_KV / 2], output[HEAD_DIM / 2];
    uint32_t weights[BLOCK_KV / 4];
    Softmax softmax;
    RingPosition<STAGES> key_at, value_at;
    auto multiply_keys = [&] {
        barrier_wait(keys.full + 8 * key_at.stage, key_at.phase);
        wgmma_begin();
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; ++d)
            wgmma_f16(scores, wgmma_operand(q + d / 4 * kPanelQ) + d % 4 * 2,
                      wgmma_operand(keys.tile(key_at.stage) + d / 4 * kPanelKv) + d % 4 * 2, d > 0);
        wgmma_commit();
    };
    auto multiply_values = [&](bool accumulate) {
        barrier_wait(values.full + 8 * value_at.stage, value_at.phase);
        wgmma_begin();
#pragma unroll
        for (int s = 0; s < BLOCK_KV / 16; ++s)
            wgmma_f16<true>(output, weights[4 * s], weights[4 * s + 1], weights[4 * s + 2], weights[4 * s + 3],
                            wgmma_operand(values.tile(value_at.stage), kPanelKv) + s * (16 * 128 / 16),
                            accumulate || s > 0);
        wgmma_commit();
    };
    auto done = [&](const Ring& ring, RingPosition<STAGES>& at) {
        give_back(ring, at);
        at.advance();
    };
    // Scores to weights (floats); the factors by which earlier outputs shrink.
    auto weigh = [&](int index, float (&correction)[2]) {
        to_log2.cap(scores);
        int behind = position - index * BLOCK_KV - pair, warp_first = tile.position + warp * 16;
        bool diagonal = (index + 1) * BLOCK_KV > warp_first + 1,
             window_edge = window > 0 && index * BLOCK_KV <= warp_first + 15 - window;
        if (diagonal || window_edge) mask(scores, behind, window);
        softmax.update(scores, to_log2.factor, correction);
    };
    auto pack = [&] {
#pragma unroll
        for (int i = 0; i < BLOCK_KV / 4; ++i) weights[i] = pack_half2(scores[2 * i], scores[2 * i + 1]);
    };

    barrier_wait(q_full, 0);
    multiply_keys();
    wgmma_wait<0>();
    done(keys, key_at);
    float correction[2];
    weigh(begin, correction);
    pack();
    for (int index = begin + 1; index < end; ++index) {
        multiply_keys();
        multiply_values(index > begin + 1);
        wgmma_wait<1>();
        done(keys, key_at);
        weigh(index, correction);
        wgmma_wait<0>();
        done(values, value_at);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= correction[i / 2 % 2];
        pack();
    }
    multiply_values(end > begin + 1);
    wgmma_wait<0>();

    float sink = sink_of(sinks, head);
#pragma unroll
    for (int r = 0; r < 2; ++r, row += 8) {
        float inverse = softmax.inverse_sum(r, to_log2.factor, sink);
        if (row >= tile.rows) continue;
        half_t* to = out + static_cast<uint64_t>(tile.q_row + row) * out_stride;
        // In operand order, a thread's pairs of every other eight columns are neighbours: 16 bytes of each 64 columns.
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; j += j % 2 ? 7 : 1) {
            uint32_t four[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                four[i] = pack_half2(output[4 * (j + 2 * i) + 2 * r] * inverse,
                                     output[4 * (j + 2 * i) + 2 * r + 1] * inverse);
            *reinterpret_cast<uint4*>(to + operand_position(head * HEAD_DIM + 8 * j + pair)) =
                make_uint4(four[0], four[1], four[2], four[3]);
        }
    }
}
