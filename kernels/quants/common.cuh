// What a block format is to the kernels, and how weights lie in device memory.
//
// Each struct of this folder is one ggml type:
//   kElements   weights of a unit: 256 (a K-quant super-block, or eight 32-weight blocks), 64 for unquantised types
//   kBytes      bytes of a unit, as many as in the file
//   source_of(to)   which byte of the unit as GGUF stores it becomes byte `to` here (repack.cu asks): fields are gathered
//                   so that all are aligned
//   decode16(unit, at, scale, out)   scale * weights at .. at+15 (at a multiple of 16), scale a power of two: with
//                   scale 1 they have the bits of ggml's dequantize_row_*
//
// A matrix is stored in tiles of kTileRows rows by one unit, [row tile][unit column]; within a tile the units' 16-byte
// pieces stand transposed, [piece][row], and what is left of them (kBytes % 16) last, [row]. A warp that takes a row a
// lane thus reads 512 bytes in a run, from global memory or, without bank conflicts, from shared; and a tile is one
// contiguous copy. Rows and columns past the matrix's are zero bytes, which every format decodes to 0.
#pragma once
#include "../include/types.cuh"

constexpr int kTileRows = 64;

// Row `row` of a tile whose units have kBytes bytes.
template <int kBytes>
struct Unit {
    static constexpr int kWhole = kBytes / 16 * 16, kTail = kBytes % 16;
    const uint8_t* tile;
    int row;

    __device__ const uint8_t* at(int offset) const {
        return offset < kWhole ? tile + offset / 16 * (16 * kTileRows) + row * 16 + offset % 16
                               : tile + kWhole * kTileRows + row * kTail + offset % 16;
    }
    __device__ uint4 load16(int offset) const { return *reinterpret_cast<const uint4*>(at(offset)); }
    __device__ uint32_t u32(int offset) const { return *reinterpret_cast<const uint32_t*>(at(offset)); }
    __device__ uint32_t u16(int offset) const { return *reinterpret_cast<const uint16_t*>(at(offset)); }
    __device__ uint32_t u8(int offset) const { return *at(offset); }
    __device__ float half(int offset) const { return half_to_float(static_cast<half_t>(u16(offset))); }
};

template <class Format>
__device__ __forceinline__ Unit<Format::kBytes> unit_of(const uint8_t* tile, int row) {
    return {tile, row};
}

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// The four unsigned bytes of a word, less kOffset, as floats: 0x4b0000qq is 2^23 + qq, and the difference is exact.
template <int kOffset>
__device__ __forceinline__ void bytes_to_floats(uint32_t word, float* out) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out[i] = bits_to_float(__byte_perm(word, 0x4b000000u, 0x7650 | i)) - static_cast<float>(8388608 + kOffset);
}

// The four signed bytes of a word as floats.
__device__ __forceinline__ void signed_bytes_to_floats(uint32_t word, float* out) {
    bytes_to_floats<128>(word ^ 0x80808080u, out);
}

// ggml's kvalues_iq4nl (IQ4_NL, IQ4_XS) of four numbers 0..15, one a byte: four signed bytes.
__device__ __forceinline__ uint32_t iq4_values(uint32_t q) {
    uint32_t low3 = q & 0x07070707u;
    low3 = (low3 | low3 >> 4) & 0x00ff00ffu;
    uint32_t selector = (low3 | low3 >> 8) & 0xffffu;
    uint32_t low = __byte_perm(0xbfad9881u, 0xf6eaddcfu, selector), high = __byte_perm(0x26190d01u, 0x71594535u, selector);
    uint32_t mask = (q >> 3 & 0x01010101u) * 0xffu;
    return (low & ~mask) | (high & mask);
}
