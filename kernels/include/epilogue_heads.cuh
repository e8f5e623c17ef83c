// What Hopper's GEMMs of q, k and v do with their sums: RMSNorm of each head of q and k, rotary embedding (arXiv
// 2104.09864), scaling into half's range, and the write to where attention has them. rope.cu's rotate_qkv makes the
// same bits of sums that went through memory; here they need not.
#pragma once
#include "angles_sm90.cuh"
#include "epilogue_sm90.cuh"

// A launch's outputs: the heads of q, then of k, then of v, of which nkv may be 0. The rest is as rotate_qkv has it
// (rope.cu).
struct Heads {
    half_t *q, *k, *v;
    int nq, nkv;
    const float *q_norm, *k_norm;
    float epsilon;
    const float *q_scale, *k_scale, *v_scale;
    const int* kv_rows;
};

// The work of a consumer warpgroup: it has columns of heads of kHeadDim (64 or 128), and those half a head beyond them.
// That is a head of 64, or half of one of 128, whose other half another warpgroup has: of two the other one of the
// block, of three its partner in the cluster (row_tile_number in row_tiles.cuh). kSecond: lanes whose numbers differ by
// 4 have columns whose numbers differ in bit 0; by kSecond, 8 or 16, in bit 1; by the other, in bit 2 or, int8, 4.
template <class Config, bool kNormed, bool kInterleaved, int kSecond>
struct HeadsEpilogue {
    static constexpr int kTokens = Config::kTokens, kHeadDim = Config::kHeadDim, kWarpgroups = Config::kWarpgroups;
    static constexpr int kHalf = kHeadDim / 2, kThird = 24 - kSecond;
    using Stages = AngleStages<Config>;
    using Rows = TokenRows<kTokens, kSecond == 16 ? RowOrder::kPaired : RowOrder::kPlain>;
    static constexpr int kWarpgroupsAHead = kHeadDim == 128 && kWarpgroups == 2 ? 2 : 1;  // that a block has
    static constexpr int kThreadsAHead = 128 * kWarpgroupsAHead;
    // Whether halves of a head may be in two blocks.
    static constexpr bool kPartners = kNormed && kHeadDim == 128 && kWarpgroupsAHead == 1;
    // In shared memory, for each warpgroup and of each token: its four warps' sums of squares, and then in their place
    // what it writes (Rows); the inverse root mean square of the warpgroup's head; where there are partners, their
    // sums, of two output tiles in turn. Then the barriers on which partners' sums come.
    static constexpr int kPlace = Rows::kBytes / 4 > 4 * kTokens ? Rows::kBytes / 4 : 4 * kTokens;
    static constexpr int kFloats = kPlace + (kPartners ? 3 : 1) * kTokens, kSumsBytes = kWarpgroups * kFloats * 4;
    static constexpr int kSharedBytes =
        kNormed ? kSumsBytes + (kPartners ? kWarpgroups * Barrier::kBytes : 0) : kWarpgroups * Rows::kBytes;
    static_assert(kHeadDim == 64 || kHeadDim == 128, "a warpgroup has a head, or half of one");
    static_assert(kTokens % 64 == 0, "lanes share sums of 64 tokens");
    static_assert(Stages::kTokens % Rows::kStagedTokens == 0, "threads wait for one another before a stage's end");
    static_assert(!kNormed || !kInterleaved, "rope.cu adds up squares in another order there");

    const Heads& heads;
    uint8_t* memory;  // the block's shared memory
    uint32_t parity;  // of the output tile's number among the block's
    uint32_t thread = thread_here();

    // A block's first thread calls this before any other thread goes on.
    __device__ __forceinline__ static void init(uint8_t* memory) {
        if constexpr (kPartners)
            for (int i = 0; i < kWarpgroups; ++i) sums_of_partner(memory, i).init(128);
    }
    // Where warpgroup i of the block is told of its partner's sums.
    __device__ __forceinline__ static Barrier sums_of_partner(uint8_t* memory, int i) {
        return {shared_address(memory) + Config::kEpilogueOffset + kSumsBytes + i * Barrier::kBytes};
    }

    // A lane's part of two sums that it and the one `lanes` from it have: the lower lane has the first.
    __device__ __forceinline__ float part(float first, float second, int lanes) const {
        bool upper = thread & lanes;
        float given = __shfl_xor_sync(0xffffffffu, upper ? first : second, lanes);
        return (upper ? second : first) + given;
    }
    // A lane gets, of two values that it and the one `lanes` from it have of two tokens, both of one.
    __device__ __forceinline__ void trade(float& first, float& second, int lanes) const {
        bool upper = thread & lanes;
        float given = __shfl_xor_sync(0xffffffffu, upper ? first : second, lanes);
        first = upper ? given : first, second = upper ? second : given;
    }
    // The same of pairs of halves.
    __device__ __forceinline__ uint32_t trade_halves(uint32_t pair, int lanes) const {
        uint32_t given = __shfl_xor_sync(0xffffffffu, pair, lanes);
        return __byte_perm(pair, given, thread & lanes ? 0x3276 : 0x5410);
    }

