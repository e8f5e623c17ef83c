// The 256-weight super-blocks: Q2_K ... Q6_K, Q8_K, IQ4_XS (ggml-common.h, block_q2_K ... ; dequantize_row_q*_K).
// A weight is d · scale · q − dmin · min; the products are exact in float32, so only the last step rounds, as in ggml.
#pragma once
#include "common.cuh"

// Where weights at .. at+7 of Q2_K, Q3_K and Q6_K lie: halves of 128 weights, four runs of 32 in each.
struct Run {
    int half, run, offset, scale;  // 0..1, 0..3, 0..31, index of the 16-weight scale
    __device__ explicit Run(int at) : half(at >> 7), run(at >> 5 & 3), offset(at & 31), scale(at >> 4) {}
};

struct Q2_K {
    static constexpr int kElements = 256, kBytes = 84;  // scales[16], qs[64], d, dmin
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        Run r(at);
        uint32_t scale = block[r.scale];
        float dl = load_half(block + 80) * static_cast<float>(scale & 0xf);
        float ml = load_half(block + 82) * static_cast<float>(scale >> 4);
        uint2 qs = load_8_bytes<4>(block + 16 + 32 * r.half + r.offset);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = fmaf(dl, static_cast<float>(byte_of(qs, i) >> (2 * r.run) & 3), -ml);
    }
};

struct Q3_K {
    static constexpr int kElements = 256, kBytes = 110;  // hmask[32], qs[64], scales[12], d
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        Run r(at);
        const uint8_t* scales = block + 96;
        uint32_t low = scales[r.scale & 7] >> (r.scale & 8 ? 4 : 0) & 0xf;
        uint32_t high = scales[8 + (r.scale & 3)] >> (2 * (r.scale >> 2)) & 3;
        float dl = load_half(block + 108) * (static_cast<float>(low | high << 4) - 32.0f);
        uint2 qs = load_8_bytes<2>(block + 32 + 32 * r.half + r.offset), mask = load_8_bytes<2>(block + r.offset);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            uint32_t q = (byte_of(qs, i) >> (2 * r.run) & 3) | (byte_of(mask, i) >> (at >> 5) & 1) << 2;
            out[i] = dl * (static_cast<float>(q) - 4.0f);
        }
    }
};

// The 6-bit scale and minimum of 32-weight run `sub` (0..7): ggml's get_scale_min_k4.
__device__ __forceinline__ void scale_min_k4(const uint8_t* scales, int sub, float& scale, float& min) {
    if (sub < 4) {
        scale = static_cast<float>(scales[sub] & 63);
        min = static_cast<float>(scales[sub + 4] & 63);
    } else {
        scale = static_cast<float>((scales[sub + 4] & 0xf) | (scales[sub - 4] >> 6) << 4);
        min = static_cast<float>((scales[sub + 4] >> 4) | (scales[sub] >> 6) << 4);
    }
}

struct Q4_K {
    static constexpr int kElements = 256, kBytes = 144;  // d, dmin, scales[12], qs[128]
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        int sub = at >> 5;
        float scale, min;
        scale_min_k4(block + 4, sub, scale, min);
        float dl = load_half(block) * scale, ml = load_half(block + 2) * min;
        uint2 qs = load_8_bytes<8>(block + 16 + 32 * (sub >> 1) + (at & 31));
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = fmaf(dl, static_cast<float>(byte_of(qs, i) >> (4 * (sub & 1)) & 0xf), -ml);
    }
};

struct Q5_K {
    static constexpr int kElements = 256, kBytes = 176;  // d, dmin, scales[12], qh[32], qs[128]
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        int sub = at >> 5;
        float scale, min;
        scale_min_k4(block + 4, sub, scale, min);
        float dl = load_half(block) * scale, ml = load_half(block + 2) * min;
        uint2 qh = load_8_bytes<8>(block + 16 + (at & 31));
        uint2 qs = load_8_bytes<8>(block + 48 + 32 * (sub >> 1) + (at & 31));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            uint32_t q = (byte_of(qs, i) >> (4 * (sub & 1)) & 0xf) | (byte_of(qh, i) >> sub & 1) << 4;
            out[i] = fmaf(dl, static_cast<float>(q), -ml);
        }
    }
};

struct Q6_K {
    static constexpr int kElements = 256, kBytes = 210;  // ql[128], qh[64], scales[16], d
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        Run r(at);
        float dl = load_half(block + 208) * static_cast<float>(static_cast<int8_t>(block[192 + r.scale]));
        uint2 ql = load_8_bytes<2>(block + 64 * r.half + 32 * (r.run & 1) + r.offset);
        uint2 qh = load_8_bytes<2>(block + 128 + 32 * r.half + r.offset);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            uint32_t q = (byte_of(ql, i) >> (r.run & 2 ? 4 : 0) & 0xf) | (byte_of(qh, i) >> (2 * r.run) & 3) << 4;
            out[i] = dl * (static_cast<float>(q) - 32.0f);
        }
    }
};

struct Q8_K {
    static constexpr int kElements = 256, kBytes = 292;  // float d, qs[256], bsums[16]
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        float d = *reinterpret_cast<const float*>(block);
        uint2 qs = load_8_bytes<4>(block + 4 + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = d * signed_byte_of(qs, i);
    }
};

struct IQ4_XS {
    static constexpr int kElements = 256, kBytes = 136;  // d, scales_h, scales_l[4], qs[128]
    __device__ static void decode8(const uint8_t* block, int at, float (&out)[8]) {
        int sub = at >> 5;
        uint32_t low = block[4 + (sub >> 1)] >> (4 * (sub & 1)) & 0xf, high = load_u16(block + 2) >> (2 * sub) & 3;
        float dl = load_half(block) * (static_cast<float>(low | high << 4) - 32.0f);
        uint2 qs = load_8_bytes<8>(block + 8 + 16 * sub + (at & 8));
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = dl * iq4_value(byte_of(qs, i) >> (at & 16 ? 4 : 0) & 0xf);
    }
};
