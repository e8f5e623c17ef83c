// Causal grouped-query attention over whole prompts, FlashAttention-2's way (arXiv 2307.08691), with mma.sync.
//
// A block takes one query tile of one head. Each warp has 16 of its queries, keeps their softmax state and outputs in
// registers, and walks the keys in key blocks that begin at multiples of BLOCK_KV of the sequence. What a query sees,
// and in which order it sums, thus depends on its position alone: not on how the prompt was cut or tiled. Compiled for
// one HEAD_DIM of q and k and one VALUE_DIM of v, padded to multiples of 16; with Q_IN_REGISTERS where the fragments of
// q fit there. A block makes PART_DIM columns of the output: where these are not all, as many blocks as there are parts
// go through the same scores.
#include "include/operand.cuh"
#include "include/ptx.cuh"
#include "include/softmax.cuh"

constexpr int kThreads = 32 * WARPS, kBlockQ = 16 * WARPS;
constexpr int kDimSteps = HEAD_DIM / 16, kPartSteps = PART_DIM / 16, kKvFrags = BLOCK_KV / 8;
// An odd number of 16-byte chunks, so that ldmatrix's rows fall into different banks.
constexpr int kRowBytes = HEAD_DIM * 2 + 16, kValueRowBytes = PART_DIM * 2 + 16;
constexpr int kKeyBlockBytes = BLOCK_KV * kRowBytes;
// In shared memory: two stages of a key block of k and one of v; then the query tile, where it is not in registers.
constexpr int kStageBytes = kKeyBlockBytes + BLOCK_KV * kValueRowBytes,
              kSharedBytes = 2 * kStageBytes + (Q_IN_REGISTERS ? 0 : kBlockQ * kRowBytes);
static_assert(HEAD_DIM % 16 == 0 && PART_DIM % 16 == 0 && BLOCK_KV % 16 == 0, "whole mma steps");
static_assert(VALUE_DIM % PART_DIM == 0, "whole parts");
static_assert(HEAD_DIM <= MAX_HEAD_DIM, "what rope.cu writes");
static_assert(THREADS == kThreads, "what the host launches");
static_assert(kSharedBytes <= SHARED_BYTES, "what the host launches with");

// Starts the copies of kColumns columns of kRows rows of q, k or v; rows from valid_rows on become zero.
template <int kRows, int kColumns>
__device__ __forceinline__ void load_rows(uint32_t destination, const half_t* source, uint64_t stride, int valid_rows) {
    constexpr int kChunks = kColumns / 8;
#pragma unroll
    for (int i = 0; i < ceil_div(kRows * kChunks, kThreads); ++i) {
        int copy = i * kThreads + threadIdx.x, row = copy / kChunks, chunk = copy % kChunks;
        if (kRows * kChunks % kThreads != 0 && copy >= kRows * kChunks) break;
        bool valid = row < valid_rows;
        cp_async16(destination + row * (kColumns * 2 + 16) + chunk * 16,
                   source + (valid ? row * stride : 0) + chunk * 8, valid);
    }
}

