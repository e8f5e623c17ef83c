// The chunks of sequences that the kernels of Gated DeltaNet (delta_inputs.cu, delta_prepare.cu, delta_scan.cu) go
// through: kChunk positions of a sequence, from a multiple of kChunk on. So what is computed of a position depends on
// the positions before it alone, not on how a prompt was cut.
#pragma once
#include "ptx.cuh"

constexpr int kChunk = DELTA_CHUNK;
static_assert(kChunk == 64, "four warps have 16 rows each");

// A chunk (made by the host, of a segment of a batch). Its positions are numbered from 0; those before `begin`, which
// may be negative, came before the segment, and are gone through again. Rows are of the sums of the segment's matrices.
struct Chunk {
    int row;           // where position 0 would be by the rows of the segment itself
    int before_row;    // where it is by the rows of what came before the segment
    int begin, count;  // the segment's positions are begin .. count - 1
    int behind;        // positions of the sequence before this chunk

    __device__ int row_of(int position) const { return (position >= begin ? row : before_row) + position; }
};

// A sequence's part of a batch (made by the host): chunks first .. first + count - 1, from state `from` (zeros where
// that is -1), which becomes state `to` (if it is not -1) after the last whole chunk.
struct Sequence {
    int first, count, from, to;
};

// Starts the copies of a chunk's rows of `columns` halves, `from_row` apart, to shared memory, `to_row` apart.
template <int kThreads>
__device__ __forceinline__ void copy_chunk(uint32_t to, int to_row, const half_t* from, int from_row, int columns) {
    int pieces = columns / 8;
    for (int i = threadIdx.x; i < kChunk * pieces; i += kThreads) {
        int row = i / pieces, piece = i % pieces * 8;
        cp_async16(to + (row * to_row + piece) * 2, from + row * from_row + piece, true);
    }
}

// A causal convolution of kTaps taps over rows first .. first + kRows - 1 of a chunk, in one channel: use(row, added +
// the sum). load(position) gives a value, of positions before the chunk, too; kAhead of them are on their way at a
// time.
template <int kTaps, int kRows, int kAhead, class Load, class Use>
__device__ __forceinline__ void convolve(const float* taps, float added, int first, Load load, Use use) {
    static_assert(kRows % kAhead == 0, "rows in whole steps");
    float tap[kTaps], window[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) tap[j] = taps[j];
#pragma unroll
    for (int j = 1; j < kTaps; ++j) window[j] = load(first - kTaps + j);
    for (int row = first; row < first + kRows; row += kAhead) {
        float next[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) next[i] = load(row + i);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
            for (int j = 1; j < kTaps; ++j) window[j - 1] = window[j];
            window[kTaps - 1] = next[i];
            float sum = added;
#pragma unroll
            for (int j = 0; j < kTaps; ++j) sum = fmaf(tap[j], window[j], sum);
            use(row + i, sum);
        }
    }
}
