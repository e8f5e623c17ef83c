// Mamba-2 (arXiv 2405.21060) in chunks, on the matrix units. With rows for positions, G the sums of step * rate up to
// each, U = step * x, and the state S [STATE, head_dim] before a chunk:
//     P = the part up to the diagonal of  C B^T * D,  D[t][s] = e^(G_t - G_s)
//     O = diag(e^G) C S + P U,    S = e^(G_last) S + (diag(e^(G_last - G)) B)^T U
// mamba_prepare makes P, for all chunks at once; mamba_scan goes through a sequence's chunks one after another. The
// columns of S do not know of one another: a block has SLICE of them, in registers and float32; what the matrix units
// multiply of it are halves.
#include "include/chunk_products.cuh"

constexpr int kState = STATE, kSlice = SLICE, kStages = STAGES;
constexpr int kColumnWarps = kSlice / 32, kThreads = 128 * kColumnWarps;
constexpr int kRow = kState + 8, kSliceRow = kSlice + 8, kWeightRow = kChunk + 8;  // halves from row to row
constexpr int kC = 0, kB = kC + kChunk * kRow * 2, kP = kB + kChunk * kRow * 2, kU = kP + kChunk * kWeightRow * 2;
constexpr int kDecay = kU + kChunk * kSliceRow * 2, kStage = kDecay + kChunk * 4;
constexpr int kHeld = kStages * kStage, kDecayed = kHeld + kState * kSliceRow * 2;
constexpr int kShared = kDecayed + kChunk * kSliceRow * 2;
static_assert(THREADS == kThreads && kShared <= SHARED_BYTES, "what the host launches with");
static_assert(kState % 16 == 0 && kSlice % 32 == 0, "whole steps of mma");

// P, and O, in units of halves: what C B^T is divided by, a power of two that is STATE * 2^15 or more.
__device__ __forceinline__ float weight_unit() {
    int exponent = 15;
    while ((1 << (exponent - 15)) < kState) ++exponent;
    return bits_to_float(static_cast<uint32_t>(127 - exponent) << 23);
}

// b, c: [chunks, groups, kChunk, STATE] times their scales; decay: G [chunks, heads, kChunk]. Writes p [chunks, heads,
// kChunk, kChunk], times weight_unit. A block takes a chunk (x) of a head (y).
extern "C" __global__ void __launch_bounds__(kThreads)
    mamba_prepare(const half_t* b, const half_t* c, const float* decay, int heads, int groups, half_t* p) {
    begin_kernel();
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t base = shared_address(shared);
    int head = blockIdx.y, group = head / (heads / groups);
    uint64_t own = static_cast<uint64_t>(blockIdx.x) * heads + head;
    uint64_t rows = (static_cast<uint64_t>(blockIdx.x) * groups + group) * (kChunk * kState);
    copy_chunk<kThreads>(base + kC, kRow, c + rows, kState, kState);
    copy_chunk<kThreads>(base + kB, kRow, b + rows, kState, kState);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
    if (row0 >= kChunk) return;
    float acc[kChunk / 8][4] = {};
    multiply_by_rows<kState>(acc, base + kC, base + kB, kRow, row0, lane);
    const float* total = decay + own * kChunk;
    const float unit = weight_unit();
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int t = row0 + lane / 4 + 8 * r, s = 8 * j + lane % 4 * 2;
            float value[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)  // masked first: e^(G_t - G_s) of a later s could overflow
                value[i] = s + i <= t ? unit * expf(total[t] - total[s + i]) * acc[j][2 * r + i] : 0.0f;
            *reinterpret_cast<uint32_t*>(p + own * (kChunk * kChunk) + t * kChunk + s) = pack_half2(value[0], value[1]);
        }
}

