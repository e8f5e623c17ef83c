// The formats whose integers are drawn from tables (ggml-common.h: block_iq1_s ... iq3_s, mxfp4, nvfp4), ternary and
// one-bit ones (tq1_0, tq2_0, q1_0). The grids are handed over as text where a program uses them (codebooks.py):
// GRID_<type>, an entry two words of eight bytes, or one word of four, each word's middle bytes exchanged (common.cuh:
// paired).
#pragma once
#include "kquants.cuh"

// Signs ---------------------------------------------------------------------------------------------------------------
// Flip the halves of pairs q[0..4) where bits 0..7 of `signs` are set.
__device__ __forceinline__ void flip(uint32_t signs, uint32_t* q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] ^= (signs << (15 - 2 * i) & 0x8000u) | (signs << (30 - 2 * i) & 0x80000000u);
}
// Eight signs from seven bits: their number is even.
__device__ __forceinline__ uint32_t even_signs(uint32_t seven) {
    return (seven & 127) | (__popc(seven & 127) & 1) << 7;
}

// Eight bytes as pairs of halves.
__device__ __forceinline__ void grid_to_pairs(uint2 entry, uint32_t* q) {
    bytes_to_pairs<0>(entry.x, q);
    bytes_to_pairs<0>(entry.y, q + 2);
}

// Bytes stand in this order in device memory: all but d, which the file has first, then d.
template <int kSize>
struct HalfLast : KQuant {
    static constexpr int kBytes = kSize, kHalfAt = kSize - 2, kCenter = 0;
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) { return to < kHalfAt ? to + 2 : to - kHalfAt; }
};

// 2 bits: eight magnitudes of 8, 25 and 43 from a grid, and their signs -----------------------------------------------

#ifdef GRID_IQ2_XXS
__device__ const uint2 kGridIQ2_XXS[256] = {GRID_IQ2_XXS};
struct IQ2_XXS : HalfLast<66> {  // (4 bytes of indices, 4 of signs and scale) [8], d
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint32_t index = unit.u32(at / 32 * 8) >> (at & 16), signs = unit.u32(at / 32 * 8 + 4) >> (at & 16 ? 14 : 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            grid_to_pairs(kGridIQ2_XXS[index >> (8 * i) & 255], q + 4 * i);
            flip(even_signs(signs >> (7 * i)), q + 4 * i);
        }
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        d = unit.half(kHalfAt) * (0.5f + static_cast<float>(unit.u32(at / 32 * 8 + 4) >> 28)) * 0.25f;
    }
};
#endif

// The scale of 16 weights where a byte has those of 32.
__device__ __forceinline__ float quarter_scale(uint32_t byte, int at) {
    return (0.5f + static_cast<float>(byte >> (at & 16 ? 4 : 0) & 15)) * 0.25f;
}

#ifdef GRID_IQ2_XS
__device__ const uint2 kGridIQ2_XS[512] = {GRID_IQ2_XS};
struct IQ2_XS : HalfLast<74> {  // (9 bits of index, 7 of signs) [32], scales[8], d
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint32_t both = unit.u32(at / 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            grid_to_pairs(kGridIQ2_XS[both >> (16 * i) & 511], q + 4 * i);
            flip(even_signs(both >> (16 * i + 9)), q + 4 * i);
        }
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        d = unit.half(kHalfAt) * quarter_scale(unit.u8(64 + at / 32), at);
    }
};
#endif

#ifdef GRID_IQ2_S
__device__ const uint2 kGridIQ2_S[1024] = {GRID_IQ2_S};
struct IQ2_S : HalfLast<82> {  // low bits of indices[32], signs[32], high bits[8], scales[8], d
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint32_t low = unit.u16(at / 8), signs = unit.u16(32 + at / 8),
                 high = unit.u8(64 + at / 32) >> (at & 16 ? 4 : 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            grid_to_pairs(kGridIQ2_S[(low >> (8 * i) & 255) | (high >> (2 * i) & 3) << 8], q + 4 * i);
            flip(signs >> (8 * i), q + 4 * i);
        }
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        d = unit.half(kHalfAt) * quarter_scale(unit.u8(72 + at / 32), at);
    }
};
#endif

// 3 bits: four magnitudes from a grid ---------------------------------------------------------------------------------

