// Gated DeltaNet (arXiv 2412.06464) in chunks: the part that goes through a sequence's chunks one after another, with
// what delta_prepare.cu has made of each. With the state S [HEAD_DIM, HEAD_DIM] before a chunk:
//     U' = U - W S,    O = diag(e^G) Q S / sqrt(HEAD_DIM) + P U',    S = e^(G_last) S + (diag(e^(G_last - G)) K)^T U'
// The columns of S do not know of one another: a block has SLICE of them, in registers and float32; what the matrix
// units multiply of it are halves.
#include "include/chunks.cuh"
#include "include/ptx.cuh"

constexpr int kDim = HEAD_DIM, kSlice = SLICE, kStages = STAGES;
constexpr int kColumnWarps = kSlice / 32, kThreads = 128 * kColumnWarps;
constexpr int kRow = kDim + 8, kSliceRow = kSlice + 8, kWeightRow = kChunk + 8;  // halves from row to row
constexpr int kW = 0, kQ = kW + kChunk * kRow * 2, kK = kQ + kChunk * kRow * 2, kP = kK + kChunk * kRow * 2;
constexpr int kU = kP + kChunk * kWeightRow * 2, kDecay = kU + kChunk * kSliceRow * 2, kStage = kDecay + kChunk * 4;
constexpr int kState = kStages * kStage, kChange = kState + kDim * kSliceRow * 2;
constexpr int kDecayed = kChange + kChunk * kSliceRow * 2, kShared = kDecayed + kChunk * kSliceRow * 2;
constexpr int kStateTiles = (kDim + 63) / 64;  // of 16 rows of S that a warp has
static_assert(THREADS == kThreads && kShared <= SHARED_BYTES, "what the host launches with");

// q, k, w, u, p, decay: as delta_prepare has them. state_factor: by what S is multiplied to be halves, where u is
// scaled by *v_scale / kChunk and S is in units of that. states: float32 [states, value_heads, HEAD_DIM, HEAD_DIM].
// Writes o, rows of value_heads * HEAD_DIM values. A block takes a sequence (x) of SLICE columns of a value head (y).
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    delta_scan(const half_t* q, const half_t* k, const half_t* w, const half_t* u, const half_t* p, const float* decay,
               const Chunk* chunks, const Sequence* sequences, int key_heads, int value_heads, int by_turns,
               const float* v_scale, float state_factor, float* states, float* o) {
    begin_kernel();
    extern __shared__ __align__(128) uint8_t shared[];
    constexpr int kSlices = kDim / kSlice;
    uint32_t base = shared_address(shared);
    Sequence sequence = sequences[blockIdx.x];
    int head = blockIdx.y / kSlices, first_column = blockIdx.y % kSlices * kSlice;
    int key_head = by_turns ? head % key_heads : head / (value_heads / key_heads);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp % 4, warp_column = warp / 4 * 32;
    int own_row = lane / 4, own_column = warp_column + lane % 4 * 2;  // of what mma gives, with 8 rows and columns on
    const float unit = *v_scale / kChunk;                             // S and u are held times this
    const float unscale = 1.0f / unit, unscale_state = 1.0f / state_factor;

    auto load = [&](int index) {
        if (index < sequence.count) {
            uint64_t chunk = sequence.first + index, own = chunk * value_heads + head;
            uint32_t stage = base + index % kStages * kStage;
            uint64_t keys = (chunk * key_heads + key_head) * (kChunk * kDim);
            copy_chunk<kThreads>(stage + kW, kRow, w + own * (kChunk * kDim), kDim, kDim);
            copy_chunk<kThreads>(stage + kQ, kRow, q + keys, kDim, kDim);
            copy_chunk<kThreads>(stage + kK, kRow, k + keys, kDim, kDim);
            copy_chunk<kThreads>(stage + kP, kWeightRow, p + own * (kChunk * kChunk), kChunk, kChunk);
            copy_chunk<kThreads>(stage + kU, kSliceRow, u + own * (kChunk * kDim) + first_column, kDim, kSlice);
            if (threadIdx.x < kChunk / 4)
                cp_async16(stage + kDecay + threadIdx.x * 16, decay + own * kChunk + threadIdx.x * 4, true);
        }
        cp_async_commit();
    };

    float state[kStateTiles][4][4];
    auto state_row = [&](int tile, int r) { return (warp_row + 4 * tile) * 16 + own_row + 8 * r; };
    float* kept = states + (static_cast<int64_t>(sequence.from) * value_heads + head) * (kDim * kDim) + first_column;
#pragma unroll
    for (int tile = 0; tile < kStateTiles; ++tile)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                int row = state_row(tile, c / 2), column = own_column + 8 * j + c % 2;
                state[tile][j][c] = sequence.from >= 0 && row < kDim ? kept[row * kDim + column] * unit : 0.0f;
            }

