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
    static constexpr bool kUnquantised = false, kShared = false, kHeader = false, kByBits = false;
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

// Q4_K and Q5_K begin with d, dmin and eight pairs of scale and minimum, six bits each, of 32 weights; 64 weights share
// 32 bytes of nibbles. A pair is 12 bits in device memory. Those of 64 weights are three bytes, the low ones of a word
// for the first 192 weights; the last three bytes are the high ones of these three words.
struct Affine4 : KQuant {
    static constexpr bool kHasMin = true, kShared = true, kHeader = true, kByBits = true;

    // Byte `to` of the twelve, of those in the file (get_scale_min_k4).
    template <class Bytes>
    __host__ __device__ static uint32_t pairs_byte(const Bytes& from, int to) {
        auto pair = [&](int i) -> uint32_t {
            uint32_t low = from[i], high = from[i + 4];
            if (i < 4) return (low & 63) | (high & 63) << 6;
            return (high & 15) | (from[i - 4] >> 6) << 4 | (high >> 4) << 6 | (low >> 6) << 10;
        };
        int word = to / 4, at = to % 4, first = at == 3 ? 6 : 2 * word, byte = at == 3 ? word : at;
        return (pair(first) | pair(first + 1) << 12) >> 8 * byte & 255;
    }
    // The nibble of weight w, of bytes from `qs` on.
    template <class Bytes>
    __host__ __device__ static uint32_t nibble(const Bytes& from, int qs, int w) {
        return nibble_of(from[qs + w / 64 * 32 + w % 32], w / 32 % 2);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float& m) {
        uint4 header = unit.load16(0);
        uint32_t last = __byte_perm(__byte_perm(header.y, header.z, 0x0073), header.w, 0x0710);
        int quarter = unit.quarter(at);
        uint32_t pair = (quarter < 3 ? word_of(header, 1 + quarter) : last) >> (at & 32 ? 12 : 0);
        d = half_to_float(static_cast<half_t>(header.x)) * unit.scale() * static_cast<float>(pair & 63);
        m = half_to_float(static_cast<half_t>(header.x >> 16)) * (unit.scale() * 0.015625f) *
            static_cast<float>(pair & 63 << 6);
    }
};

struct Q4_K : Affine4 {
    static constexpr int kBytes = 144, kCenter = 8;  // d, dmin, scales[12], qs[128]
    template <class Bytes>
    __host__ __device__ static uint32_t byte_of(const Bytes& from, int to) {
        if (to < 4) return from[to];
        if (to < 16) return pairs_byte(from + 4, to - 4);
        return nibbles_byte(to - 16, [&](int w) { return nibble(from, 16, w); });
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        four_bit_pairs<kCenter>(unit.bits(), unit.load8(16 + at / 2), q);
    }
};

struct Q5_K : Affine4 {
    static constexpr int kBytes = 176, kCenter = 16;  // d, dmin, scales[12], qh[32], qs[128]
    template <class Bytes>
    __host__ __device__ static uint32_t byte_of(const Bytes& from, int to) {
        if (to < 4) return from[to];
        if (to < 16) return pairs_byte(from + 4, to - 4);
        if (to < 48) return fifth_bits_byte(to - 16, [&](int w) { return from[16 + w % 32] >> w / 32 & 1; });
        return nibbles_byte(to - 48, [&](int w) { return nibble(from, 48, w); });
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        five_bit_pairs<kCenter>(unit.bits(), unit.load8(48 + at / 2), unit.u32(16 + at / 32 * 4), at, q);
    }
};

struct Q6_K : KQuant {
    static constexpr int kBytes = 210, kCenter = 0;  // ql[128], qh[64], scales[16], d
    static constexpr bool kHasMin = false, kHeader = true, kByBits = true;

    // The high two bits of 16 weights are a word: of pair i of the first eight weights at bit high_at(i) of its halves,
    // and of the others, when the bytes of both halves are exchanged.
    __host__ __device__ static constexpr int high_at(int pair) { return 4 + pair % 2 * 4 + pair / 2 * 2; }
    template <class Bytes>
    __host__ __device__ static uint32_t byte_of(const Bytes& from, int to) {
        if (to >= 192) return from[to];
        // ql has two nibbles a byte of weights 64 apart, qh four pairs of bits of weights 32 apart.
        if (to < 128)
            return nibbles_byte(to, [&](int w) { return nibble_of(from[w / 128 * 64 + w % 64], w / 64 % 2); });
        int at = to - 128;
        uint32_t byte = 0;
        for (int pair = 0; pair < 4; ++pair) {
            int exchanged = high_at(pair) / 8 != at % 2, w = at / 4 * 16 + exchanged * 8 + 2 * pair + at / 2 % 2;
            byte |= (from[128 + w / 128 * 32 + w % 32] >> w / 32 % 4 * 2 & 3u) << high_at(pair) % 8;
        }
        return byte;
    }
    template <class U>
    __device__ static void integers(const U& unit, int at, uint32_t (&q)[8]) {
        uint2 nibbles = unit.load8(at / 2);
        uint32_t high = unit.u32(128 + at / 4);
        const HalfBits bits = unit.bits();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i == 4) high = __byte_perm(high, 0, 0x2301);
            uint32_t shifted = high >> i / 2 % 2 * 2;
            q[i] = nibble_pair(
                nibbles, i, i % 2 ? and_or(shifted, 0x03000300u, bits.odd) : and_or(shifted, 0x00300030u, bits.even));
        }
        center_pairs<32>(q);
    }
    template <class U>
    __device__ static void affine(const U& unit, int at, float& d, float&) {
        uint4 scales = unit.load16(192);
        int scale = signed_byte(word_of(scales, unit.quarter(at)), at / 16 % 4);
        d = unit.half(208) * unit.scale() * static_cast<float>(scale);
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
