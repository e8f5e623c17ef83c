// What a block format is to the kernels. Each header in this folder has one struct:
//
//   kElements, kBytes   weights and bytes of a block, as GGUF stores it
//   decode8(block, at, out)   weights at .. at+7 (at a multiple of 8) as float32, with the bits of ggml's dequantize_row_*
//
// Blocks are read in place: a pointer to one is only 2-byte aligned unless kBytes says more.
#pragma once
#include "../include/types.cuh"

__device__ __forceinline__ uint32_t load_u16(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }
__device__ __forceinline__ float load_half(const uint8_t* p) { return half_to_float(*reinterpret_cast<const uint16_t*>(p)); }

// Eight bytes at p, of which kAlign says what address it is a multiple of (2, 4 or 8).
template <int kAlign>
__device__ __forceinline__ uint2 load_8_bytes(const uint8_t* p) {
    if constexpr (kAlign % 8 == 0) {
        return *reinterpret_cast<const uint2*>(p);
    } else if constexpr (kAlign % 4 == 0) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(p);
        return make_uint2(words[0], words[1]);
    } else {
        return make_uint2(load_u16(p) | load_u16(p + 2) << 16, load_u16(p + 4) | load_u16(p + 6) << 16);
    }
}

// Byte i (0..7) of the eight.
__device__ __forceinline__ uint32_t byte_of(uint2 v, int i) { return ((i < 4 ? v.x : v.y) >> (8 * (i & 3))) & 0xff; }
__device__ __forceinline__ float signed_byte_of(uint2 v, int i) {
    return static_cast<float>(static_cast<int8_t>(byte_of(v, i)));
}

// The 16 values of ggml's kvalues_iq4nl (IQ4_NL, IQ4_XS), four a word.
__device__ __forceinline__ float iq4_value(uint32_t q) {
    constexpr uint32_t kValues[4] = {0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535};
    uint32_t low = q & 4 ? kValues[1] : kValues[0], high = q & 4 ? kValues[3] : kValues[2];
    return static_cast<float>(static_cast<int8_t>((q & 8 ? high : low) >> (8 * (q & 3))));
}