    // What this warpgroup's outputs are written with.
    __device__ __forceinline__ Rows rows() const {
        int warpgroup = static_cast<int>(thread / 128);
        uint8_t* place = memory + Config::kEpilogueOffset + warpgroup * (kNormed ? kFloats * 4 : Rows::kBytes);
        return {place, 1 + kWarpgroups + warpgroup, thread};
    }

    // Gives this warpgroup's sums to its partner, and adds the partner's: of one token after another, 128 apart.
    template <int kCount>
    __device__ __forceinline__ void add_partners(float (&sums)[kCount], const float* received) const {
        int warpgroup = thread / 128, in_cluster = blockIdx.x % Config::kCluster * kWarpgroups + warpgroup;
        int partner = (in_cluster ^ 1) % kWarpgroups, rank = (in_cluster ^ 1) / kWarpgroups;
        uint32_t to = shared_address(received + (partner - warpgroup) * kFloats) + thread % 128 * 4;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (128 * i + thread % 128 < kTokens) store_in(rank, to + 512 * i, sums[i]);
        sums_of_partner(memory, partner).publish_in(rank);
        sums_of_partner(memory, warpgroup).wait_for_cluster(parity);
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (128 * i + thread % 128 < kTokens) sums[i] += received[128 * i + thread % 128];
    }

    // The inverse root mean squares of this warpgroup's head, of each of the tile's tokens; ones for v, which has no
    // norm. Squares are added up in the order that rope.cu's squares_of_halves has: a column's and its partner's, then
    // by bits 0, 1, 2, 3, 4 (int8: 0, 1, 4, 2, 3) and 5 of the column's number.
    __device__ __forceinline__ const float* inverse_rms(const float (&y)[kTokens / 2], bool is_v) const {
        int warpgroup = thread / 128, lane = thread % 32;
        int kept = (lane & 4) + (lane & kSecond ? 2 : 0) + (lane & kThird ? 1 : 0);  // the batch that it gets sums of
        float* floats = reinterpret_cast<float*>(memory + Config::kEpilogueOffset);
        float* own = floats + warpgroup * kFloats + thread / 32 % 4 * kTokens + 8 * kept + lane % 4 * 2;
#pragma unroll
        for (int first = 0; first < kTokens; first += 64) {  // eight batches
            float squares[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float s[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    int at = first / 2 + 4 * i + c;
                    s[i] = fmaf(y[at + 2], y[at + 2], y[at] * y[at]);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) s[i] = part(s[i], s[i + 4], 4);
#pragma unroll
                for (int i = 0; i < 2; ++i) s[i] = part(s[i], s[i + 2], kSecond);
                squares[c] = part(s[0], s[1], kThird);
            }
            *reinterpret_cast<float2*>(own + first) = make_float2(squares[0], squares[1]);
        }
        int head = thread / kThreadsAHead, in_head = thread % kThreadsAHead;
        sync_threads<kThreadsAHead>(1 + head);
        constexpr int kOwn = ceil_div(kTokens, kThreadsAHead);  // tokens of a thread
        float* of = floats + head * kWarpgroupsAHead * kFloats + in_head;
        float sums[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (i * kThreadsAHead + in_head >= kTokens) continue;
            auto four = [&](const float* one) { return one[0] + one[kTokens] + (one[2 * kTokens] + one[3 * kTokens]); };
            sums[i] = four(of + i * kThreadsAHead);
            if constexpr (kWarpgroupsAHead == 2) sums[i] += four(of + kFloats + i * kThreadsAHead);
        }
        if constexpr (kPartners) add_partners(sums, floats + warpgroup * kFloats + kPlace + (1 + parity) * kTokens);
        float* inverse = of + kPlace;
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
            if (i * kThreadsAHead + in_head < kTokens)
                inverse[i * kThreadsAHead] =
                    is_v ? 1.0f : 1.0f / sqrtf(sums[i] / static_cast<float>(kHeadDim) + heads.epsilon);
        sync_threads<kThreadsAHead>(1 + head);
        return inverse - in_head;
    }

