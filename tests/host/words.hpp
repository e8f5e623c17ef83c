// What kernels/quants/ needs of words of bits, for a host compiler: types.cuh includes it, and the emulator.
#pragma once
#include <cstdint>

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
    return (a & mask) | bits;
}
inline int signed_byte(uint32_t word, int i) {
    return static_cast<int8_t>(word >> 8 * i);
}
constexpr uint32_t half2_constant(int minus_1024_to_2047) {
    return 0xe400e400u + static_cast<uint32_t>(-minus_1024_to_2047 - 1024) * 0x00010001u;
}
inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return r;
}