#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load(i);
    if (kStages == 1) load(0);
    for (int index = 0; index < sequence.count; ++index) {
        if (kStages == 1) cp_async_wait<0>();
        else cp_async_wait<(kStages > 1 ? kStages - 2 : 0)>();
        // S as halves, which the products below want as their right side.
#pragma unroll
        for (int tile = 0; tile < kStateTiles; ++tile)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int row = state_row(tile, r);
                if (row >= kDim) continue;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    *reinterpret_cast<uint32_t*>(shared + kState + (row * kSliceRow + own_column + 8 * j) * 2) =
                        pack_half2(state[tile][j][2 * r] * state_factor, state[tile][j][2 * r + 1] * state_factor);
            }
        __syncthreads();  // the stage has come, S is there, and all are done with the chunk before
        if (kStages > 1) load(index + kStages - 1);
        uint32_t stage = base + index % kStages * kStage;
        const uint8_t* held = shared + index % kStages * kStage;
        const float* total = reinterpret_cast<const float*>(held + kDecay);
        Chunk chunk = chunks[sequence.first + index];

        float removed[4][4] = {}, read[4][4] = {};  // W S and Q S
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
            uint32_t a_w[4], a_q[4], b[4];
            uint32_t place = ((warp_row * 16 + lane % 16) * kRow + d * 16 + lane / 16 * 8) * 2;
            ldmatrix_x4(a_w, stage + kW + place);
            ldmatrix_x4(a_q, stage + kQ + place);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t right = ((d * 16 + lane % 16) * kSliceRow + warp_column + j * 16 + lane / 16 * 8) * 2;
                ldmatrix_x4_trans(b, base + kState + right);
                mma_m16n8k16(removed[2 * j], a_w, b[0], b[1]);
                mma_m16n8k16(removed[2 * j + 1], a_w, b[2], b[3]);
                mma_m16n8k16(read[2 * j], a_q, b[0], b[1]);
                mma_m16n8k16(read[2 * j + 1], a_q, b[2], b[3]);
            }
        }
        float last = total[kChunk - 1];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int t = warp_row * 16 + own_row + 8 * r;
            float to_end = expf(last - total[t]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int at = (t * kSliceRow + own_column + 8 * j) * 2;
                uint32_t before = *reinterpret_cast<const uint32_t*>(held + kU + at);
                float low = fmaf(-removed[j][2 * r], unscale_state, half_to_float(static_cast<half_t>(before)));
                float high =
                    fmaf(-removed[j][2 * r + 1], unscale_state, half_to_float(static_cast<half_t>(before >> 16)));
                *reinterpret_cast<uint32_t*>(shared + kChange + at) = pack_half2(low, high);
                *reinterpret_cast<uint32_t*>(shared + kDecayed + at) = pack_half2(low * to_end, high * to_end);
            }
        }
        __syncthreads();

        float given[4][4] = {};  // P U'; what is behind the diagonal is zero
        for (int s = 0; s <= warp_row; ++s) {
            uint32_t a[4], b[4];
            ldmatrix_x4(a, stage + kP + ((warp_row * 16 + lane % 16) * kWeightRow + s * 16 + lane / 16 * 8) * 2);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t right = ((s * 16 + lane % 16) * kSliceRow + warp_column + j * 16 + lane / 16 * 8) * 2;
                ldmatrix_x4_trans(b, base + kChange + right);
                mma_m16n8k16(given[2 * j], a, b[0], b[1]);
                mma_m16n8k16(given[2 * j + 1], a, b[2], b[3]);
            }
        }
        const float scale = rsqrtf(static_cast<float>(kDim));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int t = warp_row * 16 + own_row + 8 * r;
            if (t < chunk.begin || t >= chunk.count) continue;
            float grown = expf(total[t]) * scale * unscale_state;
            float* out = o + static_cast<int64_t>(chunk.row + t) * (value_heads * kDim) + head * kDim + first_column;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                *reinterpret_cast<float2*>(out + own_column + 8 * j) =
                    make_float2(fmaf(read[j][2 * r], grown, given[j][2 * r]) * unscale,
                                fmaf(read[j][2 * r + 1], grown, given[j][2 * r + 1]) * unscale);
        }
        if (chunk.count == kChunk) {
            float kept_share = expf(last);
#pragma unroll
            for (int tile = 0; tile < kStateTiles; ++tile) {
                int row = (warp_row + 4 * tile) * 16;
                if (row >= kDim) continue;
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int c = 0; c < 4; ++c) state[tile][j][c] *= kept_share;
#pragma unroll
                for (int s = 0; s < kChunk / 16; ++s) {
                    uint32_t a[4], b[4];
                    ldmatrix_x4_trans(
                        a, stage + kK + ((s * 16 + lane / 16 * 8 + lane % 8) * kRow + row + lane / 8 % 2 * 8) * 2);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        uint32_t right = ((s * 16 + lane % 16) * kSliceRow + warp_column + j * 16 + lane / 16 * 8) * 2;
                        ldmatrix_x4_trans(b, base + kDecayed + right);
                        mma_m16n8k16(state[tile][2 * j], a, b[0], b[1]);
                        mma_m16n8k16(state[tile][2 * j + 1], a, b[2], b[3]);
                    }
                }
            }
        }
        if (kStages == 1) {
            __syncthreads();
            load(index + 1);
        }
    }
    cp_async_wait<0>();
    if (sequence.to < 0) return;
    kept = states + (static_cast<int64_t>(sequence.to) * value_heads + head) * (kDim * kDim) + first_column;
#pragma unroll
    for (int tile = 0; tile < kStateTiles; ++tile)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                int row = state_row(tile, c / 2), column = own_column + 8 * j + c % 2;
                if (row < kDim) kept[row * kDim + column] = state[tile][j][c] * unscale;
            }
}
