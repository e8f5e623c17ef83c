// Gated DeltaNet (arXiv 2412.06464) in chunks: the part that goes through a sequence's chunks one after another, with
// what delta_prepare.cu has made of each. With the state S [HEAD_DIM, HEAD_DIM] before a chunk:
//     U' = U - W S,    O = diag(e^G) Q S / sqrt(HEAD_DIM) + P U',    S = e^(G_last) S + (diag(e^(G_last - G)) K)^T U'
// The columns of S do not know of one another: a block has SLICE of them, in registers and float32; what the matrix
// units multiply of it are halves.
#include "include/chunk_products.cuh"

constexpr int kDim = HEAD_DIM, kSlice = SLICE, kStages = STAGES;
constexpr int kColumnWarps = kSlice / 32, kThreads = 128 * kColumnWarps;
constexpr int kRow = kDim + 8, kSliceRow = kSlice + 8, kWeightRow = kChunk + 8;  // halves from row to row
constexpr int kW = 0, kQ = kW + kChunk * kRow * 2, kK = kQ + kChunk * kRow * 2, kP = kK + kChunk * kRow * 2;
constexpr int kU = kP + kChunk * kWeightRow * 2, kDecay = kU + kChunk * kSliceRow * 2, kStage = kDecay + kChunk * 4;
constexpr int kState = kStages * kStage, kChange = kState + kDim * kSliceRow * 2;
constexpr int kDecayed = kChange + kChunk * kSliceRow * 2, kShared = kDecayed + kChunk * kSliceRow * 2;
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
    const WarpPlace at;
    const float unit = *v_scale / kChunk;  // S and u are held times this
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

    StateSlice<kDim> state;
    float* kept = states + (static_cast<int64_t>(sequence.from) * value_heads + head) * (kDim * kDim) + first_column;
    state.each(at, [&](int row, int column, float& value) {
        value = sequence.from >= 0 && row < kDim ? kept[row * kDim + column] * unit : 0.0f;
    });

#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load(i);
    if (kStages == 1) load(0);
    for (int index = 0; index < sequence.count; ++index) {
        if (kStages == 1) cp_async_wait<0>();
        else cp_async_wait<(kStages > 1 ? kStages - 2 : 0)>();
        state.hold(at, shared + kState, kSliceRow, state_factor);  // the right side of the products below
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
            load_left(a_w, stage + kW, kRow, at.row * 16, d, at.lane);
            load_left(a_q, stage + kQ, kRow, at.row * 16, d, at.lane);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                load_right(b, base + kState, kSliceRow, at.column + j * 16, d, at.lane);
                multiply_tiles(removed[2 * j], removed[2 * j + 1], a_w, b);
                multiply_tiles(read[2 * j], read[2 * j + 1], a_q, b);
            }
        }
        float last = total[kChunk - 1];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int t = at.row * 16 + at.own_row + 8 * r;
            float to_end = expf(last - total[t]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int place = (t * kSliceRow + at.own_column + 8 * j) * 2;
                uint32_t before = *reinterpret_cast<const uint32_t*>(held + kU + place);
                float low = fmaf(-removed[j][2 * r], unscale_state, half_to_float(static_cast<half_t>(before)));
                float high =
                    fmaf(-removed[j][2 * r + 1], unscale_state, half_to_float(static_cast<half_t>(before >> 16)));
                *reinterpret_cast<uint32_t*>(shared + kChange + place) = pack_half2(low, high);
                *reinterpret_cast<uint32_t*>(shared + kDecayed + place) = pack_half2(low * to_end, high * to_end);
            }
        }
        __syncthreads();

        float given[4][4] = {};  // P U'
        multiply_weights(given, at, stage + kP, kWeightRow, base + kChange, kSliceRow);
        const float scale = rsqrtf(static_cast<float>(kDim));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int t = at.row * 16 + at.own_row + 8 * r;
            if (t < chunk.begin || t >= chunk.count) continue;
            float grown = expf(total[t]) * scale * unscale_state;
            float* out = o + static_cast<int64_t>(chunk.row + t) * (value_heads * kDim) + head * kDim + first_column;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                *reinterpret_cast<float2*>(out + at.own_column + 8 * j) =
                    make_float2(fmaf(read[j][2 * r], grown, given[j][2 * r]) * unscale,
                                fmaf(read[j][2 * r + 1], grown, given[j][2 * r + 1]) * unscale);
        }
        if (chunk.count == kChunk) state.advance(at, expf(last), stage + kK, kRow, base + kDecayed, kSliceRow);
        if (kStages == 1) {
            __syncthreads();
            load(index + 1);
        }
    }
    cp_async_wait<0>();
    if (sequence.to < 0) return;
    kept = states + (static_cast<int64_t>(sequence.to) * value_heads + head) * (kDim * kDim) + first_column;
    state.each(at, [&](int row, int column, float& value) {
        if (row < kDim) kept[row * kDim + column] = value * unscale;
    });
}
