// The 32-weight formats (ggml-common.h: block_q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl), eight blocks a unit. Of a block's
// nibbles, weight i < 16 is the low one of byte i, and weight i + 16 its high one; the fifth bits of Q5 are a word. A
// unit gathers the fields of its blocks: eight d, eight m (if any), eight qh (if any), eight qs.
#pragma once
#include "common.cuh"

// A unit of blocks whose fields have these sizes: 2 for d, kM for m, kQh for qh, kQs for qs.
template <int kM, int kQh, int kQs>
struct Gathered {
    static constexpr bool kUnquantised = false, kShared = false, kHeader = false, kHasMin = kM != 0, kByBits = false;
    static constexpr int kBlock = 2 + kM + kQh + kQs, kElements = 256, kBytes = 8 * kBlock;
    static constexpr int kQhAt = 16 + 8 * kM, kQsAt = kQhAt + 8 * kQh;

    __host__ __device__ static constexpr int source_of(int to) {
        if (to < 16) return to / 2 * kBlock + to % 2;
        if (to < kQhAt) return (to - 16) / 2 * kBlock + 2 + to % 2;
        if (to < kQsAt) return (to - kQhAt) / 4 * kBlock + 2 + kM + to % 4;
        int from = paired(to - kQsAt);
        return from / kQs * kBlock + 2 + kM + kQh + from % kQs;
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float& m) {
        d = unit.half(at / 32 * 2);
        if constexpr (kHasMin) m = -unit.half(16 + at / 32 * 2);  // these formats add theirs
    }
    // Word w of the nibbles of weights at .. at + 15, a byte each.
    __device__ static uint32_t nibbles(const uint4& qs, int at, int w) {
        return word_of(qs, w) >> (at & 16 ? 4 : 0) & 0x0f0f0f0fu;
    }
};

// Q4 and Q5, whose nibbles and fifth bits stand as common.cuh says: kOffset is what is taken off the integers.
template <int kOffset, bool kMin, bool kFifth>
struct Nibbles : Gathered<kMin ? 2 : 0, kFifth ? 4 : 0, 16> {
    using Base = Gathered<kMin ? 2 : 0, kFifth ? 4 : 0, 16>;
    static constexpr bool kByBits = true;
    static constexpr int kCenter = kMin ? kOffset : 0;
    template <class Bytes>
    __host__ __device__ static uint32_t byte_of(const Bytes& from, int to) {
        if (to < Base::kQhAt) return from[Base::source_of(to)];
        if (to < Base::kQsAt)
            return fifth_bits_byte(to - Base::kQhAt, [&](int w) {
                return from[w / 32 * Base::kBlock + Base::kQsAt / 8 - 4 + w / 8 % 4] >> w % 8 & 1;
            });
        return nibbles_byte(to - Base::kQsAt, [&](int w) {
            return nibble_of(from[w / 32 * Base::kBlock + Base::kQsAt / 8 + w % 16], w / 16 % 2);
        });
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint2 words = unit.load8(Base::kQsAt + at / 2);
        if constexpr (kFifth) five_bit_pairs<kOffset>(unit.bits(), words, unit.u32(Base::kQhAt + at / 32 * 4), at, q);
        else four_bit_pairs<kOffset>(unit.bits(), words, q);
    }
};
struct Q4_0 : Nibbles<8, false, false> {};
struct Q4_1 : Nibbles<8, true, false> {};
struct Q5_0 : Nibbles<16, false, true> {};
struct Q5_1 : Nibbles<16, true, true> {};

struct Q8_0 : Gathered<0, 0, 32> {
    static constexpr int kCenter = 0;
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(kQsAt + at);
#pragma unroll
        for (int w = 0; w < 4; ++w) signed_bytes_to_pairs(word_of(qs, w), q + 2 * w);
    }
};

struct IQ4_NL : Gathered<0, 0, 16> {
    static constexpr int kCenter = 0;
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(kQsAt + at / 32 * 16);
#pragma unroll
        for (int w = 0; w < 4; ++w) signed_bytes_to_pairs(iq4_values(nibbles(qs, at, w)), q + 2 * w);
    }
};
