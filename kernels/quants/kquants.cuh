// The 256-weight super-blocks: Q2_K ... Q6_K, Q8_K, IQ4_XS (ggml-common.h, block_q2_K ...; dequantize_row_q*_K).
// A weight is d · scale · q − dmin · min; the products are exact in float32, so only the last step rounds, as in ggml.
#pragma once
#include "common.cuh"

// Q2_K, Q3_K and Q6_K hold two halves of 128 weights, each four runs of 32 that share bytes.
__device__ __forceinline__ int half_of(int at) { return at >> 7; }
__device__ __forceinline__ int run_of(int at) { return at >> 5 & 3; }

struct Q2_K {
    static constexpr int kElements = 256, kBytes = 84;  // scales[16], qs[64], d, dmin
    __host__ __device__ static constexpr int source_of(int to) { return to; }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        uint32_t s = unit.u8(at >> 4);
        float dl = unit.half(80) * scale * static_cast<float>(s & 0xf), ml = unit.half(82) * scale * static_cast<float>(s >> 4);
        uint4 q = unit.load16(16 + 32 * half_of(at) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_floats<0>(word_of(q, w) >> (2 * run_of(at)) & 0x03030303u, out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] = fmaf(dl, out[i], -ml);
    }
};

struct Q3_K {
    static constexpr int kElements = 256, kBytes = 110;  // hmask[32], qs[64], scales[12], d
    __host__ __device__ static constexpr int source_of(int to) { return to; }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        int s = at >> 4;
        uint32_t low = unit.u8(96 + (s & 7)) >> (s & 8 ? 4 : 0) & 0xf, high = unit.u8(104 + (s & 3)) >> (2 * (s >> 2)) & 3;
        float dl = unit.half(108) * scale * (static_cast<float>(low | high << 4) - 32.0f);
        uint4 q = unit.load16(32 + 32 * half_of(at) + (at & 16)), mask = unit.load16(at & 16);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t bits = (word_of(q, w) >> (2 * run_of(at)) & 0x03030303u) | (word_of(mask, w) >> (at >> 5) & 0x01010101u) << 2;
            bytes_to_floats<4>(bits, out + 4 * w);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] *= dl;
    }
};

// Q4_K and Q5_K begin with d, dmin and eight 6-bit pairs of scale and minimum (ggml's get_scale_min_k4): times d and dmin,
// those of run `sub` (0..7).
__device__ __forceinline__ void scale_and_min(const uint4& header, int sub, float scale, float& dl, float& ml) {
    auto byte = [&](int i) { return word_of(header, 1 + i / 4) >> (8 * (i % 4)) & 0xff; };
    uint32_t s, m;
    if (sub < 4) {
        s = byte(sub) & 63;
        m = byte(sub + 4) & 63;
    } else {
        s = (byte(sub + 4) & 0xf) | (byte(sub - 4) >> 6) << 4;
        m = byte(sub + 4) >> 4 | (byte(sub) >> 6) << 4;
    }
    dl = half_to_float(static_cast<half_t>(header.x)) * scale * static_cast<float>(s);
    ml = half_to_float(static_cast<half_t>(header.x >> 16)) * scale * static_cast<float>(m);
}

struct Q4_K {
    static constexpr int kElements = 256, kBytes = 144;  // d, dmin, scales[12], qs[128]
    __host__ __device__ static constexpr int source_of(int to) { return to; }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        int sub = at >> 5;
        float dl, ml;
        scale_and_min(unit.load16(0), sub, scale, dl, ml);
        uint4 q = unit.load16(16 + 32 * (sub >> 1) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_floats<0>(word_of(q, w) >> (4 * (sub & 1)) & 0x0f0f0f0fu, out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] = fmaf(dl, out[i], -ml);
    }
};

struct Q5_K {
    static constexpr int kElements = 256, kBytes = 176;  // d, dmin, scales[12], qh[32], qs[128]
    __host__ __device__ static constexpr int source_of(int to) { return to; }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        int sub = at >> 5;
        float dl, ml;
        scale_and_min(unit.load16(0), sub, scale, dl, ml);
        uint4 high = unit.load16(16 + (at & 16)), q = unit.load16(48 + 32 * (sub >> 1) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t bits = (word_of(q, w) >> (4 * (sub & 1)) & 0x0f0f0f0fu) | (word_of(high, w) >> sub & 0x01010101u) << 4;
            bytes_to_floats<0>(bits, out + 4 * w);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] = fmaf(dl, out[i], -ml);
    }
};

struct Q6_K {
    static constexpr int kElements = 256, kBytes = 210;  // ql[128], qh[64], scales[16], d
    __host__ __device__ static constexpr int source_of(int to) { return to; }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        int run = run_of(at);
        float dl = unit.half(208) * scale * static_cast<float>(static_cast<int8_t>(unit.u8(192 + (at >> 4))));
        uint4 low = unit.load16(64 * half_of(at) + 32 * (run & 1) + (at & 16)), high = unit.load16(128 + 32 * half_of(at) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t bits = (word_of(low, w) >> (run & 2 ? 4 : 0) & 0x0f0f0f0fu) | (word_of(high, w) >> (2 * run) & 0x03030303u) << 4;
            bytes_to_floats<32>(bits, out + 4 * w);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] *= dl;
    }
};

struct Q8_K {
    static constexpr int kElements = 256, kBytes = 292;  // in the file: float d, qs[256], bsums[16]; here d comes after qs
    __host__ __device__ static constexpr int source_of(int to) { return to < 256 ? 4 + to : to < 260 ? to - 256 : to; }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        float d = bits_to_float(unit.u32(256)) * scale;
        uint4 q = unit.load16(at);
#pragma unroll
        for (int w = 0; w < 4; ++w) signed_bytes_to_floats(word_of(q, w), out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] *= d;
    }
};

struct IQ4_XS {
    static constexpr int kElements = 256, kBytes = 136;  // in the file: d, scales_h, scales_l[4], qs[128]; here qs first
    __host__ __device__ static constexpr int source_of(int to) { return to < 128 ? 8 + to : to - 128; }
    template <class U>
    __device__ static void decode16(const U& unit, int at, float scale, float (&out)[16]) {
        int sub = at >> 5;
        uint32_t low = unit.u8(132 + (sub >> 1)) >> (4 * (sub & 1)) & 0xf, high = unit.u16(130) >> (2 * sub) & 3;
        float dl = unit.half(128) * scale * (static_cast<float>(low | high << 4) - 32.0f);
        uint4 q = unit.load16(16 * sub);
#pragma unroll
        for (int w = 0; w < 4; ++w)
            signed_bytes_to_floats(iq4_values(word_of(q, w) >> (at & 16 ? 4 : 0) & 0x0f0f0f0fu), out + 4 * w);
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] *= dl;
    }
};