#ifdef GRID_IQ3_XXS
__device__ const uint32_t kGridIQ3_XXS[256] = {GRID_IQ3_XXS};
struct IQ3_XXS : HalfLast<98> {  // indices[64], (4 x 7 signs, scale) [8], d
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint32_t index = unit.u32(at / 4), signs = unit.u32(64 + at / 32 * 4) >> (at & 16 ? 14 : 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) bytes_to_pairs<0>(kGridIQ3_XXS[index >> (8 * i) & 255], q + 2 * i);
        flip(even_signs(signs), q);
        flip(even_signs(signs >> 7), q + 4);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        d = unit.half(kHalfAt) * (0.5f + static_cast<float>(unit.u32(64 + at / 32 * 4) >> 28)) * 0.5f;
    }
};
#endif

#ifdef GRID_IQ3_S
__device__ const uint32_t kGridIQ3_S[512] = {GRID_IQ3_S};
// Low bits of indices[64], signs[32], ninth bits[8], scales[4], d; the file has the ninth bits before the signs.
struct IQ3_S : HalfLast<110> {
    __host__ __device__ static constexpr int source_of(int to) {
        return to < 64 ? 2 + to : to < 96 ? 74 + to - 64 : to < 104 ? 66 + to - 96 : to < 108 ? 2 + to : to - 108;
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint32_t low = unit.u32(at / 4), signs = unit.u16(64 + at / 8),
                 ninth = unit.u8(96 + at / 32) >> (at & 16 ? 4 : 0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            bytes_to_pairs<0>(kGridIQ3_S[(low >> (8 * i) & 255) | (ninth >> i & 1) << 8], q + 2 * i);
        flip(signs, q);
        flip(signs >> 8, q + 4);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        d = unit.half(kHalfAt) * static_cast<float>(1 + 2 * (unit.u8(104 + at / 64) >> (at & 32 ? 4 : 0) & 15));
    }
};
#endif

// 1 bit and a half: eight of -1, 0 and 1 from a grid, all moved by an eighth up or down. In eighths both are whole
// numbers: the grid here has 8 * value + 15, so that bytes are positive.

#ifdef GRID_IQ1
__device__ const uint2 kGridIQ1[2048] = {GRID_IQ1};
__device__ __forceinline__ void eighths_to_pairs(uint32_t index, bool down, uint32_t* q) {
    uint2 entry = kGridIQ1[index];
    uint32_t by = down ? 0 : 0x02020202u;
    bytes_to_pairs<16>(entry.x + by, q);
    bytes_to_pairs<16>(entry.y + by, q + 2);
}

struct IQ1_S : HalfLast<50> {  // low bits of indices[32], (4 x 3 high bits, scale, direction) [8], d
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint32_t low = unit.u16(at / 8), rest = unit.u16(32 + at / 32 * 2), high = rest >> (at & 16 ? 6 : 0);
        eighths_to_pairs((low & 255) | (high & 7) << 8, rest >> 15, q);
        eighths_to_pairs(low >> 8 | (high >> 3 & 7) << 8, rest >> 15, q + 4);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        d = unit.half(kHalfAt) * static_cast<float>(2 * (unit.u16(32 + at / 32 * 2) >> 12 & 7) + 1) * 0.125f;
    }
};

// Low bits of indices[32], (3 high bits, direction) [32] in half bytes, (4 x 3 bits of scale, 4 of d) [4].
struct IQ1_M : KQuant {
    static constexpr int kBytes = 56, kCenter = 0;
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) { return to; }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint32_t low = unit.u16(at / 8), high = unit.u8(32 + at / 16);
        eighths_to_pairs((low & 255) | (high & 7) << 8, high >> 3 & 1, q);
        eighths_to_pairs(low >> 8 | (high >> 4 & 7) << 8, high >> 7, q + 4);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        uint32_t s[4] = {unit.u16(48), unit.u16(50), unit.u16(52), unit.u16(54)};
        float whole =
            half_to_float(static_cast<half_t>(s[0] >> 12 | (s[1] >> 8 & 0xf0) | (s[2] >> 4 & 0xf00) | (s[3] & 0xf000)));
        uint32_t own = at < 128 ? (at < 64 ? s[0] : s[1]) : (at < 192 ? s[2] : s[3]);
        d = whole * static_cast<float>(2 * (own >> (3 * (at / 16 % 4)) & 7) + 1) * 0.125f;
    }
};
#endif

// -1, 0 and 1 ---------------------------------------------------------------------------------------------------------

