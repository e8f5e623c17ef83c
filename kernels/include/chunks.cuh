// The chunks of sequences that the kernels of Gated DeltaNet (delta_inputs.cu, delta_prepare.cu, delta_scan.cu) go
// through: kChunk positions of a sequence, from a multiple of kChunk on. So what is computed of a position depends on
// the positions before it alone, not on how a prompt was cut.
#pragma once
#include "types.cuh"

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
