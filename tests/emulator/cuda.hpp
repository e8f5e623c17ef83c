// CUDA for a host compiler: a block's threads are fibers of one thread of the
// host, which take turns where they meet
// (__syncthreads, __syncwarp, shuffles, the matrix instructions). In place of
// kernels/include/types.cuh and ptx.cuh. Slow, and without races: it shows what
// kernels compute, and neither how fast nor whether they may.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <sys/mman.h>
#include <tuple>
#include <utility>
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __CUDA_ARCH__ 800

using std::max;
using std::min;
typedef uint16_t half_t;
#define VECTOR2(T, V)                 \
    struct alignas(2 * sizeof(T)) V { \
        T x, y;                       \
    };                                \
    inline V make_##V(T x, T y) {     \
        return {x, y};                \
    }
#define VECTOR4(T, V)                       \
    struct alignas(16) V {                  \
        T x, y, z, w;                       \
    };                                      \
    inline V make_##V(T x, T y, T z, T w) { \
        return {x, y, z, w};                \
    }
VECTOR2(int, int2)
VECTOR2(uint32_t, uint2)
VECTOR2(float, float2)
VECTOR4(int, int4)
VECTOR4(uint32_t, uint4)
VECTOR4(float, float4)
struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, gridDim, blockDim;
alignas(1024) static uint8_t shared_memory[1 << 18];
#define shared shared_memory  // the name that kernels give to their dynamic shared memory

// Fibers
// -------------------------------------------------------------------------------------------------------------

extern "C" void kq_switch(void** saved, void* other) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden kq_switch
.globl kq_switch
kq_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

constexpr int kMostThreads = 1024, kStackBytes = 1 << 17;
struct Meeting {  // of threads that wait for one another
    int arrived, round;
};
static struct {
    void* stack[kMostThreads];
    void* scheduler;
    uint8_t* memory;
    bool ended[kMostThreads];
    int current, threads, alive, alive_of[kMostThreads / 32];
    Meeting block, warp[kMostThreads / 32];
    int any;
    uint64_t slot[kMostThreads / 32][32];
    uint32_t held[kMostThreads / 32][32][12];
    void (*body)(void*);
    void* argument;
} fibers;

static void yield() {
    kq_switch(&fibers.stack[fibers.current], fibers.scheduler);
}

static void meet(Meeting& meeting, int expected) {
    int round = meeting.round;
    if (++meeting.arrived >= expected) meeting.arrived = 0, ++meeting.round;
    else
        while (meeting.round == round) yield();
}

static void leave(Meeting& meeting,
                  int expected) {  // a thread that ends is waited for no more
    if (expected && meeting.arrived >= expected) meeting.arrived = 0, ++meeting.round;
}

static void kq_entry() {
    fibers.body(fibers.argument);
    int own = fibers.current;
    fibers.ended[own] = true;
    leave(fibers.block, --fibers.alive);
    leave(fibers.warp[own / 32], --fibers.alive_of[own / 32]);
    yield();
    abort();
}

