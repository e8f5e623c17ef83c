// What Hopper's GEMMs of q, k and v do with their sums: RMSNorm of each head of q and k, rotary embedding (arXiv
// 2104.09864), scaling into half's range, and the write to where attention has them. rope.cu's rotate_qkv makes the
// same bits of sums that went through memory; here they need not.
#pragma once
#include "epilogue.cuh"
#include "sm90.cuh"

// A launch's outputs: the heads of q, then of k, then of v, of which nkv may be 0. The rest is as rotate_qkv has it
// (rope.cu); table may be null, where nothing is rotated.
struct Heads {
    half_t *q, *k, *v;
    int nq, nkv;
    const float *q_norm, *k_norm;
    float epsilon;
    const float2* table;
    const float *q_scale, *k_scale, *v_scale;
    const int* kv_rows;
};

template <class T, int kCount>
__device__ __forceinline__ void clear(T (&values)[kCount]) {
#pragma unroll
    for (T& value : values) value = 0;
}

// The work of a consumer warpgroup of two: it has columns of heads of kHeadDim (64 or 128), and those half a head
// beyond them. With heads of 64 each has a head, with heads of 128 half of one. kSecond: lanes whose numbers differ by
// 4 have columns whose numbers differ in bit 0; by kSecond, 8 or 16, in bit 1; by the other, in bit 2 or, int8, 4.
template <int kTokens, int kHeadDim, bool kNormed, bool kInterleaved, int kSecond>
struct HeadsEpilogue {
    static constexpr int kHalf = kHeadDim / 2, kThird = 24 - kSecond;
    static constexpr int kBatches = 4, kGroups = kTokens / (8 * kBatches);  // of 8 tokens, in a group; groups
    static constexpr int kWarpgroupsAHead = kHeadDim / 64, kThreadsAHead = 128 * kWarpgroupsAHead;
    // In shared memory: each warp's sums of squares of each token, then each head's inverse root mean squares.
    static constexpr int kWarps = 8, kHeads = 2 / kWarpgroupsAHead;
    static constexpr int kSharedBytes = kNormed ? (kWarps + kHeads) * kTokens * 4 : 0;
    static_assert(kHeadDim == 64 || kHeadDim == 128, "the warpgroups of a block have whole heads");
    static_assert(kTokens % 64 == 0, "lanes share sums of 64 tokens");
    static_assert(!kNormed || !kInterleaved, "rope.cu adds up squares in another order there");

    const Heads& heads;
    float* shared;
    int thread = thread_here();

    // A lane's part of two sums that it and the one `lanes` from it have: the lower lane has the first.
    __device__ __forceinline__ float part(float first, float second, int lanes) const {
        bool upper = thread & lanes;
        float given = __shfl_xor_sync(0xffffffffu, upper ? first : second, lanes);
        return (upper ? second : first) + given;
    }
    // A lane gets, of two values that it and the one `lanes` from it have of two tokens (or two rows), both of one.
    template <class T>
    __device__ __forceinline__ void trade(T& first, T& second, int lanes) const {
        bool upper = thread & lanes;
        T given = __shfl_xor_sync(0xffffffffu, upper ? first : second, lanes);
        first = upper ? given : first, second = upper ? second : given;
    }
    // The same of pairs of halves.
    __device__ __forceinline__ uint32_t trade_halves(uint32_t pair, int lanes) const {
        uint32_t given = __shfl_xor_sync(0xffffffffu, pair, lanes);
        return __byte_perm(pair, given, thread & lanes ? 0x3276 : 0x5410);
    }

    // What a group of tokens needs, which is on its way before the group's turn comes. angle: of a lane's pair, of both
    // of its tokens of a batch; interleaved: of both of its pairs, of the token that it gets. row: of k and v, that its
    // token has.
    struct Needed {
        float2 angle[kBatches][2];
        int row[kBatches];
    };

    // at: the lane's column. token: its first of the group; angles are read beyond `end`, too.
    __device__ __forceinline__ Needed needed(int at, int token, int end, bool turns, const int* rows) const {
        Needed all;
        int odd = thread >> 2 & 1;
        const float2* from =
            heads.table + static_cast<int64_t>(token + (kInterleaved ? odd : 0)) * kHalf + (kInterleaved ? at / 2 : at);
#pragma unroll
        for (int i = 0; i < kBatches; ++i, from += 8 * kHalf) {
#pragma unroll
            for (int c = 0; c < 2; ++c)
                all.angle[i][c] =
                    load_where(turns, from + c * (kInterleaved ? kHalf / 2 : kHalf), make_float2(1.0f, 0.0f));
            int own = token + 8 * i + odd;
            all.row[i] = load_where(rows != nullptr && own < end, rows + own, own);
        }
        return all;
    }

