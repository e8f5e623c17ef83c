// What a block format is to the kernels, and how weights lie in device memory.
//
// Each quantised struct of this folder is one ggml type. A unit is a run of a row's weights: a K-quant's super-block of
// 256, eight blocks of 32, or 128 unquantised weights. A weight is d * (q + kCenter) - m, where q is a small integer,
// exact in half precision, that was moved to lie about 0. A struct has:
//   kElements               weights of a unit
//   kBytes                  bytes of a unit, as many as in the file
//   source_of(to)           which byte of the unit as GGUF stores it becomes byte `to` in device memory (the repack
//                           kernel asks): fields are gathered so that all are aligned, and packed integers stand as
//                           `paired` says
//   integers(unit, at, q)   q of weights at .. at + 15, as eight pairs of halves; at is a multiple of 16
//   affine(unit, at, d, m)  their d and m; kHasMin says whether there is an m; kShared, whether they are costly to make
//                           and there is one pair for 32 weights from a multiple of 32 on
// decode_floats and decode_halves below make weights of these; unquantised types bring functions of their own.
//
// A matrix is stored in weight tiles of kTileRows rows by one unit, [row tile][unit]: the tiles of one row tile follow
// one another. Within a weight tile the 16-byte pieces of the units stand transposed, [piece][row ^ 2 * (piece % 4)];
// what is left of the units, kBytes % 16, comes last, [row]. A weight tile is thus one contiguous copy, and shared
// memory is read without bank conflicts both by a warp that takes a row a lane and by one whose four neighbouring lanes
// take four pieces of a row. Rows and columns past the matrix's are zero bytes, which every format decodes to 0.
#pragma once
#include "../include/types.cuh"

constexpr int kTileRows = TILE_ROWS;
static_assert(kTileRows == 32, "a warp takes a row tile with a row a lane");

// The unit of row `row` of a weight tile, whose units have kBytes bytes.
template <int kBytes>
struct Unit {
    static constexpr int kWhole = kBytes / 16 * 16, kTail = kBytes % 16;
    const uint8_t* tile;
    int row;

    __device__ const uint8_t* at(int offset) const {
        return offset < kWhole ? tile + offset / 16 * (16 * kTileRows) + (row ^ swizzle(offset / 16)) * 16 + offset % 16
                               : tile + kWhole * kTileRows + row * kTail + offset % 16;
    }
    __device__ static int swizzle(int piece) { return 2 * (piece % 4); }
    __device__ uint4 load16(int offset) const { return *reinterpret_cast<const uint4*>(at(offset)); }
    __device__ uint32_t u32(int offset) const { return *reinterpret_cast<const uint32_t*>(at(offset)); }
    __device__ uint32_t u16(int offset) const { return *reinterpret_cast<const uint16_t*>(at(offset)); }
    __device__ uint32_t u8(int offset) const { return *at(offset); }
    __device__ float half(int offset) const { return half_to_float(static_cast<half_t>(u16(offset))); }
};

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Packed integers -----------------------------------------------------------------------------------------------------
// Two bytes that are 16 bits apart become a pair of halves at once. So the middle two bytes of each word are exchanged
// when weights are repacked: bytes 0 and 2 are then neighbouring weights, and bytes 1 and 3 the two after them.
__host__ __device__ constexpr int paired(int to) {
    return (to & ~3) | (to & 1) << 1 | (to >> 1 & 1);
}

// Makes two pairs of halves, less kOffset, of the four bytes of a word: 0x6400 | i is the half 1024 + i, and the
// difference is exact.
template <int kOffset>
__device__ __forceinline__ void bytes_to_pairs(uint32_t word, uint32_t* q) {
    constexpr uint32_t kLess = half2_constant(-(1024 + kOffset));
    q[0] = half2_add(__byte_perm(word, 0x64646464u, 0x4240), kLess);
    q[1] = half2_add(__byte_perm(word, 0x64646464u, 0x4341), kLess);
}
__device__ __forceinline__ void signed_bytes_to_pairs(uint32_t word, uint32_t* q) {
    bytes_to_pairs<128>(word ^ 0x80808080u, q);
}

