// How outputs of a transposed product (Yᵀ) leave a block: through shared memory, so that memory gets runs of 32 bytes
// and more of a token's row, not a few bytes of many rows.
//
// wgmma leaves a thread with pairs of neighbouring tokens, each of one row of Yᵀ. A matrix of 8 such rows by 8 tokens,
// as halves, is turned over by stmatrix: each token's 8 values become a piece of 16 bytes. The pieces of some tokens
// are staged, and then other threads copy them to where they belong.
#pragma once
#include "operand.cuh"
#include "sm90.cuh"

// Staged tokens: 128 bytes each, eight pieces; neighbouring tokens have the same piece in different banks.
struct StagedTokens {
    static constexpr int kTokenBytes = 128;
    uint8_t* memory;  // shared

    __device__ __forceinline__ int offset(int token, int piece) const {
        return token * kTokenBytes + (piece ^ token % 8) * 16;
    }
    // Stores four matrices of 8 rows by 8 tokens, of which each lane has the pairs of its row (lane / 4) and tokens
    // (lane % 4 * 2 and the next). A lane tells where one matrix' piece of one token goes: of matrix lane / 8 and its
    // token lane % 8. All lanes of a warp call this.
    __device__ __forceinline__ void store(int token, int piece, const uint32_t (&pairs)[4]) const {
        store_matrices(shared_address(memory + offset(token, piece)), pairs);
    }
    template <class T>
    __device__ __forceinline__ T load(int token, int piece, int byte = 0) const {
        return *reinterpret_cast<const T*>(memory + offset(token, piece) + byte);
    }
};

// How the 64 rows of Yᵀ that a warpgroup has, of two row tiles, lie in its warps.
enum class RowOrder {
    kPlain,   // warp w has rows 8w to 8w + 7 of the first tile, and of the second
    kPaired,  // int8: warp w has the rows of atom w (int8.cuh) of the first tile, and of the second
    kAtoms,   // int8: warps 0 and 1 have two atoms each of the first tile, warps 2 and 3 of the second
};

// Writes a warpgroup's outputs of a token tile: for each token 32 columns of each of its two row tiles.
template <int kTokens, RowOrder kOrder>
struct TokenRows {
    static constexpr int kStagedTokens = 16, kStageBytes = kStagedTokens * StagedTokens::kTokenBytes;
    static constexpr int kBytes = 2 * kStageBytes;  // of shared memory of a warpgroup: two stages, which take turns
    // Half of the threads copy what is staged, in turns with the other half. Of each stage one has so many tokens.
    static constexpr int kOwn = kOrder == RowOrder::kPlain ? 2 : 1;
    static_assert(kTokens % kStagedTokens == 0, "whole stages");

    uint8_t* memory;  // kBytes of shared memory
    int barrier;      // for the warpgroup's threads
    int thread = thread_here();

    // The i-th of the kOwn tokens that a thread copies of stage number `stage` of the tile, if it is among those that
    // copy it; else it is a token that others copy.
    __device__ __forceinline__ int token(int stage, int i) const {
        return stage * kStagedTokens + thread % 64 / (kOrder == RowOrder::kPlain ? 8 : 4) + 8 * i;
    }

    // Calls make(j, pairs) for each batch j of 8 tokens, in turn, which gives the thread's pair of tokens of its first
    // row and of its second; and write(stage, i, t, column, eight) for what a thread copies: of its token (stage, i)
    // eight columns of row tile t, of which the first has this number. All threads of the warpgroup call this.
    template <class Make, class Write>
    __device__ __forceinline__ void store(Make make, Write write) const {
        int lane = thread % 32, warp = thread / 32 % 4, row = lane / 8 % 2;
        int piece = kOrder == RowOrder::kAtoms ? 2 * warp + row : 4 * row + warp;
#pragma unroll
        for (int stage = 0; stage < kTokens / kStagedTokens; ++stage) {
            uint32_t pairs[2][2];
            make(2 * stage, pairs[0]);
            make(2 * stage + 1, pairs[1]);
            StagedTokens staged = {memory + stage % 2 * kStageBytes};
            staged.store(lane / 16 * 8 + lane % 8, piece, {pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]});
            sync_threads<128>(barrier);
            if (warp / 2 == stage % 2) copy(staged, stage, write);
        }
    }

    template <class Write>
    __device__ __forceinline__ void copy(const StagedTokens& staged, int stage, Write write) const {
        int own = thread % 64;
        if constexpr (kOrder == RowOrder::kPlain) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                write(stage, i, own / 4 % 2, own % 4 * 8, staged.load<uint4>(own / 8 + 8 * i, own % 8));
        } else {  // a piece is of columns 4a, 4a + 1, 4a + 16, 4a + 17, 4a + 2 ... of atom a
            int tile = own / 2 % 2, half = own % 2;
            uint4 a = staged.load<uint4>(own / 4, tile * 4 + half * 2);
            uint4 b = staged.load<uint4>(own / 4, tile * 4 + half * 2 + 1);
            write(stage, 0, tile, half * 8, make_uint4(a.x, a.z, b.x, b.z));
            write(stage, 0, tile, half * 8 + 16, make_uint4(a.y, a.w, b.y, b.w));
        }
    }
};

// Writes the outputs of two warpgroups that become an operand's (operand.cuh): for each token a group of 64 columns,
// of which a warpgroup has 32, a warp those of an atom (int8.cuh). They are whole lines of memory.
template <int kTokens>
struct OperandRows {
    static constexpr int kStagedTokens = 32, kStageBytes = kStagedTokens * StagedTokens::kTokenBytes;
    static constexpr int kBytes = 2 * kStageBytes, kThreads = 256;
    static_assert(kTokens % kStagedTokens == 0, "whole stages");

    uint8_t* memory;  // kBytes of shared memory of the block
    int barrier;      // for the threads of both warpgroups
    int thread = thread_here();

    // make(j, y) gives the thread's values of the two tokens of batch j. The columns go to `to` + token * ldo, for tokens first to end -
    // 1; first is the tile's first. All threads of both warpgroups call this.
    template <class Make>
    __device__ __forceinline__ void store(half_t* to, int ldo, int first, int end, Make make) const {
        // Threads of a warp copy tokens that are four apart: what they load is in different banks.
        int own = thread / 8, token = (own & ~7) | (own & 1) << 2 | (own >> 1 & 3), eighth = thread % 8;
        int64_t stride = ldo, from = first + token;
#pragma unroll
        for (int stage = 0; stage < kTokens / kStagedTokens; ++stage) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float y[2];
                make(4 * stage + i, y);
                pairs[i] = operand_pair(y[0], y[1]);
            }
            StagedTokens staged = {memory + stage % 2 * kStageBytes};
            staged.store(thread % 32, thread / 32, pairs);
            sync_threads<kThreads>(barrier);
            uint2 low = staged.load<uint2>(token, eighth / 2, eighth % 2 * 8);
            uint2 high = staged.load<uint2>(token, 4 + eighth / 2, eighth % 2 * 8);
            int64_t at = from + stage * kStagedTokens;
            store_where(at < end, to + at * stride + eighth * 8, make_uint4(low.x, low.y, high.x, high.y));
        }
    }
};
