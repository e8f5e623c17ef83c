// How outputs of a transposed product (Yᵀ) leave a block: through shared memory, so that memory gets runs of 32 bytes
// and more of a token's row, not a few bytes of many rows.
//
// wgmma leaves a thread with pairs of neighbouring tokens, each of one row of Yᵀ. A matrix of 8 such rows by 8 tokens,
// as halves, is turned over by stmatrix (store_matrices): each token's 8 values become a piece of 16 bytes. The pieces
// of some tokens are staged, and then other threads copy them to where they belong.
#pragma once
#include "operand.cuh"
#include "output_blocks.cuh"
#include "sm90.cuh"

// Where a piece of a staged token is: a token has 128 bytes, eight pieces. Neighbouring tokens have the same piece in
// different banks.
constexpr uint32_t kStagedBytes = 128;
__device__ __forceinline__ uint32_t staged_offset(uint32_t token, uint32_t piece) {
    return token * kStagedBytes + (piece ^ token % 8) * 16;
}

// How the 64 rows of Yᵀ that a warpgroup has, of two row tiles, lie in its warps.
enum class RowOrder {
    kPlain,   // warp w has rows 8w to 8w + 7 of the first tile, and of the second
    kPaired,  // int8: warp w has the rows of atom w (int8.cuh) of the first tile, and of the second
    kAtoms,   // int8: warps 0 and 1 have two atoms each of the first tile, warps 2 and 3 of the second
};

// Where rows of halves go: `out` is column 0 of row 0, rows are `stride` apart, and the second row tile's columns come
// `apart` after the first's, if `both` are written.
struct HalfRows {
    half_t* out;
    uint32_t stride;
    int apart;
    bool both;

    // This thread has the columns from 8 * piece on of a row tile.
    __device__ __forceinline__ void begin(uint32_t tile, uint32_t piece) { out += tile * apart + piece * 8; }
    // Writes the first eight to row `number`, if it is inside; then eight that come 16 columns after them.
    __device__ __forceinline__ void store(bool inside, uint32_t number, const uint4& eight) const {
        store_where(inside, out + static_cast<uint64_t>(number) * stride, eight);
    }
    __device__ __forceinline__ void store(bool inside, uint32_t number, const uint4& first, const uint4& second) const {
        half_t* line = out + static_cast<uint64_t>(number) * stride;
        store_where(inside, line, first);
        store_where(inside, line + 16, second);
    }
};

// Where rows of blocks go (output_blocks.cuh): `out` is row 0, rows are `stride` bytes apart, of `columns` columns. The
// first row tile's begin at `column`, and the second's follow, if `both` are written.
struct BlockRows {
    uint8_t* out;
    uint32_t stride;
    int columns, column;
    bool both;
    int to_largest = 0;  // from a block's integers to its largest magnitude

    // This thread has a block of a row tile.
    __device__ __forceinline__ void begin(uint32_t tile, uint32_t block) {
        int place = column + tile * TILE_ROWS + block * kOutputBlock;
        to_largest = output_largest(columns, place) - place, out += place;
    }
    __device__ __forceinline__ void store(bool inside, uint32_t number, const uint4& first, const uint4& second) const {
        uint32_t most = larger_halves(larger_halves(first.x, first.y), larger_halves(first.z, first.w));
        most = half2_max(most, larger_halves(second.x, second.y));
        most = half2_max(most, larger_halves(second.z, second.w));
        half_t largest = larger_half(most);
        BlockRounding rounding(largest);
        uint8_t* to = out + static_cast<uint64_t>(number) * stride;
        store_where(inside, to,
                    make_uint4(rounding.four(first.x, first.y), rounding.four(first.z, first.w),
                               rounding.four(second.x, second.y), rounding.four(second.z, second.w)));
        store_where(inside, to + to_largest, largest);
    }
};

// Writes a warpgroup's outputs of a token tile: for each token 32 columns of each of its two row tiles.
// Staging more tokens at once takes more memory, and less waiting.
template <int kTokens, RowOrder kOrder, int kStaged = 16>
struct TokenRows {
    static constexpr int kStagedTokens = kStaged, kStageBytes = kStagedTokens * kStagedBytes;
    static constexpr int kBytes = 2 * kStageBytes;  // of shared memory of a warpgroup: two stages, which take turns
    static_assert(kTokens % kStagedTokens == 0 && kStagedTokens % 16 == 0, "whole stages");
    static_assert(kStagedTokens == 16 || kTokens / kStagedTokens % 2 == 0, "stages take turns from call to call, too");

    uint8_t* memory;  // kBytes of shared memory
    int barrier;      // for the warpgroup's threads
    uint32_t thread = thread_here();

