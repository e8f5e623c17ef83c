// Unquantised weights, 64 a unit.
#pragma once
#include "common.cuh"

struct Unquantised {
    static constexpr bool kUnquantised = true;
    static constexpr int kElements = 64;
    __host__ __device__ static constexpr int source_of(int to) { return to; }
};

struct F32 : Unquantised {
    static constexpr int kBytes = 4 * 64;
    template <class U>
    __device__ static void floats(const U& unit, int at, float (&out)[16]) {
#pragma unroll
        for (int i = 0; i < 16; ++i) out[i] = bits_to_float(word_of(unit.load16(4 * at + i / 4 * 16), i % 4));
    }
};

struct F16 : Unquantised {
    static constexpr int kBytes = 2 * 64;
    template <class U>
    __device__ static void floats(const U& unit, int at, float (&out)[16]) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            uint32_t pair = word_of(unit.load16(2 * at + i / 8 * 16), i % 8 / 2);
            out[i] = half_to_float(static_cast<half_t>(i % 2 ? pair >> 16 : pair));
        }
    }
};

struct BF16 : Unquantised {
    static constexpr int kBytes = 2 * 64;
    template <class U>
    __device__ static void floats(const U& unit, int at, float (&out)[16]) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            uint32_t pair = word_of(unit.load16(2 * at + i / 8 * 16), i % 8 / 2);
            out[i] = bits_to_float(i % 2 ? pair & 0xffff0000u : pair << 16);
        }
    }
};
