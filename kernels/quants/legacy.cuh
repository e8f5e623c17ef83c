// The 32-weight formats (ggml-common.h: block_q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl), eight blocks a unit.
// A block's nibbles: weight i < 16 is the low one of byte i, weight i + 16 its high one; Q5's fifth bits are a word.
// A unit gathers its blocks' fields: eight d, eight m (if any), eight qh (if any), eight qs.
#pragma once
#include "common.cuh"

// source_of for blocks whose fields have these sizes: 2 for d, kM for m, kQh for qh, kQs for qs.
template <int kM, int kQh, int kQs>
__host__ __device__ constexpr int gathered_source(int to) {
    constexpr int kBlock = 2 + kM + kQh + kQs;
    int before = 0;
    for (int size : {2, kM, kQh, kQs}) {
        if (to < 8 * size) return to / size * kBlock + before + to % size;
        to -= 8 * size;
        before += size;
    }
    return -1;
}

// The 16 nibbles of weights at .. at+15, a byte each, four a word.
template <class U>
__device__ __forceinline__ uint4 nibbles(const U& unit, int qs, int at) {
    uint4 v = unit.load16(qs + at / 32 * 16);
    int shift = at & 16 ? 4 : 0;
    return make_uint4(v.x >> shift & 0x0f0f0f0fu, v.y >> shift & 0x0f0f0f0fu, v.z >> shift & 0x0f0f0f0fu,
                      v.w >> shift & 0x0f0f0f0fu);
}

// Bits 4i .. 4i+3 of `bits`, each moved to bit 4 of a byte.
__device__ __forceinline__ uint32_t fifth_bits(uint32_t bits, int i) {
    uint32_t four = bits >> (4 * i) & 0xf;
    return (four | four << 7 | four << 14 | four << 21) << 4 & 0x10101010u;
}

struct Q4_0 {
    static constexpr int kElements = 256, kBytes = 8 * 18;
    __host__ __device__ static constexpr int source_of(int to) { return gathered_source<0, 0, 16>(to); }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        float d = unit.half(at / 32 * 2) * scale;
        uint4 q = nibbles(unit, 16, at);
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_floats<8>(word_of(q, w), out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] *= d;
    }
};

struct Q4_1 {
    static constexpr int kElements = 256, kBytes = 8 * 20;
    __host__ __device__ static constexpr int source_of(int to) { return gathered_source<2, 0, 16>(to); }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        float d = unit.half(at / 32 * 2) * scale, m = unit.half(16 + at / 32 * 2) * scale;
        uint4 q = nibbles(unit, 32, at);
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_floats<0>(word_of(q, w), out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] = fmaf(d, out[i], m);
    }
};

struct Q5_0 {
    static constexpr int kElements = 256, kBytes = 8 * 22;
    __host__ __device__ static constexpr int source_of(int to) { return gathered_source<0, 4, 16>(to); }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        float d = unit.half(at / 32 * 2) * scale;
        uint32_t high = unit.u32(16 + at / 32 * 4) >> (at & 16);
        uint4 q = nibbles(unit, 48, at);
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_floats<16>(word_of(q, w) | fifth_bits(high, w), out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] *= d;
    }
};

struct Q5_1 {
    static constexpr int kElements = 256, kBytes = 8 * 24;
    __host__ __device__ static constexpr int source_of(int to) { return gathered_source<2, 4, 16>(to); }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        float d = unit.half(at / 32 * 2) * scale, m = unit.half(16 + at / 32 * 2) * scale;
        uint32_t high = unit.u32(32 + at / 32 * 4) >> (at & 16);
        uint4 q = nibbles(unit, 64, at);
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_floats<0>(word_of(q, w) | fifth_bits(high, w), out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] = fmaf(d, out[i], m);
    }
};

struct Q8_0 {
    static constexpr int kElements = 256, kBytes = 8 * 34;
    __host__ __device__ static constexpr int source_of(int to) { return gathered_source<0, 0, 32>(to); }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        float d = unit.half(at / 32 * 2) * scale;
        uint4 q = unit.load16(16 + at);
#pragma unroll
        for (int w = 0; w < 4; ++w) signed_bytes_to_floats(word_of(q, w), out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] *= d;
    }
};

struct IQ4_NL {
    static constexpr int kElements = 256, kBytes = 8 * 18;
    __host__ __device__ static constexpr int source_of(int to) { return gathered_source<0, 0, 16>(to); }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        float d = unit.half(at / 32 * 2) * scale;
        uint4 q = nibbles(unit, 16, at);
#pragma unroll
        for (int w = 0; w < 4; ++w) signed_bytes_to_floats(iq4_values(word_of(q, w)), out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] *= d;
    }
};
