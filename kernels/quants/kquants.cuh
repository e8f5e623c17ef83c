// The 256-weight super-blocks: Q2_K ... Q6_K, Q8_K, IQ4_XS (ggml-common.h, block_q2_K ...; dequantize_row_q*_K).
#pragma once
#include "common.cuh"

// Q2_K, Q3_K and Q6_K hold two halves of 128 weights, each four runs of 32 that share bytes.
__device__ __forceinline__ int half_of(int at) {
    return at >> 7;
}
__device__ __forceinline__ int run_of(int at) {
    return at >> 5 & 3;
}

struct KQuant {
    static constexpr bool kUnquantised = false, kShared = false;
    static constexpr int kElements = 256;
};

struct Q2_K : KQuant {
    static constexpr int kBytes = 84, kCenter = 1;  // scales[16], qs[64], d, dmin
    static constexpr bool kHasMin = true;
    __host__ __device__ static constexpr int source_of(int to) { return to >= 16 && to < 80 ? paired(to) : to; }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(16 + 32 * half_of(at) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w)
            bytes_to_pairs<kCenter>(word_of(qs, w) >> (2 * run_of(at)) & 0x03030303u, q + 2 * w);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float& m) {
        uint32_t s = unit.u8(at >> 4);
        d = unit.half(80) * static_cast<float>(s & 0xf);
        m = unit.half(82) * static_cast<float>(s >> 4);
    }
};

struct Q3_K : KQuant {
    static constexpr int kBytes = 110, kCenter = 0;  // hmask[32], qs[64], scales[12], d
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) { return to < 96 ? paired(to) : to; }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(32 + 32 * half_of(at) + (at & 16)), mask = unit.load16(at & 16);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t low = word_of(qs, w) >> (2 * run_of(at)) & 0x03030303u;
            bytes_to_pairs<4>(low | (word_of(mask, w) >> (at >> 5) & 0x01010101u) << 2, q + 2 * w);
        }
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        int s = at >> 4;
        uint32_t low = unit.u8(96 + (s & 7)) >> (s & 8 ? 4 : 0) & 0xf,
                 high = unit.u8(104 + (s & 3)) >> (2 * (s >> 2)) & 3;
        d = unit.half(108) * (static_cast<float>(low | high << 4) - 32.0f);
    }
};

// Q4_K and Q5_K begin with d, dmin and eight 6-bit pairs of scale and minimum: ggml's get_scale_min_k4 for run `sub`.
__device__ __forceinline__ void scale_and_min(const uint4& header, int sub, float& d, float& m) {
    auto byte = [&](int i) { return word_of(header, 1 + i / 4) >> (8 * (i % 4)) & 0xff; };
    uint32_t scale, min;
    if (sub < 4) {
        scale = byte(sub) & 63;
        min = byte(sub + 4) & 63;
    } else {
        scale = (byte(sub + 4) & 0xf) | (byte(sub - 4) >> 6) << 4;
        min = byte(sub + 4) >> 4 | (byte(sub) >> 6) << 4;
    }
    d = half_to_float(static_cast<half_t>(header.x)) * static_cast<float>(scale);
    m = half_to_float(static_cast<half_t>(header.x >> 16)) * static_cast<float>(min);
}

struct Q4_K : KQuant {
    static constexpr int kBytes = 144, kCenter = 8;  // d, dmin, scales[12], qs[128]
    static constexpr bool kHasMin = true, kShared = true;
    __host__ __device__ static constexpr int source_of(int to) { return to < 16 ? to : paired(to); }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(16 + 32 * (at >> 6) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_pairs<kCenter>(word_of(qs, w) >> (at >> 3 & 4) & 0x0f0f0f0fu, q + 2 * w);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float& m) {
        scale_and_min(unit.load16(0), at >> 5, d, m);
    }
};

struct Q5_K : KQuant {
    static constexpr int kBytes = 176, kCenter = 16;  // d, dmin, scales[12], qh[32], qs[128]
    static constexpr bool kHasMin = true, kShared = true;
    __host__ __device__ static constexpr int source_of(int to) { return to < 16 ? to : paired(to); }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 high = unit.load16(16 + (at & 16)), qs = unit.load16(48 + 32 * (at >> 6) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t low = word_of(qs, w) >> (at >> 3 & 4) & 0x0f0f0f0fu;
            bytes_to_pairs<kCenter>(low | (word_of(high, w) >> (at >> 5) & 0x01010101u) << 4, q + 2 * w);
        }
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float& m) {
        scale_and_min(unit.load16(0), at >> 5, d, m);
    }
};

struct Q6_K : KQuant {
    static constexpr int kBytes = 210, kCenter = 0;  // ql[128], qh[64], scales[16], d
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) { return to < 192 ? paired(to) : to; }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        int run = run_of(at);
        uint4 ql = unit.load16(64 * half_of(at) + 32 * (run & 1) + (at & 16)),
              qh = unit.load16(128 + 32 * half_of(at) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            uint32_t low = word_of(ql, w) >> (run & 2 ? 4 : 0) & 0x0f0f0f0fu;
            bytes_to_pairs<32>(low | (word_of(qh, w) >> (2 * run) & 0x03030303u) << 4, q + 2 * w);
        }
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        d = unit.half(208) * static_cast<float>(static_cast<int8_t>(unit.u8(192 + (at >> 4))));
    }
};

struct Q8_K : KQuant {
    static constexpr int kBytes = 292, kCenter = 0;  // in the file: float d, qs[256], bsums[16]; here d comes after qs
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) {
        return to < 256 ? 4 + paired(to) : to < 260 ? to - 256 : to;
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(at);
#pragma unroll
        for (int w = 0; w < 4; ++w) signed_bytes_to_pairs(word_of(qs, w), q + 2 * w);
    }
    template <class U>
    __device__ static void affine(const U& unit, int, float& d, float&) {
        d = bits_to_float(unit.u32(256));
    }
};

struct IQ4_XS : KQuant {
    static constexpr int kBytes = 136, kCenter = 0;  // in the file: d, scales_h, scales_l[4], qs[128]; here qs first
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) { return to < 128 ? 8 + paired(to) : to - 128; }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(at >> 5 << 4);
#pragma unroll
        for (int w = 0; w < 4; ++w)
            signed_bytes_to_pairs(iq4_values(word_of(qs, w) >> (at & 16 ? 4 : 0) & 0x0f0f0f0fu), q + 2 * w);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        int sub = at >> 5;
        uint32_t low = unit.u8(132 + (sub >> 1)) >> (4 * (sub & 1)) & 0xf, high = unit.u16(130) >> (2 * sub) & 3;
        d = unit.half(128) * (static_cast<float>(low | high << 4) - 32.0f);
    }
};
