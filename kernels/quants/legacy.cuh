// The 32-weight formats: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL (ggml-common.h, block_q4_0 ... block_iq4_nl).
// Weight i < 16 is the low nibble of byte i, weight i + 16 its high nibble; Q5's fifth bits are a 32-bit word.
#pragma once
#include "common.cuh"

// Nibble i of the eight that hold weights at .. at+7.
__device__ __forceinline__ uint32_t nibble_of(uint2 bytes, int at, int i) { return byte_of(bytes, i) >> (at & 16 ? 4 : 0) & 0xf; }

struct Q4_0 {
    static constexpr int kElements = 32, kBytes = 18;
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        float d = load_half(block);
        uint2 qs = load_8_bytes<2>(block + 2 + (at & 8));
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * (static_cast<float>(nibble_of(qs, at, i)) - 8.0f);
    }
};

struct Q4_1 {
    static constexpr int kElements = 32, kBytes = 20;
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        float d = load_half(block), m = load_half(block + 2);
        uint2 qs = load_8_bytes<4>(block + 4 + (at & 8));
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = fmaf(d, static_cast<float>(nibble_of(qs, at, i)), m);
    }
};

struct Q5_0 {
    static constexpr int kElements = 32, kBytes = 22;
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        float d = load_half(block);
        uint32_t qh = (load_u16(block + 2) | load_u16(block + 4) << 16) >> at;
        uint2 qs = load_8_bytes<2>(block + 6 + (at & 8));
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * (static_cast<float>(nibble_of(qs, at, i) | (qh >> i & 1) << 4) - 16.0f);
    }
};

struct Q5_1 {
    static constexpr int kElements = 32, kBytes = 24;
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        float d = load_half(block), m = load_half(block + 2);
        uint32_t qh = *reinterpret_cast<const uint32_t*>(block + 4) >> at;
        uint2 qs = load_8_bytes<8>(block + 8 + (at & 8));
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = fmaf(d, static_cast<float>(nibble_of(qs, at, i) | (qh >> i & 1) << 4), m);
    }
};

struct Q8_0 {
    static constexpr int kElements = 32, kBytes = 34;
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        float d = load_half(block);
        uint2 qs = load_8_bytes<2>(block + 2 + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * signed_byte_of(qs, i);
    }
};

struct IQ4_NL {
    static constexpr int kElements = 32, kBytes = 18;
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        float d = load_half(block);
        uint2 qs = load_8_bytes<2>(block + 2 + (at & 8));
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * iq4_value(nibble_of(qs, at, i));
    }
};