    // sums: as HalfSums, of a thread's two rows. column: of the outputs, the row tile's first; row: the thread's first
    // in it (row_of_thread in consumer_sm90.cuh). The tile has tokens first to end - 1; for those beyond the same is
    // computed, as wgmma's registers must not depend on a branch.
    template <class Sums, class Reader>
    __device__ __forceinline__ void store(const Sums& sums, const float (&bias)[2], int column, int row, int first,
                                          int end, const Reader& angles) const {
        int number = column / kHeadDim, at = column % kHeadDim + row;
        bool is_q = number < heads.nq, is_v = number >= heads.nq + heads.nkv;
        int of = is_q ? heads.nq : heads.nkv, slot = is_q ? number : is_v ? number - of - heads.nq : number - heads.nq;
        half_t* out = (is_q ? heads.q : is_v ? heads.v : heads.k) + slot * kHeadDim + column % kHeadDim;
        Outputs outputs = {out, static_cast<uint32_t>(of * kHeadDim), first, end, is_q ? nullptr : heads.kv_rows};
        float y[kTokens / 2];
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
            auto batch = sums.batch(j);
#pragma unroll
            for (int i = 0; i < 4; ++i) y[4 * j + i] = batch(i / 2, i % 2, bias[i / 2]);
        }
        // A power of two: to multiply by it first is the same.
        float scale = is_q ? *heads.q_scale : is_v ? *heads.v_scale : *heads.k_scale, weight[2] = {scale, scale};
        const float* inverse = nullptr;
        if constexpr (kNormed) {
            const float* norm = is_q ? heads.q_norm : heads.k_norm;
            weight[0] *= load_where(!is_v, norm + at, 1.0f), weight[1] *= load_where(!is_v, norm + at + kHalf, 1.0f);
            inverse = inverse_rms(y, is_v) + thread % 4 * 2;
        }
        write(y, inverse, weight, at, is_v, angles, outputs);
    }

    // Where a tile's head goes: rows are `stride` apart; numbers: of tokens' rows, or null where these are in order.
    struct Outputs {
        half_t* to;
        uint32_t stride;
        int first, end;
        const int* numbers;
    };

    // Multiplies what a thread has of a head by the tokens' inverses (if kNormed) and its columns' weights, rotates it,
    // if it is not of v, and writes it.
    template <class Reader>
    __device__ __forceinline__ void write(const float (&y)[kTokens / 2], const float* inverse, const float (&weight)[2],
                                          int at, bool is_v, const Reader& angles, const Outputs& outputs) const {
        // Of a batch of 8 tokens a lane needs its pair's angles of both of its tokens; interleaved: of both of its
        // pairs, of the token that it gets.
        int token = thread % 4 * 2, pair = kInterleaved ? at / 2 : at;
        uint32_t places[2] = {Stages::offset(pair, token), Stages::offset(pair, token + 1)}, stage = 0;
        if constexpr (kInterleaved) {
            token += thread >> 2 & 1;
            places[0] = Stages::offset(pair, token), places[1] = Stages::offset(pair + kHalf / 2, token);
        }
        bool turns = angles.any && !is_v;  // else it is rotated by no angle
        auto turn = [](float& a, float& b, const float2& angle) {
            float x = fmaf(a, angle.x, -(b * angle.y));
            b = fmaf(b, angle.x, a * angle.y), a = x;
        };
        auto make = [&](int j, uint32_t (&pairs)[2]) {
            constexpr int kBatches = Stages::kTokens / 8;
            if (j % kBatches == 0) {  // all threads have made what was before, as they have waited for one another
                if (j > 0) angles.end();
                stage = angles.begin();
            }
            float2 angle[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                angle[i] = load_shared_where(turns, stage + places[i] + j % kBatches * 8 * Stages::kRowBytes,
                                             make_float2(1.0f, 0.0f));
            float z[2][2];  // [row][token]
            float2 r = kNormed ? *reinterpret_cast<const float2*>(inverse + 8 * j) : make_float2(1.0f, 1.0f);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                z[0][c] = y[4 * j + c], z[1][c] = y[4 * j + 2 + c];
                if constexpr (kNormed) z[0][c] *= c ? r.y : r.x, z[1][c] *= c ? r.y : r.x;
                z[0][c] *= weight[0], z[1][c] *= weight[1];
                if constexpr (!kInterleaved) turn(z[0][c], z[1][c], angle[c]);
            }
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                if constexpr (kInterleaved)  // for a while lanes have two columns of one token
                    trade(z[row][0], z[row][1], 4), turn(z[row][0], z[row][1], angle[row]);
                pairs[row] = pack_half2(z[row][0], z[row][1]);
                if constexpr (kInterleaved) pairs[row] = trade_halves(pairs[row], 4);
            }
        };
        auto row = [&](int token, uint32_t& number) {
            token += outputs.first;
            bool inside = token < outputs.end;
            number = load_where(outputs.numbers != nullptr && inside, outputs.numbers + token, token);
            return inside;
        };
        Rows rows = this->rows();
        rows.store(HalfRows{outputs.to, outputs.stride, kHalf, true}, make, row);
        angles.end();
        if constexpr (kNormed) sync_threads<128>(rows.barrier);  // the next tile's sums come in their place
    }
};