static void run_block(int threads, void (*body)(void*), void* argument) {
    if (!fibers.memory)
        fibers.memory = static_cast<uint8_t*>(mmap(nullptr, static_cast<size_t>(kMostThreads) * kStackBytes,
                                                   PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    fibers.body = body, fibers.argument = argument, fibers.threads = fibers.alive = threads;
    fibers.block = {};
    for (int t = 0; t < threads; ++t) {
        if (t % 32 == 0) fibers.warp[t / 32] = {}, fibers.alive_of[t / 32] = min(32, threads - t);
        void** top = reinterpret_cast<void**>(fibers.memory + static_cast<size_t>(t + 1) * kStackBytes - 64);
        *--top = nullptr;  // keeps the stack aligned as after a call
        *--top = reinterpret_cast<void*>(kq_entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        fibers.stack[t] = top, fibers.ended[t] = false;
    }
    for (int turns = 0; fibers.alive; ++turns) {
        if (turns > 100000000) fprintf(stderr, "emulator: a block's threads wait for one another\n"), abort();
        for (int t = 0; t < threads; ++t)
            if (!fibers.ended[t]) {
                fibers.current = t, threadIdx = {static_cast<unsigned>(t), 0, 0};
                kq_switch(&fibers.scheduler, fibers.stack[t]);
            }
    }
}

// What threads do together
// -------------------------------------------------------------------------------------------

inline void __syncthreads() {
    meet(fibers.block, fibers.alive);
}
inline int __syncthreads_or(int value) {
    __syncthreads();
    if (fibers.current == 0 || true) {
    }
    fibers.any = 0;
    __syncthreads();
    fibers.any |= value != 0;
    __syncthreads();
    return fibers.any;
}
inline void meet_warp() {
    int warp = fibers.current / 32;
    meet(fibers.warp[warp], fibers.alive_of[warp]);
}
inline void __syncwarp(uint32_t = 0xffffffffu) {
    meet_warp();
}
template <class T>
inline T exchange(T value, int from) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    fibers.slot[warp][lane] = bits;
    meet_warp();
    bits = fibers.slot[warp][from & 31];
    meet_warp();
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
inline T __shfl_sync(uint32_t, T value, int from) {
    return exchange(value, from);
}
template <class T>
inline T __shfl_xor_sync(uint32_t, T value, int mask) {
    return exchange(value, fibers.current % 32 ^ mask);
}
template <class T>
inline T __shfl_up_sync(uint32_t, T value, int by) {
    int lane = fibers.current % 32;
    return exchange(value, lane < by ? lane : lane - by);
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    for (int offset = 16; offset; offset >>= 1) value = max(value, __shfl_xor_sync(~0u, value, offset));
    return value;
}
inline int __reduce_max_sync(uint32_t, int value) {
    for (int offset = 16; offset; offset >>= 1) value = max(value, __shfl_xor_sync(~0u, value, offset));
    return value;
}
inline uint32_t __match_any_sync(uint32_t, int value) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<uint32_t>(exchange(value, lane) == value) << lane;
    return mask;
}

// Of one thread
// ------------------------------------------------------------------------------------------------------

template <class T>
inline T atomicAdd(T* to, T value) {
    T before = *to;
    *to += value;
    return before;
}
template <class T>
inline T atomicMax(T* to, T value) {
    T before = *to;
    *to = max(before, value);
    return before;
}
inline uint32_t __float_as_uint(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline int __float_as_int(float f) {
    return static_cast<int>(__float_as_uint(f));
}
inline float __int_as_float(int bits) {
    return __uint_as_float(static_cast<uint32_t>(bits));
}
inline float bits_to_float(uint32_t bits) {
    return __uint_as_float(bits);
}
inline float half_to_float(half_t h) {
    return _cvtsh_ss(h);
}
inline half_t float_to_half(float f) {
    return _cvtss_sh(f, 0);
}
inline uint32_t pack_half2(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline float low_half(uint32_t pair) {
    return half_to_float(static_cast<half_t>(pair));
}
inline float high_half(uint32_t pair) {
    return half_to_float(static_cast<half_t>(pair >> 16));
}
inline uint32_t half2_add(uint32_t a, uint32_t b) {
    return pack_half2(low_half(a) + low_half(b), high_half(a) + high_half(b));
}
inline uint32_t half2_multiply(uint32_t a, uint32_t b) {
    return pack_half2(low_half(a) * low_half(b), high_half(a) * high_half(b));
}
inline uint32_t half2_fma(uint32_t a, uint32_t b,
                          uint32_t c) {  // a float holds a product of halves
    return pack_half2(fmaf(low_half(a), low_half(b), low_half(c)), fmaf(high_half(a), high_half(b), high_half(c)));
}
constexpr uint32_t half2_constant(int minus_1024_to_2047) {
    return 0xe400e400u + static_cast<uint32_t>(-minus_1024_to_2047 - 1024) * 0x00010001u;
}
inline void begin_kernel() {}
constexpr int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}
inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return r;
}
inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline void sincospi(double x, double* s, double* c) {
    x = std::fmod(x, 2.0);
    *s = std::sin(M_PI * x), *c = std::cos(M_PI * x);
}
inline float exp2_approx(float x) {
    return exp2f(x);
}
inline float reciprocal_approx(float x) {
    return 1.0f / x;
}
inline void reduce_add(float* to, float value) {
    *to += value;
}

// Shared memory and the matrix units
// ---------------------------------------------------------------------------------

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared_memory);
}
inline void cp_async16(uint32_t destination, const void* source, bool valid) {
    if (valid) memcpy(shared_memory + destination, source, 16);
    else memset(shared_memory + destination, 0, 16);
}
inline void cp_async_commit() {}
template <int kPending>
inline void cp_async_wait() {}

inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    fibers.held[warp][lane][0] = address;
    meet_warp();
    for (int matrix = 0; matrix < 4; ++matrix) {
        auto value = [&](int row, int column) {
            half_t h;
            memcpy(&h, shared_memory + fibers.held[warp][8 * matrix + row][0] + 2 * column, 2);
            return static_cast<uint32_t>(h);
        };
        int row = lane / 4, column = lane % 4 * 2;
        r[matrix] = transposed ? value(column, row) | value(column + 1, row) << 16
                               : value(row, column) | value(row, column + 1) << 16;
    }
    meet_warp();
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    load_matrices(r, address, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    load_matrices(r, address, true);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    uint32_t* own = fibers.held[warp][lane];
    for (int i = 0; i < 4; ++i) own[i] = a[i];
    own[4] = b0, own[5] = b1;
    meet_warp();
    auto half = [](uint32_t pair, int odd) { return odd ? high_half(pair) : low_half(pair); };
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; ++k) {
            uint32_t left = fibers.held[warp][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            uint32_t right = fibers.held[warp][column * 4 + k % 8 / 2][4 + k / 8];
            sum = fmaf(half(left, k % 2), half(right, k % 2), sum);
        }
        d[i] = sum;
    }
    meet_warp();
}

// Launches
// -----------------------------------------------------------------------------------------------------------

template <class... A, size_t... I>
static void launch(void (*kernel)(A...), const uint64_t* values, Index grid, unsigned threads,
                   std::index_sequence<I...>) {
    std::tuple<A...> arguments;
    (memcpy(&std::get<I>(arguments), values + I, sizeof(A)), ...);
    auto body = [&] { kernel(std::get<I>(arguments)...); };
    gridDim = grid, blockDim = {threads, 1, 1};
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
                memset(shared_memory, 0xff, sizeof(shared_memory) / 1);
                run_block(static_cast<int>(threads), [](void* own) { (*static_cast<decltype(body)*>(own))(); }, &body);
            }
}
template <class... A>
static void launch(void (*kernel)(A...), const uint64_t* values, Index grid, unsigned threads) {
    launch(kernel, values, grid, threads, std::index_sequence_for<A...>());
}
