// Unquantised weights: "blocks" of one, so rows of any length; decode1 takes the place of decode8.
#pragma once
#include "common.cuh"

struct F32 {
    static constexpr int kElements = 1, kBytes = 4;
    __device__ static float decode1(const uint8_t* p) { return *reinterpret_cast<const float*>(p); }
};

struct F16 {
    static constexpr int kElements = 1, kBytes = 2;
    __device__ static float decode1(const uint8_t* p) { return load_half(p); }
};

struct BF16 {
    static constexpr int kElements = 1, kBytes = 2;
    __device__ static float decode1(const uint8_t* p) { return bits_to_float(load_u16(p) << 16); }
};
