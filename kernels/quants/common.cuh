// What a block format is to the kernels, and how weights lie in device memory.
//
// Each quantised struct of this folder is one ggml type. A unit is a run of a row's weights: a K-quant's super-block of
// 256, eight blocks of 32, or 128 unquantised weights. A weight is d * (q + kCenter) - m, where q is a small integer,
// exact in half precision, that was moved to lie about 0. A struct has:
//   kElements               weights of a unit
//   kBytes                  bytes of a unit, as many as in the file
//   source_of(to)           which byte of the unit as GGUF stores it becomes byte `to` in device memory (the repack
//                           kernel asks): fields are gathered so that all are aligned, and packed integers stand as
//                           `paired` says. Or, where kByBits, byte_of(from, to): byte `to`, of bits of several bytes
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

// The bits that make halves of pairs of nibbles (below): of even and of odd pairs.
struct HalfBits {
    uint32_t even = 0x64006400u, odd = 0x54005400u;
};

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
    __device__ uint2 load8(int offset) const { return *reinterpret_cast<const uint2*>(at(offset)); }
    __device__ uint32_t u32(int offset) const { return *reinterpret_cast<const uint32_t*>(at(offset)); }
    __device__ uint32_t u16(int offset) const { return *reinterpret_cast<const uint16_t*>(at(offset)); }
    __device__ uint32_t u8(int offset) const { return *at(offset); }
    __device__ float half(int offset) const { return half_to_float(static_cast<half_t>(u16(offset))); }
    __device__ static HalfBits bits() { return {}; }
    __device__ static float scale() { return 1.0f; }
    __device__ static int quarter(int at) { return at / 64; }
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

// Nibbles, the low four bits of 16 neighbouring weights, are eight bytes of device memory. Pair i of the weights, of
// eight, is in word i / 4 of these, at bits 4 * (i % 4) of its lower and of its upper half. So a pair becomes halves by
// one instruction: where i is even 0x6400 | n is the half 1024 + n, and where i is odd 0x5400 | n << 4 is 64 + n. More
// bits of n may be put above the nibble.

// Byte `to` of the nibbles of a unit, of whose weight w nibble(w) is the nibble in the file.
template <class Nibble>
__host__ __device__ __forceinline__ uint32_t nibbles_byte(int to, Nibble nibble) {
    int weight = to / 8 * 16 + to / 4 % 2 * 8 + to % 2 * 4 + to / 2 % 2;
    return nibble(weight) | nibble(weight + 2) << 4;
}
// Nibble `high` of a byte: 0 for the low one.
__host__ __device__ __forceinline__ uint32_t nibble_of(uint32_t byte, int high) {
    return byte >> 4 * high & 15;
}
// Pair i of nibbles as halves 1024 + n or 64 + n. above: those bits, with more bits of n.
__device__ __forceinline__ uint32_t nibble_pair(const uint2& words, int i, uint32_t above) {
    uint32_t word = (i < 4 ? words.x : words.y) >> (i & 2 ? 8 : 0);
    return and_or(word, i % 2 ? 0x00f000f0u : 0x000f000fu, above);
}
// Takes 1024 + kOffset or 64 + kOffset off the pairs: what is left is exact.
template <int kOffset>
__device__ __forceinline__ void center_pairs(uint32_t (&q)[8]) {
    constexpr uint32_t kOdd = 0xd400d400u + static_cast<uint32_t>(kOffset) * 0x00100010u;
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = half2_add(q[i], i % 2 ? kOdd : half2_constant(-(1024 + kOffset)));
}

