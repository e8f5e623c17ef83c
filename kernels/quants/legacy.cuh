// The 32-weight formats (ggml-common.h: block_q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl), eight blocks a unit. Of a block's
// nibbles, weight i < 16 is the low one of byte i, and weight i + 16 its high one; the fifth bits of Q5 are a word. A
// unit gathers the fields of its blocks: eight d, eight m (if any), eight qh (if any), eight qs.
#pragma once
#include "common.cuh"

// A unit of blocks whose fields have these sizes: 2 for d, kM for m, kQh for qh, kQs for qs.
template <int kM, int kQh, int kQs>
struct Gathered {
    static constexpr bool kUnquantised = false, kShared = false, kHasMin = kM != 0;
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
    // Bits 4w .. 4w+3 of `bits` as bit 4 of a paired word's bytes.
    __device__ static uint32_t fifth_bits(uint32_t bits, int w) {
        uint32_t b = bits >> (4 * w);
        return (b & 1) << 4 | (b & 2) << 19 | (b & 4) << 10 | (b & 8) << 25;
    }
};

template <int kOffset, bool kMin>
struct Nibbles : Gathered<kMin ? 2 : 0, 0, 16> {
    using Base = Gathered<kMin ? 2 : 0, 0, 16>;
    static constexpr int kCenter = kMin ? 8 : 0;
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(Base::kQsAt + at / 32 * 16);
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_pairs<kOffset>(Base::nibbles(qs, at, w), q + 2 * w);
    }
};
struct Q4_0 : Nibbles<8, false> {};
struct Q4_1 : Nibbles<8, true> {};

template <bool kMin>
struct FiveBits : Gathered<kMin ? 2 : 0, 4, 16> {
    using Base = Gathered<kMin ? 2 : 0, 4, 16>;
    static constexpr int kCenter = kMin ? 16 : 0;
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(Base::kQsAt + at / 32 * 16);
        uint32_t high = unit.u32(Base::kQhAt + at / 32 * 4) >> (at & 16);
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_pairs<16>(Base::nibbles(qs, at, w) | Base::fifth_bits(high, w), q + 2 * w);
    }
};
struct Q5_0 : FiveBits<false> {};
struct Q5_1 : FiveBits<true> {};

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
