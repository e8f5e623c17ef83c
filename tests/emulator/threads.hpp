// CUDA for a host compiler: the threads of a block, or of a cluster of blocks, are fibers of one thread of the host,
// which take turns where they meet (__syncthreads, __syncwarp, shuffles, the matrix instructions) or wait (barriers). With
// the files beside this one it is in place of kernels/include/types.cuh, ptx.cuh, sm90.cuh, and of Barrier in barriers.cuh.
// Slow. Copies of cp.async are made when they are waited for; tensor copies are there at once, and products done.
//
// The environment's KQ_EMULATED_ORDER, a number, has blocks, warps and threads take their turns in another order, each
// warp as far as it comes without the others: what no barrier keeps in order comes out of it, and results that differ
// show a race.
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
#include <vector>
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

// Fibers -------------------------------------------------------------------------------------------------------------

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

constexpr int kEmulatedThreads = 2048, kEmulatedBlocks = 4, kStackBytes = 1 << 17, kEmulatedBytes = 1 << 18;
struct Meeting {  // of threads that wait for one another
    int arrived, round;
};
struct BarrierState {
    int expected, pending, bytes, phase;
};
alignas(1024) static uint8_t shared_memory[kEmulatedBlocks][kEmulatedBytes];
static BarrierState barrier_states[kEmulatedBlocks][kEmulatedBytes / 8];
static struct {
    void* stack[kEmulatedThreads];
    void* scheduler;
    uint8_t* memory;
    bool ended[kEmulatedThreads];
    // threads: of a block. Those that have not ended: all, by block and by warp.
    int current, threads, alive, alive_in[kEmulatedBlocks], alive_of[kEmulatedThreads / 32];
    Meeting cluster, block[kEmulatedBlocks], warp[kEmulatedThreads / 32], group[kEmulatedThreads / 128];
    int count[kEmulatedBlocks];
    Meeting named[kEmulatedBlocks][16];  // of bar.sync
    uint64_t slot[kEmulatedThreads / 32][32];
    uint32_t held[kEmulatedThreads / 32][32][6];
    void (*body)(void*);
    void* argument;
    uint64_t order;   // of turns: 0 is by number
    uint64_t passed;  // how often a thread has gone on from where it had to wait
} fibers;

struct Copy {  // of cp.async; group: how many of its thread's groups were complete when it was asked for
    void* destination;
    const void* source;
    bool valid;
    int group;
};
static std::vector<Copy> copies[kEmulatedThreads];
static int copy_groups[kEmulatedThreads];

inline int own_block() {
    return fibers.current / fibers.threads;
}
inline uint8_t* own_memory() {
    return shared_memory[own_block()];
}

static void yield() {
    kq_switch(&fibers.stack[fibers.current], fibers.scheduler);
}

static void meet(Meeting& meeting, int expected) {
    int round = meeting.round;
    if (++meeting.arrived >= expected) meeting.arrived = 0, ++meeting.round;
    else
        while (meeting.round == round) yield();
    ++fibers.passed;
}

static void leave(Meeting& meeting,
                  int expected) {  // a thread that ends is waited for no more
    if (expected && meeting.arrived >= expected) meeting.arrived = 0, ++meeting.round;
}

static void kq_entry() {
    fibers.body(fibers.argument);
    int own = fibers.current, block = own_block();
    fibers.ended[own] = true;
    leave(fibers.cluster, --fibers.alive);
    leave(fibers.block[block], --fibers.alive_in[block]);
    leave(fibers.warp[own / 32], --fibers.alive_of[own / 32]);
    yield();
    abort();
}

// Runs the blocks of a cluster, blockIdx.x being the first's.
constexpr uint64_t kPrimes[] = {2053, 2063, 2069, 2081, 2083, 2087, 2089, 2099};  // which no number of threads has
static void run_cluster(int blocks, int threads, void (*body)(void*), void* argument) {
    if (!fibers.memory)
        fibers.memory = static_cast<uint8_t*>(mmap(nullptr, static_cast<size_t>(kEmulatedThreads) * kStackBytes,
                                                   PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    int all = blocks * threads;
    if (all > kEmulatedThreads || blocks > kEmulatedBlocks || (blocks > 1 && threads % 32))
        fprintf(stderr, "emulator: %d blocks of %d threads are too many\n", blocks, threads), abort();
    fibers.body = body, fibers.argument = argument, fibers.threads = threads, fibers.alive = all, fibers.cluster = {};
    for (int block = 0; block < blocks; ++block) {
        fibers.block[block] = {}, fibers.alive_in[block] = threads;
        for (Meeting& meeting : fibers.named[block]) meeting = {};
    }
    for (int t = 0; t < all; ++t) {
        if (t % 32 == 0) fibers.warp[t / 32] = {}, fibers.alive_of[t / 32] = min(32, all - t);
        if (t % 128 == 0) fibers.group[t / 128] = {};
        void** top = reinterpret_cast<void**>(fibers.memory + static_cast<size_t>(t + 1) * kStackBytes - 64);
        *--top = nullptr;  // keeps the stack aligned as after a call
        *--top = reinterpret_cast<void*>(kq_entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        fibers.stack[t] = top, fibers.ended[t] = false, copies[t].clear();
    }
    unsigned first = blockIdx.x;
    int warps = (all + 31) / 32;
    for (int turns = 0; fibers.alive; ++turns) {
        if (turns > 10000000) fprintf(stderr, "emulator: a block's threads wait for one another\n"), abort();
        uint64_t random = (fibers.order + turns) * 0x9e3779b97f4a7c15u, passed;
        for (int i = 0; i < warps; ++i) {
            int warp = fibers.order ? (i * kPrimes[random >> 61] + (random >> 32)) % warps : i;
            do {  // in another order, as far as it comes without the other warps
                passed = fibers.passed;
                for (int lane = 0; lane < 32; ++lane) {
                    int t = 32 * warp + (fibers.order ? 31 - lane : lane);
                    if (t >= all || fibers.ended[t]) continue;
                    fibers.current = t, threadIdx = {static_cast<unsigned>(t % threads), 0, 0};
                    blockIdx.x = first + t / threads;
                    kq_switch(&fibers.scheduler, fibers.stack[t]);
                }
            } while (fibers.order && fibers.passed != passed);
        }
    }
    blockIdx.x = first;
}

// What threads do together -------------------------------------------------------------------------------------------

inline void __syncthreads() {
    meet(fibers.block[own_block()], fibers.alive_in[own_block()]);
}
inline int __syncthreads_count(int value) {
    __syncthreads();
    fibers.count[own_block()] = 0;
    __syncthreads();
    fibers.count[own_block()] += value != 0;
    __syncthreads();
    return fibers.count[own_block()];
}
inline int __syncthreads_or(int value) {
    return __syncthreads_count(value) != 0;
}
inline void cluster_sync() {
    meet(fibers.cluster, fibers.alive);
}
inline void cluster_sync_by_thread() {
    cluster_sync();
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
inline int __any_sync(uint32_t, int value) {
    return __reduce_max_sync(~0u, static_cast<int>(value != 0));
}
inline uint32_t __match_any_sync(uint32_t, int value) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<uint32_t>(exchange(value, lane) == value) << lane;
    return mask;
}