// The fifth bits of 32 neighbouring weights are a word: that of the lower weight of pair i of the first 16 is bit
// fifth_at(i) of its lower half, the upper weight's is in the upper half, and those of the other 16 are there when the
// bytes of both halves are exchanged. So they are above pairs of nibbles when the word is shifted by i / 2.
__host__ __device__ constexpr int fifth_at(int pair) {
    return 4 + pair % 2 * 4 + pair / 2;
}
// Byte `to` of such words, of whose weight w bit(w) is the fifth bit in the file.
template <class Bit>
__host__ __device__ __forceinline__ uint32_t fifth_bits_byte(int to, Bit bit) {
    uint32_t byte = 0;
    for (int pair = 0; pair < 8; ++pair) {
        int exchanged = fifth_at(pair) / 8 != to % 2, weight = to / 4 * 32 + exchanged * 16 + 2 * pair + to / 2 % 2;
        byte |= bit(weight) << fifth_at(pair) % 8;
    }
    return byte;
}
// Five bits of 16 weights, at `at` of their unit, less kOffset.
template <int kOffset>
__device__ __forceinline__ void five_bit_pairs(const HalfBits& bits, const uint2& nibbles, uint32_t fifth, int at,
                                               uint32_t (&q)[8]) {
    fifth = __byte_perm(fifth, 0, at & 16 ? 0x2301 : 0x3210);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        uint32_t shifted = fifth >> i / 2;
        q[i] = nibble_pair(nibbles, i,
                           i % 2 ? and_or(shifted, 0x01000100u, bits.odd) : and_or(shifted, 0x00100010u, bits.even));
    }
    center_pairs<kOffset>(q);
}
// Four bits of 16 weights, less kOffset.
template <int kOffset>
__device__ __forceinline__ void four_bit_pairs(const HalfBits& bits, const uint2& nibbles, uint32_t (&q)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = nibble_pair(nibbles, i, i % 2 ? bits.odd : bits.even);
    center_pairs<kOffset>(q);
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
    uint2 pairs[1];
    uint32_t values[6];
};
template <class Format, bool kLoads>
struct Reader {
    Fields& fields;
    Unit<Format::kBytes> unit;  // where kLoads
    HalfBits half_bits = {};
    float d_scale = 1.0f;
    int known_quarter = -1;  // of the unit, where the compiler knows it
    mutable int pieces = 0, pairs = 0, values = 0;

    __device__ uint4 load16(int offset) const {
        return kLoads ? fields.pieces[pieces++] = unit.load16(offset) : fields.pieces[pieces++];
    }
    __device__ uint2 load8(int offset) const {
        return kLoads ? fields.pairs[pairs++] = unit.load8(offset) : fields.pairs[pairs++];
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
    __device__ const HalfBits& bits() const { return half_bits; }
    __device__ float scale() const { return d_scale; }
    __device__ int quarter(int at) const { return known_quarter < 0 ? at / 64 : known_quarter; }
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

// Byte `to` of a unit in device memory, of the unit as GGUF stores it.
template <class Format, class Bytes>
__host__ __device__ __forceinline__ uint32_t repacked_byte(const Bytes& from, int to) {
    if constexpr (Format::kByBits) return Format::byte_of(from, to);
    else return from[Format::source_of(to)];
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

// Of sixteen weights times `scale`, a power of two: what their integers are multiplied by, in the low half of a word,
// and what is added to the products, in the high half. d and d * kCenter - m are rounded to halves, each to half a unit
// in the weight's last place, as the result is too.
template <class Format>
__device__ __forceinline__ uint32_t affine_halves(float d, float m, float scale) {
    d *= scale;
    return pack_half2(d, Format::kHasMin ? fmaf(d, Format::kCenter, -m * scale) : d);
}
template <class Format>
__device__ __forceinline__ void weights_of_integers(uint32_t affine, uint32_t (&q)[8]) {
    uint32_t slope = low_halves(affine), shift = high_halves(affine);
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = Format::kHasMin ? half2_fma(q[i], slope, shift) : half2_multiply(q[i], slope);
}

// The sixteen weights whose fields were loaded, at `at` of their unit, times `scale`, as pairs of halves.
template <class Format>
__device__ __forceinline__ void decode_halves(Fields& fields, int at, float scale, uint32_t (&out)[8]) {
    Reader<Format, false> unit{fields, {}, {}, scale};
    if constexpr (Format::kUnquantised) {
        float w[16];
        Format::floats(unit, at, w);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = pack_half2(w[2 * i] * scale, w[2 * i + 1] * scale);
    } else {
        float d, m = 0.0f;
        Format::integers(unit, at, out);
        Format::affine(unit, at, d, m);
        weights_of_integers<Format>(affine_halves<Format>(d, m, Format::kHeader ? 1.0f : scale), out);
    }
}

// decode_halves in two parts, for what loads the fields of each by themselves.
template <class Format>
__device__ __forceinline__ uint32_t decode_affine(Fields& fields, int at, int quarter, float scale) {
    float d, m = 0.0f;
    Format::affine(Reader<Format, false>{fields, {}, {}, scale, quarter}, at, d, m);
    return affine_halves<Format>(d, m, Format::kHeader ? 1.0f : scale);
}
template <class Format>
__device__ __forceinline__ void decode_integers(Fields& fields, int at, uint32_t affine, const HalfBits& bits,
                                                uint32_t (&out)[8]) {
    Format::integers(Reader<Format, false>{fields, {}, bits}, at, out);
    weights_of_integers<Format>(affine, out);
}