struct TQ1_0 : KQuant {  // five ternary digits a byte: qs[48], four: qh[4], d
    static constexpr int kBytes = 54, kCenter = 0;
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) { return to < 48 ? paired(to) : to; }
    // Digits of bytes 0 and 2, and 1 and 3, of a word, less 1, as pairs of halves: a byte is a fraction of 256, whose
    // leading digit is moved to the front by a power of 3.
    __device__ static void digits(uint32_t bytes, uint32_t power, uint32_t* q) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t two = ((bytes >> (8 * i) & 0x00ff00ffu) * power) & 0x00ff00ffu;
            q[i] = half2_add(0x64006400u | (two * 3 >> 8 & 0x00030003u), half2_constant(-1025));
        }
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        int digit = at < 160 ? at / 32 : at < 240 ? (at - 160) / 16 : 0;
        uint32_t power = digit == 0 ? 1 : digit == 1 ? 3 : digit == 2 ? 9 : digit == 3 ? 27 : 81;
        uint4 qs = unit.load16(at < 160 ? at & 16 : 32);
        uint32_t low = unit.u16(48), high = unit.u16(50);
        // Bytes 0, 2, 1, 3: paired.
        uint32_t qh = (low & 0xffu) | (high & 0xffu) << 8 | (low >> 8) << 16 | (high >> 8) << 24;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            constexpr uint32_t kPowers[4] = {1, 3, 9, 27};
            digits(at < 240 ? word_of(qs, w) : qh, at < 240 ? power : kPowers[w], q + 2 * w);
        }
    }
    template <class U>
    __device__ static void affine(const U& unit, int, float& d, float&) {
        d = unit.half(52);
    }
};

struct TQ2_0 : KQuant {  // qs[64], d
    static constexpr int kBytes = 66, kCenter = 0;
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) { return to < 64 ? paired(to) : to; }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(32 * half_of(at) + (at & 16));
#pragma unroll
        for (int w = 0; w < 4; ++w) bytes_to_pairs<1>(word_of(qs, w) >> (2 * run_of(at)) & 0x03030303u, q + 2 * w);
    }
    template <class U>
    __device__ static void affine(const U& unit, int, float& d, float&) {
        d = unit.half(64);
    }
};

struct Q1_0 : KQuant {  // two blocks of 128: (bits[16]) [2], d[2]
    static constexpr int kBytes = 36, kCenter = 0;
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) {
        return to < 32 ? to / 16 * 18 + 2 + to % 16 : (to - 32) / 2 * 18 + to % 2;
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint32_t bits = ~unit.u16(at / 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) q[i] = 0x3c003c00u;  // 1
        flip(bits, q);
        flip(bits >> 8, q + 4);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        d = unit.half(32 + at / 128 * 2);
    }
};

// 4-bit floats: 0, 1, 2, 3, 4, 6, 8, 12 (halves of E2M1's values) and their negatives ---------------------------------

// Of four numbers 0..15, one a byte: four signed bytes.
__device__ __forceinline__ uint32_t e2m1_values(uint32_t q) {
    return table_values(q, 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu);
}

struct MXFP4 : KQuant {  // eight blocks: qs[16] [8], exponents[8]
    static constexpr int kBytes = 136, kCenter = 0;
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) {
        return to < 128 ? to / 16 * 17 + 1 + paired(to % 16) : (to - 128) * 17;
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint4 qs = unit.load16(at / 32 * 16);
#pragma unroll
        for (int w = 0; w < 4; ++w)
            signed_bytes_to_pairs(e2m1_values(word_of(qs, w) >> (at & 16 ? 4 : 0) & 0x0f0f0f0fu), q + 2 * w);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        uint32_t e = unit.u8(128 + at / 32);  // ggml_e8m0_to_fp32_half
        d = bits_to_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
};

struct NVFP4 : KQuant {  // four blocks of 64: qs[32] [4], scales[4] [4]
    static constexpr int kBytes = 144, kCenter = 0;
    static constexpr bool kHasMin = false;
    __host__ __device__ static constexpr int source_of(int to) {
        return to < 128 ? to / 32 * 36 + 4 + paired(to % 32) : (to - 128) / 4 * 36 + to % 4;
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            uint32_t eight = unit.u32(at / 2 + 4 * w);
            signed_bytes_to_pairs(e2m1_values(eight & 0x0f0f0f0fu), q + 2 * w);
            signed_bytes_to_pairs(e2m1_values(eight >> 4 & 0x0f0f0f0fu), q + 2 * w + 4);
        }
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        uint32_t s = unit.u8(128 + at / 16), e = s >> 3 & 15, mantissa = s & 7;  // ggml_ue4m3_to_fp32, halved
        float normal = bits_to_float((e + 119) << 23 | mantissa << 20),
              subnormal = static_cast<float>(mantissa) * 0x1p-10f;
        d = s == 0x7f ? 0.0f : e ? normal : subnormal;
    }
};
