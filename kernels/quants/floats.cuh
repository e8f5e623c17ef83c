// Unquantised weights, 128 a unit.
#pragma once
#include "common.cuh"

struct Unquantised {
    static constexpr bool kUnquantised = true, kShared = false, kHeader = false, kByBits = false;
    static constexpr int kElements = 128;
    __host__ __device__ static constexpr int source_of(int to) { return to; }
};

struct F32 : Unquantised {
    static constexpr int kBytes = 4 * 128;
    template <class U>
    __device__ static void floats(const U& unit, int at, float (&out)[16]) {
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
            uint4 words = unit.load16(4 * at + 16 * piece);
#pragma unroll
            for (int w = 0; w < 4; ++w) out[4 * piece + w] = bits_to_float(word_of(words, w));
        }
    }
};

template <bool kBrain>
struct TwoBytes : Unquantised {
    static constexpr int kBytes = 2 * 128;
    template <class U>
    __device__ static void floats(const U& unit, int at, float (&out)[16]) {
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
            uint4 words = unit.load16(2 * at + 16 * piece);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                uint32_t pair = word_of(words, i / 2);
                if (kBrain) out[8 * piece + i] = bits_to_float(i % 2 ? pair & 0xffff0000u : pair << 16);
                else out[8 * piece + i] = half_to_float(static_cast<half_t>(i % 2 ? pair >> 16 : pair));
            }
        }
    }
};
struct F16 : TwoBytes<false> {};
struct BF16 : TwoBytes<true> {};