// Looks up four numbers 0 .. 15, one a byte of q, in a table of 16 bytes, whose four words are given.
__device__ __forceinline__ uint32_t table_values(uint32_t q, uint32_t t0, uint32_t t4, uint32_t t8, uint32_t t12) {
    uint32_t low3 = q & 0x07070707u;
    low3 = (low3 | low3 >> 4) & 0x00ff00ffu;
    uint32_t selector = (low3 | low3 >> 8) & 0xffffu;
    uint32_t low = __byte_perm(t0, t4, selector), high = __byte_perm(t8, t12, selector);
    uint32_t mask = (q >> 3 & 0x01010101u) * 0xffu;
    return (low & ~mask) | (high & mask);
}
// ggml's kvalues_iq4nl (IQ4_NL, IQ4_XS): signed bytes.
__device__ __forceinline__ uint32_t iq4_values(uint32_t q) {
    return table_values(q, 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
}

// Loading ahead -------------------------------------------------------------------------------------------------------
// What `integers` and `affine` read for 16 weights, in the order in which they read it. They run twice: first to load,
// when the compiler drops what they compute; and again, when the loads have come, to decode.
struct Fields {
    uint4 pieces[4];
    uint32_t values[6];
};
template <class Format, bool kLoads>
struct Reader {
    Fields& fields;
    Unit<Format::kBytes> unit;  // where kLoads
    mutable int pieces = 0, values = 0;

    __device__ uint4 load16(int offset) const {
        return kLoads ? fields.pieces[pieces++] = unit.load16(offset) : fields.pieces[pieces++];
    }
    __device__ uint32_t u32(int offset) const {
        return kLoads ? fields.values[values++] = unit.u32(offset) : fields.values[values++];
    }
    __device__ uint32_t u16(int offset) const {
        return kLoads ? fields.values[values++] = unit.u16(offset) : fields.values[values++];
    }
    __device__ uint32_t u8(int offset) const {
        return kLoads ? fields.values[values++] = unit.u8(offset) : fields.values[values++];
    }
    __device__ float half(int offset) const { return half_to_float(static_cast<half_t>(u16(offset))); }
};

// Weights -------------------------------------------------------------------------------------------------------------

// What is read for the sixteen weights at `at` of row `row`'s unit: their integers (or weights, where these are not
// quantised), and their d and m.
template <class Format, bool kIntegers = true, bool kAffine = true>
__device__ __forceinline__ Fields load_fields(const uint8_t* tile, int row, int at) {
    Fields fields;
    Reader<Format, true> unit{fields, {tile, row}};
    if constexpr (Format::kUnquantised) {
        float w[16];
        Format::floats(unit, at, w);
    } else {
        uint32_t q[8];
        float d, m;
        if constexpr (kIntegers) Format::integers(unit, at, q);
        if constexpr (kAffine) Format::affine(unit, at, d, m);
    }
    return fields;
}

// Sixteen weights, at `at` of a unit, in float32, with the bits of ggml's dequantize_row_*: the products are exact, so
// only the last step rounds.
template <class Format>
__device__ __forceinline__ void decode_floats(const uint8_t* tile, int row, int at, float (&out)[16]) {
    Unit<Format::kBytes> unit{tile, row};
    if constexpr (Format::kUnquantised) {
        Format::floats(unit, at, out);
    } else {
        uint32_t q[8];
        float d, m;
        Format::integers(unit, at, q);
        Format::affine(unit, at, d, m);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float integer = half_to_float(static_cast<half_t>(i % 2 ? q[i / 2] >> 16 : q[i / 2])) + Format::kCenter;
            out[i] = Format::kHasMin ? fmaf(d, integer, -m) : d * integer;
        }
    }
}

// The sixteen weights whose fields were loaded, at `at` of their unit, times `scale`, a power of two, as pairs of
// halves. d and d * kCenter - m are rounded to halves first, each to half a unit in the weight's last place, as the
// result is too.
template <class Format>
__device__ __forceinline__ void decode_halves(Fields& fields, int at, float scale, uint32_t (&out)[8]) {
    Reader<Format, false> unit{fields, {}};
    if constexpr (Format::kUnquantised) {
        float w[16];
        Format::floats(unit, at, w);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = pack_half2(w[2 * i] * scale, w[2 * i + 1] * scale);
    } else {
        float d, m;
        Format::integers(unit, at, out);
        Format::affine(unit, at, d, m);
        d *= scale;
        uint32_t slope = pack_half2(d, d);
        if constexpr (Format::kHasMin) {
            float c = fmaf(d, Format::kCenter, -m * scale);
            uint32_t shift = pack_half2(c, c);
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] = half2_fma(out[i], slope, shift);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] = half2_multiply(out[i], slope);
        }
    }
}

// decode_halves in two parts, for what loads them by themselves: d * scale in the low half of a word, and what is added
// to the products of sixteen weights' integers in the high half; and the weights that follow from these.
template <class Format>
__device__ __forceinline__ uint32_t decode_affine(Fields& fields, int at, float scale) {
    float d, m;
    Format::affine(Reader<Format, false>{fields, {}}, at, d, m);
    d *= scale;
    return pack_half2(d, fmaf(d, Format::kCenter, -m * scale));
}
template <class Format>
__device__ __forceinline__ void decode_halves(Fields& fields, int at, uint32_t affine, uint32_t (&out)[8]) {
    Format::integers(Reader<Format, false>{fields, {}}, at, out);
    uint32_t slope = __byte_perm(affine, 0, 0x1010), shift = __byte_perm(affine, 0, 0x3232);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = half2_fma(out[i], slope, shift);
}
