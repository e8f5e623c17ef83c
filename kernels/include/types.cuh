// Integer types and half-precision conversions. NVRTC is given no CUDA headers: all that the kernels need is here and
// in ptx.cuh, which keeps compiles short and asks for no toolkit on the user's machine.
#pragma once

typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef short int16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
typedef uint16_t half_t;  // IEEE binary16, as bits

__device__ __forceinline__ float half_to_float(half_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ half_t float_to_half(float f) {
    half_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// Two floats to two halves, `low` in the low 16 bits.
__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Arithmetic on pairs of halves.
__device__ __forceinline__ uint32_t half2_add(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ uint32_t half2_multiply(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
// The larger of each two, or NaN where one is.
__device__ __forceinline__ uint32_t half2_max(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
// The compiler knows no more what the value is, and computes what follows from it after this.
__device__ __forceinline__ void forget(int& value) {
    asm volatile("" : "+r"(value));
}
// (a & mask) | bits, in one instruction: the compiler would put the constants of several together, which then need two.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits));
    return r;
}
// Byte i of a word, which may be negative, in one instruction: a selector's 8 takes a byte's sign (__byte_perm has no
// such selectors).
__device__ __forceinline__ int signed_byte(uint32_t word, int i) {
    int r;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(r) : "r"(word), "r"(i * 0x1111 | 0x8880));
    return r;
}
// The lower, or the upper, half of a word in both places: written so that an instruction may take it from there.
__device__ __forceinline__ uint32_t low_halves(uint32_t pair) {
    uint32_t r;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low};}" : "=r"(r) : "r"(pair));
    return r;
}
__device__ __forceinline__ uint32_t high_halves(uint32_t pair) {
    uint32_t r;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high};}" : "=r"(r) : "r"(pair));
    return r;
}
// The half of -(1024 .. 2047) in both places: its mantissa is the number less 1024.
__host__ __device__ constexpr uint32_t half2_constant(int minus_1024_to_2047) {
    return 0xe400e400u + (static_cast<uint32_t>(-minus_1024_to_2047 - 1024)) * 0x00010001u;
}

// Whether the compiler takes a few registers more than for other GPUs (compute capability 10.0 and later): kernels that
// would spill have fewer blocks to a multiprocessor there.
#if __CUDA_ARCH__ >= 1000
constexpr bool kTightRegisters = true;
#else
constexpr bool kTightRegisters = false;
#endif

// A launch may begin before the kernel before it has ended (programmatic dependent launch, sm_90 and later). So every
// kernel calls this before it reads or writes what another may write or read: it returns when all earlier kernels have
// ended, and lets the next one's blocks take the room that this one's leave.
__device__ __forceinline__ void begin_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// As begin_kernel, for kernels that take as long to begin as to work. A launch of few of their blocks leaves most
// multiprocessors free: it lets the next launch begin before it waits itself, so that several launches stand ready.
constexpr int kFewBlocks = 96;
__device__ __forceinline__ void begin_short_kernel() {
#if __CUDA_ARCH__ >= 900
    if (gridDim.x * gridDim.y * gridDim.z <= kFewBlocks) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    begin_kernel();
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
    return __uint_as_float(bits);
}

__host__ __device__ constexpr int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}