// q [T, nq, HEAD_DIM], k [tokens, nkv, HEAD_DIM], v [tokens, nkv, VALUE_DIM]: halves, scaled by *q_scale, *k_scale and
// any scale for v. out: an operand in v's scale, rows `out_stride` apart, head h at columns h * value_dim. scale:
// softmax's, for unscaled q and k. window: how many keys a query sees, itself included; 0 for all. softcap: 0 for none.
// sinks: a score of each head, or null.
extern "C" __global__ void __launch_bounds__(kThreads)
    attention(const half_t* q, const half_t* k, const half_t* v, half_t* out, const QueryTile* tiles, int nq, int nkv,
              int value_dim, int out_stride, float scale, const float* q_scale, const float* k_scale, int window,
              float softcap, const float* sinks) {
    begin_kernel();
    extern __shared__ __align__(128) uint8_t shared[];
    QueryTile tile = tiles[blockIdx.y];
    int head = blockIdx.x, kv_head = head / (nq / nkv);
    int first_column = blockIdx.z * PART_DIM;  // of the head's values
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
    uint64_t q_stride = static_cast<uint64_t>(nq) * HEAD_DIM, k_stride = static_cast<uint64_t>(nkv) * HEAD_DIM,
             v_stride = static_cast<uint64_t>(nkv) * VALUE_DIM;
    q += tile.q_row * q_stride + head * HEAD_DIM;
    k += kv_head * HEAD_DIM;
    v += kv_head * VALUE_DIM + first_column;
    uint32_t kv_ring = shared_address(shared), q_tile = kv_ring + 2 * kStageBytes;

    int end_key = tile.end_key(window);
    int first_block = tile.first_key(window) / BLOCK_KV, end_block = ceil_div(end_key, BLOCK_KV);
    auto load_key_block = [&](int index) {
        if (index < end_block) {
            uint32_t stage = kv_ring + index % 2 * kStageBytes;
            int row = tile.key_row(index, BLOCK_KV), valid = end_key - index * BLOCK_KV;
            load_rows<BLOCK_KV, HEAD_DIM>(stage, k + row * k_stride, k_stride, valid);
            load_rows<BLOCK_KV, PART_DIM>(stage + kKeyBlockBytes, v + row * v_stride, v_stride, valid);
        }
        cp_async_commit();
    };

    constexpr int kHeldSteps = Q_IN_REGISTERS ? kDimSteps : 1;
    uint32_t q_fragments[kHeldSteps][4];
    if constexpr (Q_IN_REGISTERS) {
#pragma unroll
        for (int d = 0; d < kDimSteps; ++d)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                int row = warp * 16 + group + r % 2 * 8, column = d * 16 + r / 2 * 8 + pair;
                q_fragments[d][r] =
                    row < tile.rows ? *reinterpret_cast<const uint32_t*>(q + row * q_stride + column) : 0u;
            }
    } else {
        load_rows<kBlockQ, HEAD_DIM>(q_tile, q, q_stride, tile.rows);
    }
    load_key_block(first_block);

    float output[kPartSteps * 2][4] = {};
    Scale to_log2(scale / *q_scale / *k_scale, softcap);
    Softmax softmax;
    int position = tile.position + warp * 16 + group;

    for (int index = first_block; index < end_block; ++index) {
        cp_async_wait<0>();
        __syncthreads();
        load_key_block(index + 1);
        uint32_t k_block = kv_ring + index % 2 * kStageBytes, v_block = k_block + kKeyBlockBytes;

        float scores[kKvFrags][4] = {};
#pragma unroll
        for (int d = 0; d < kDimSteps; ++d) {
            if constexpr (!Q_IN_REGISTERS)
                ldmatrix_x4(q_fragments[0], q_tile + (warp * 16 + lane % 16) * kRowBytes + (2 * d + lane / 16) * 16);
#pragma unroll
            for (int j = 0; j < kKvFrags / 2; ++j) {
                uint32_t b[4];
                ldmatrix_x4(b, k_block + (j * 16 + lane / 16 * 8 + lane % 8) * kRowBytes + (2 * d + lane / 8 % 2) * 16);
                const uint32_t (&a)[4] = q_fragments[Q_IN_REGISTERS ? d : 0];
                mma_m16n8k16(scores[2 * j], a, b[0], b[1]);
                mma_m16n8k16(scores[2 * j + 1], a, b[2], b[3]);
            }
        }

        float (&all_scores)[4 * kKvFrags] = reinterpret_cast<float (&)[4 * kKvFrags]>(scores);
        to_log2.cap(all_scores);
        bool diagonal = (index + 1) * BLOCK_KV > tile.position + warp * 16 + 1;
        bool window_edge = window > 0 && index * BLOCK_KV <= tile.position + warp * 16 + 15 - window;
        int first = index * BLOCK_KV + pair;  // of this thread's columns
        if (BOTH_WAYS || diagonal || window_edge) mask(all_scores, position - first, tile.keys - first, window);
        float correction[2];
        softmax.update(all_scores, to_log2.factor, correction);
#pragma unroll
        for (int d = 0; d < kPartSteps * 2; ++d)
#pragma unroll
            for (int c = 0; c < 4; ++c) output[d][c] *= correction[c / 2];

#pragma unroll
        for (int s = 0; s < BLOCK_KV / 16; ++s) {
            uint32_t p[4] = {pack_half2(scores[2 * s][0], scores[2 * s][1]),
                             pack_half2(scores[2 * s][2], scores[2 * s][3]),
                             pack_half2(scores[2 * s + 1][0], scores[2 * s + 1][1]),
                             pack_half2(scores[2 * s + 1][2], scores[2 * s + 1][3])};
#pragma unroll
            for (int d = 0; d < kPartSteps; ++d) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, v_block + (s * 16 + lane % 16) * kValueRowBytes + (2 * d + lane / 16) * 16);
                mma_m16n8k16(output[2 * d], p, b[0], b[1]);
                mma_m16n8k16(output[2 * d + 1], p, b[2], b[3]);
            }
        }
    }

    float sink = sink_of(sinks, head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float inverse = softmax.inverse_sum(r, to_log2.factor, sink);
        int row = warp * 16 + group + r * 8;
        if (row >= tile.rows) continue;
        half_t* to = out + static_cast<uint64_t>(tile.q_row + row) * out_stride;
#pragma unroll
        for (int d = 0; d < kPartSteps * 2; ++d)
            if (int column = first_column + d * 8 + pair; column < value_dim) {  // value_dim is even
                OperandPair values = operand_pair(output[d][2 * r] * inverse, output[d][2 * r + 1] * inverse);
                store_operand(to, head * value_dim + column, values);
            }
    }
}