    // Calls make(j, pairs) for each batch j of 8 tokens, in turn, which gives the thread's pair of tokens of its first
    // row and of its second; and row(token, number) for a token of the tile, which says whether it is written, and to
    // which row. Where 16 tokens are staged, half of the threads copy them, in turns with the other half. All threads
    // of the warpgroup call this. target: HalfRows or BlockRows.
    template <class Target, class Make, class Row>
    __device__ __forceinline__ void store(Target target, Make make, Row row) const {
        constexpr bool kPlain = kOrder == RowOrder::kPlain;
        constexpr int kCopiers = kStagedTokens == 16 ? 64 : 128, kPerToken = kPlain ? 8 : 4;
        // Of how many tokens of a stage, and how far apart, a thread copies 16 or 32 bytes.
        constexpr int kOwn = kStagedTokens * kPerToken / kCopiers, kApart = kCopiers / kPerToken;
        uint32_t lane = thread % 32, warp = thread / 32 % 4, own = thread % kCopiers;
        // A lane tells where one matrix' piece of one token goes: store_matrices takes 2 batches by 2 rows.
        uint32_t row_of_matrix = lane / 8 % 2, token_of_matrix = lane / 16 * 8 + lane % 8;
        uint32_t piece = kOrder == RowOrder::kAtoms ? 2 * warp + row_of_matrix : 4 * row_of_matrix + warp;
        uint32_t to = shared_address(memory) + staged_offset(token_of_matrix, piece);
        uint32_t token = kPlain ? own / 8 : own / 4, tile = kPlain ? own / 4 % 2 : own / 2 % 2;
        uint32_t first_piece = kPlain ? own % 8 : tile * 4 + own % 2 * 2;
        const uint8_t* from = memory + staged_offset(token, first_piece);
        const uint8_t* other = memory + staged_offset(token, first_piece + 1);
        target.begin(tile, kPlain ? own % 4 : own % 2);
        bool written = tile == 0 || target.both;
#pragma unroll
        for (int stage = 0; stage < kTokens / kStagedTokens; ++stage) {
            int offset = stage % 2 * kStageBytes;
#pragma unroll
            for (int i = 0; i < kStagedTokens; i += 16) {
                uint32_t pairs[2][2];
                make((stage * kStagedTokens + i) / 8, pairs[0]);
                make((stage * kStagedTokens + i) / 8 + 1, pairs[1]);
                store_matrices(to + offset + i * kStagedBytes, {pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]});
            }
            sync_threads<128>(barrier);
            if (kCopiers == 64 && warp / 2 != stage % 2) continue;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                uint32_t number;
                bool inside = row(stage * kStagedTokens + kApart * i + token, number) && written;
                uint4 a = *reinterpret_cast<const uint4*>(from + offset + kApart * i * kStagedBytes);
                if constexpr (kPlain) target.store(inside, number, a);
                else {  // a piece is of columns 4a, 4a + 1, 4a + 16, 4a + 17, 4a + 2 ... of atom a
                    uint4 b = *reinterpret_cast<const uint4*>(other + offset + kApart * i * kStagedBytes);
                    target.store(inside, number, make_uint4(a.x, a.z, b.x, b.z), make_uint4(a.y, a.w, b.y, b.w));
                }
            }
        }
    }
};

// Writes the outputs of two warpgroups that become an operand's (operand.cuh): for each token a group of 64 columns,
// of which a warpgroup has 32, a warp those of an atom (int8.cuh). They are whole lines of memory.
template <int kTokens>
struct OperandRows {
    static constexpr int kStagedTokens = 32, kStageBytes = kStagedTokens * kStagedBytes;
    static constexpr int kBytes = 2 * kStageBytes, kThreads = 256;
    static_assert(kTokens % kStagedTokens == 0, "whole stages");

    uint8_t* memory;  // kBytes of shared memory of the block
    int barrier;      // for the threads of both warpgroups

    // make(j, y) gives the thread's values of the two tokens of batch j. The columns go to out + token * ldo, for the
    // tile's tokens first to end - 1. All threads of both warpgroups call this.
    template <class Make>
    __device__ __forceinline__ void store(half_t* out, int ldo, int first, int end, Make make) const {
#pragma unroll
        for (int stage = 0; stage < kTokens / kStagedTokens; ++stage) {
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float y[2];
                make(4 * stage + i, y);
                pairs[i] = operand_pair(y[0], y[1]);
            }
            uint8_t* staged = memory + stage % 2 * kStageBytes;
            uint32_t thread = thread_here();  // anew: there is no register for what follows from it
            store_matrices(shared_address(staged + staged_offset(thread % 32, thread / 32)), pairs);
            sync_threads<kThreads>(barrier);
            // Threads of a warp copy tokens that are four apart: what they load is in different banks.
            uint32_t eighth = thread % 8, token = thread / 64 * 8 + thread / 8 % 2 * 4 + thread / 16 % 4;
            auto load = [&](uint32_t piece) {
                return *reinterpret_cast<const uint2*>(staged + staged_offset(token, piece) + eighth % 2 * 8);
            };
            uint2 low = load(eighth / 2), high = load(4 + eighth / 2);
            int at = first + stage * kStagedTokens + static_cast<int>(token);
            half_t* to = out + static_cast<uint64_t>(at) * static_cast<uint32_t>(ldo) + eighth * 8;
            store_where(at < end, to, make_uint4(low.x, low.y, high.x, high.y));
        }
    }
};