// u: [chunks, heads, kChunk, padded]; b, c, p, decay as above; scales: as mamba_scales makes them. states: float32
// [states, heads, STATE, head_dim]. Adds to o, rows of heads * head_dim values. A block takes a sequence (x) and SLICE
// columns of a head (y).
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    mamba_scan(const half_t* u, const half_t* b, const half_t* c, const half_t* p, const float* decay,
               const Chunk* chunks, const Sequence* sequences, int heads, int groups, int head_dim, int padded,
               const float* scales, float* states, float* o) {
    begin_kernel();
    extern __shared__ __align__(128) uint8_t shared[];
    uint32_t base = shared_address(shared);
    Sequence sequence = sequences[blockIdx.x];
    int slices = padded / kSlice, head = blockIdx.y / slices, first_column = blockIdx.y % slices * kSlice;
    int group = head / (heads / groups);
    const WarpPlace at;
    const float unit = scales[0] * scales[1], state_factor = scales[3];  // S is held times unit
    const float of_state = 1.0f / (scales[2] * unit * state_factor),
                of_weights = 1.0f / (scales[2] * unit * weight_unit());

    // What the outputs are made of; and B, which only the new state is.
    auto load_most = [&](int index) {
        if (index >= sequence.count) return;
        uint64_t chunk = sequence.first + index, own = chunk * heads + head;
        uint32_t stage = base + index % kStages * kStage;
        copy_chunk<kThreads>(stage + kC, kRow, c + (chunk * groups + group) * (kChunk * kState), kState, kState);
        copy_chunk<kThreads>(stage + kP, kWeightRow, p + own * (kChunk * kChunk), kChunk, kChunk);
        copy_chunk<kThreads>(stage + kU, kSliceRow, u + own * (kChunk * padded) + first_column, padded, kSlice);
        if (threadIdx.x < kChunk / 4)
            cp_async16(stage + kDecay + threadIdx.x * 16, decay + own * kChunk + threadIdx.x * 4, true);
    };
    auto load_b = [&](int index) {
        if (index < sequence.count)
            copy_chunk<kThreads>(
                base + index % kStages * kStage + kB, kRow,
                b + ((sequence.first + index) * static_cast<uint64_t>(groups) + group) * (kChunk * kState), kState,
                kState);
        cp_async_commit();
    };
    auto load = [&](int index) {
        load_most(index);
        load_b(index);
    };

    StateSlice<kState> state;
    auto inside = [&](int row, int column) { return row < kState && first_column + column < head_dim; };
    float* kept = states + (static_cast<int64_t>(sequence.from) * heads + head) * (kState * head_dim) + first_column;
    state.each(at, [&](int row, int column, float& value) {
        value = sequence.from >= 0 && inside(row, column) ? kept[row * head_dim + column] * unit : 0.0f;
    });

#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) load(i);
    if (kStages == 1) load(0);
    for (int index = 0; index < sequence.count; ++index) {
        if (kStages == 1) cp_async_wait<0>();
        else cp_async_wait<(kStages > 1 ? kStages - 2 : 0)>();
        state.hold(at, shared + kHeld, kSliceRow, state_factor);  // the right side of the products below
        __syncthreads();  // the stage has come, S is there, and all are done with the chunk before
        if (kStages > 1) load(index + kStages - 1);
        uint32_t stage = base + index % kStages * kStage;
        const uint8_t* held = shared + index % kStages * kStage;
        const float* total = reinterpret_cast<const float*>(held + kDecay);
        Chunk chunk = chunks[sequence.first + index];
        float last = total[kChunk - 1];

        // U decayed to the chunk's end, for the new state.
        for (int i = threadIdx.x; i < kChunk * kSlice / 2; i += kThreads) {
            int t = i / (kSlice / 2), place = (t * kSliceRow + i % (kSlice / 2) * 2) * 2;
            uint32_t pair = *reinterpret_cast<const uint32_t*>(held + kU + place);
            float to_end = expf(last - total[t]);
            *reinterpret_cast<uint32_t*>(shared + kDecayed + place) =
                pack_half2(half_to_float(static_cast<half_t>(pair)) * to_end,
                           half_to_float(static_cast<half_t>(pair >> 16)) * to_end);
        }

        float read[4][4] = {}, given[4][4] = {};  // C S and P U
#pragma unroll
        for (int d = 0; d < kState / 16; ++d) {
            uint32_t left[4], right[4];
            load_left(left, stage + kC, kRow, at.row * 16, d, at.lane);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                load_right(right, base + kHeld, kSliceRow, at.column + j * 16, d, at.lane);
                multiply_tiles(read[2 * j], read[2 * j + 1], left, right);
            }
        }
        multiply_weights(given, at, stage + kP, kWeightRow, stage + kU, kSliceRow);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int t = at.row * 16 + at.own_row + 8 * r;
            if (t < chunk.begin || t >= chunk.count) continue;
            float grown = expf(total[t]) * of_state;
            float* out = o + static_cast<int64_t>(chunk.row + t) * (heads * head_dim) + head * head_dim + first_column;
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int column = at.own_column + 8 * j + i;
                    // The L2 cache adds: each output once, and no load is waited for.
                    if (first_column + column < head_dim)
                        reduce_add(out + column, fmaf(read[j][2 * r + i], grown, given[j][2 * r + i] * of_weights));
                }
        }
        __syncthreads();  // the decayed U is there, and of the stage only B is still to be read
        if (kStages == 1) load_most(index + 1);
        if (chunk.count == kChunk) state.advance(at, expf(last), stage + kB, kRow, base + kDecayed, kSliceRow);
        if (kStages == 1) {
            __syncthreads();
            load_b(index + 1);
        }
    }
    cp_async_wait<0>();
    if (sequence.to < 0) return;
    kept = states + (static_cast<int64_t>(sequence.to) * heads + head) * (kState * head_dim) + first_column;
    state.each(at, [&](int row, int column, float& value) {
        if (inside(row, column)) kept[row * head_dim + column] = value / unit;
    });
}