    // The inverse root mean squares of this warpgroup's head, of each of the tile's tokens. Squares are added up in the
    // order that rope.cu's squares_of_halves has: a column's and its partner's, then by bits 0, 1, 2, 3, 4 (int8: 0, 1,
    // 4, 2, 3) and 5 of the column's number.
    __device__ __forceinline__ const float* inverse_rms(const float (&y)[kTokens / 2]) const {
        int warp = thread / 32, lane = thread % 32, head = thread / kThreadsAHead;
        int kept = (lane & 4) + (lane & kSecond ? 2 : 0) + (lane & kThird ? 1 : 0);  // the batch that it gets sums of
        float* own = shared + warp * kTokens + 8 * kept + lane % 4 * 2;
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
        sync_threads<kThreadsAHead>(1 + head);
        const float* partial = shared + head * 4 * kTokens;
        float* inverse = shared + (kWarps + head) * kTokens;
#pragma unroll
        for (int token = thread % kThreadsAHead; token < kTokens; token += kThreadsAHead) {
            auto four = [&](int first) {
                const float* of = partial + first * kTokens + token;
                return of[0] + of[kTokens] + (of[2 * kTokens] + of[3 * kTokens]);
            };
            float sum = four(0);
            if constexpr (kWarpgroupsAHead == 2) sum += four(4);
            inverse[token] = 1.0f / sqrtf(sum / static_cast<float>(kHeadDim) + heads.epsilon);
        }
        sync_threads<kThreadsAHead>(1 + head);
        return inverse;
    }

    // sums: as HalfSums, of a thread's two rows. column: of the outputs, the row tile's first; row: the thread's first
    // in it (row_of_thread in gemm_sm90.cu). The tile has tokens first to end - 1. Of v and of tokens beyond the last
    // the same is computed as of others: wgmma's registers must not depend on a branch.
    template <class Sums>
    __device__ __forceinline__ void store(const Sums& sums, const float (&bias)[2], int column, int row, int first,
                                          int end) const {
        int lane = thread % 32, number = column / kHeadDim, at = column % kHeadDim + row;
        bool is_q = number < heads.nq, is_v = number >= heads.nq + heads.nkv, odd = lane & 4, upper = lane & kSecond;
        int of = is_q ? heads.nq : heads.nkv, slot = is_q ? number : is_v ? number - of - heads.nq : number - heads.nq;
        bool normed = kNormed && !is_v, turns = !is_v && heads.table != nullptr && end > 0;
        // A power of two: to multiply by it first is the same.
        float scale = is_q ? *heads.q_scale : is_v ? *heads.v_scale : *heads.k_scale, weight[2] = {scale, scale};
        const int* rows = is_q ? nullptr : heads.kv_rows;
        const float* inverse = shared;
        float y[kTokens / 2];
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) y[i] = sums(i, bias[i / 2 % 2]);
        int token = first + lane % 4 * 2;
        Needed next = needed(at, token, end, turns, rows);
        if constexpr (kNormed) {
            const float* norm = is_q ? heads.q_norm : heads.k_norm;
            weight[0] *= load_where(normed, norm + at, 1.0f), weight[1] *= load_where(normed, norm + at + kHalf, 1.0f);
            inverse = inverse_rms(y) + lane % 4 * 2;
        }
        int stride = of * kHeadDim * 2;  // bytes from one row to the next
        half_t* first_head = is_q ? heads.q : is_v ? heads.v : heads.k;
        uint8_t* out = reinterpret_cast<uint8_t*>(first_head + slot * kHeadDim + (at & ~3) + (upper ? kHalf : 0));
        auto turn = [](float& a, float& b, const float2& angle) {
            float x = fmaf(a, angle.x, -(b * angle.y));
            b = fmaf(b, angle.x, a * angle.y), a = x;
        };
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const Needed now = next;
            if (group + 1 < kGroups) next = needed(at, token + (group + 1) * 8 * kBatches, end, turns, rows);
#pragma unroll
            for (int i = 0; i < kBatches; ++i) {
                int j = group * kBatches + i;
                float z[2][2];  // [row][token]
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float low = y[4 * j + c], high = y[4 * j + 2 + c];
                    if constexpr (kNormed) {
                        float r = normed ? inverse[8 * j + c] : 1.0f;
                        low *= r, high *= r;
                    }
                    z[0][c] = low * weight[0], z[1][c] = high * weight[1];
                    if constexpr (!kInterleaved) turn(z[0][c], z[1][c], now.angle[i][c]);
                }
                uint32_t four[2];  // two columns of a row's of one token, then four columns of it
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    if constexpr (kInterleaved)
                        trade(z[row][0], z[row][1], 4), turn(z[row][0], z[row][1], now.angle[i][row]);
                    four[row] = pack_half2(z[row][0], z[row][1]);
                    if constexpr (!kInterleaved) four[row] = trade_halves(four[row], 4);
                }
                trade(four[0], four[1], kSecond);
                store_where(token + 8 * j + odd < end, out + static_cast<int64_t>(now.row[i]) * stride,
                            make_uint2(four[0], four[1]));
            }
        }
    }
};
