// CUDA for a host compiler: the threads of a block, or of a cluster of blocks, are fibers of one thread of the host,
// which take turns where they meet (__syncthreads, __syncwarp, shuffles, the matrix instructions) or wait (barriers). In
// place of kernels/include/types.cuh, ptx.cuh, sm90.cuh, and of Barrier in barriers.cuh. Slow. Copies of cp.async are made
// when they are waited for; tensor copies are there at once, and products done.
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
    int any[kEmulatedBlocks];
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
inline int __syncthreads_or(int value) {
    __syncthreads();
    fibers.any[own_block()] = 0;
    __syncthreads();
    fibers.any[own_block()] |= value != 0;
    __syncthreads();
    return fibers.any[own_block()];
}
inline void cluster_sync() {
    meet(fibers.cluster, fibers.alive);
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

// Of one thread ------------------------------------------------------------------------------------------------------

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
inline int __float2int_rn(float f) {
    return std::isnan(f) ? 0 : static_cast<int>(nearbyintf(f));
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
inline void forget(int&) {}
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
    return (a & mask) | bits;
}
inline int signed_byte(uint32_t word, int i) {
    return static_cast<int8_t>(word >> 8 * i);
}
inline uint32_t low_halves(uint32_t pair) {
    return (pair & 0xffff) * 0x10001u;
}
inline uint32_t high_halves(uint32_t pair) {
    return (pair >> 16) * 0x10001u;
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
inline void begin_short_kernel() {}
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
inline void prefetch(const void*) {}
inline float exp2_approx(float x) {
    return exp2f(x);
}
inline float reciprocal_approx(float x) {
    return 1.0f / x;
}
inline uint32_t thread_here() {
    return threadIdx.x;
}
template <class T>
inline T load_where(bool inside, const T* from, T otherwise) {
    return inside ? *from : otherwise;
}
inline void store_where(bool inside, void* to, const uint4& value) {
    if (inside) *static_cast<uint4*>(to) = value;
}
inline void reduce_add(float* to, float value) {
    *to += value;
}
inline void reduce_add(float* to, const float4& values) {
    to[0] += values.x, to[1] += values.y, to[2] += values.z, to[3] += values.w;
}

// Shared memory and the matrix units ---------------------------------------------------------------------------------

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - own_memory());
}
inline void cp_async16(uint32_t destination, const void* source, bool valid) {
    int own = fibers.current;
    copies[own].push_back({own_memory() + destination, source, valid, copy_groups[own]});
}
inline void cp_async_commit() {
    ++copy_groups[fibers.current];
}
template <int kPending>
inline void cp_async_wait() {
    std::vector<Copy>& own = copies[fibers.current];
    size_t done = 0;
    for (; done < own.size() && own[done].group < copy_groups[fibers.current] - kPending; ++done)
        if (own[done].valid) memcpy(own[done].destination, own[done].source, 16);
        else memset(own[done].destination, 0, 16);
    own.erase(own.begin(), own.begin() + done);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    fibers.held[warp][lane][0] = address;
    meet_warp();
    for (int matrix = 0; matrix < 4; ++matrix) {
        auto value = [&](int row, int column) {
            half_t h;
            memcpy(&h, own_memory() + fibers.held[warp][8 * matrix + row][0] + 2 * column, 2);
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
inline int byte_of(uint32_t word, int at) {
    return static_cast<int8_t>(word >> 8 * at);
}
inline void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    uint32_t* own = fibers.held[warp][lane];
    for (int i = 0; i < 4; ++i) own[i] = a[i];
    own[4] = b0, own[5] = b1;
    meet_warp();
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k)
            d[i] += byte_of(fibers.held[warp][row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], k % 4) *
                    byte_of(fibers.held[warp][column * 4 + k % 16 / 4][4 + k / 16], k % 4);
    }
    meet_warp();
}

// Hopper -------------------------------------------------------------------------------------------------------------

struct Barrier {  // kernels/include/barriers.cuh
    static constexpr int kBytes = 8;
    uint32_t address;

    BarrierState& state(int block) const { return barrier_states[block][address / 8]; }
    void turn(int block) const {
        BarrierState& own = state(block);
        if (own.pending == 0 && own.bytes == 0) own.pending = own.expected, ++own.phase;
    }
    void init(int arrivals) const { state(own_block()) = {arrivals, arrivals, 0, 0}; }
    void arrive_in(int block) const { --state(block).pending, turn(block); }
    void arrive() const { arrive_in(own_block()); }
    void arrive_expecting(int bytes) const { state(own_block()).bytes += bytes, arrive(); }
    void come(int block, int bytes) const { state(block).bytes -= bytes, turn(block); }
    void publish_in(int block) const { arrive_in(block); }
    void wait_for_cluster(uint32_t parity) const { wait(parity); }
    void wait(uint32_t parity) const {
        while ((state(own_block()).phase & 1) == static_cast<int>(parity)) yield();
        ++fibers.passed;
    }
};
inline void fence_barrier_init() {}
inline void store_in(int block, uint32_t address, float value) {
    memcpy(shared_memory[block] + address, &value, sizeof(value));
}
inline float2 load_shared_where(bool inside, uint32_t address, float2 otherwise) {
    if (inside) memcpy(&otherwise, own_memory() + address, sizeof(otherwise));
    return otherwise;
}
inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    fibers.held[warp][lane][0] = address;
    meet_warp();
    for (int i = 0; i < 8; ++i) {
        uint32_t to = fibers.held[warp][i / 2 * 8 + lane % 4 * 2 + i % 2][0] + lane / 4 * 2;
        half_t value = static_cast<half_t>(r[i / 2] >> 16 * (i % 2));
        memcpy(own_memory() + to, &value, 2);
    }
    meet_warp();
}
inline void bulk_copy(uint32_t destination, const void* source, int bytes, Barrier barrier, bool) {
    memcpy(own_memory() + destination, source, bytes);
    barrier.come(own_block(), bytes);
}
struct TensorMap {  // as tests/emulator.py writes it: boxes of box_rows by 128 bytes
    uint64_t address, rows, columns, row_bytes, box_rows, column_bytes;
};
inline uint32_t swizzled(uint32_t address) {  // the 128-byte swizzle
    return address ^ (address >> 7 & 7) << 4;
}
inline void tensor_copy(uint32_t destination, const void* map, int column, int row, Barrier barrier, uint16_t blocks) {
    TensorMap from;
    memcpy(&from, map, sizeof(from));
    int rows = static_cast<int>(from.box_rows);
    for (int block = 0; block < kEmulatedBlocks; ++block) {
        if (!(blocks >> block & 1)) continue;
        int size = static_cast<int>(from.column_bytes);
        for (int r = row; r < row + rows; ++r)
            for (int at = 0; at < 128; at += size) {
                uint8_t* to = shared_memory[block] + swizzled(destination + 128 * (r - row) + at);
                int c = column + at / size;
                if (r >= 0 && r < static_cast<int>(from.rows) && c < static_cast<int>(from.columns))
                    memcpy(to, reinterpret_cast<uint8_t*>(from.address) + r * from.row_bytes + size * c, size);
                else memset(to, 0, size);  // outside
            }
        barrier.come(block, rows * 128);
    }
}
inline void tensor_copy(uint32_t destination, const void* map, int column, int row, Barrier barrier) {
    tensor_copy(destination, map, column, row, barrier, static_cast<uint16_t>(1 << own_block()));
}
template <int kThreads>
inline void sync_threads(int barrier) {
    meet(fibers.named[own_block()][barrier], kThreads);
}
template <int kRegisters>
inline void give_up_registers() {}
template <int kRegisters>
inline void take_registers() {}

inline uint64_t wgmma_operand(uint32_t address, uint32_t panel = 16) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(panel >> 4) << 16 | 64ull << 32 |
           1ull << 62;
}
inline void wgmma_begin() {}
inline void wgmma_commit() {}
template <int kPending>
inline void wgmma_wait() {}
inline float operand_value(uint64_t operand, int row, int k, bool transposed) {
    uint32_t address = (operand & 0x3fff) << 4, panel = (operand >> 16 & 0x3fff) << 4;
    address += transposed ? row / 64 * panel + k * 128 + row % 64 * 2 : row * 128 + k * 2;
    half_t value;
    memcpy(&value, own_memory() + swizzled(address), 2);
    return half_to_float(value);
}
// A thread's two rows of a, by 16 rows of b, or columns where it is transposed.
template <int D>
inline void multiply_rows(float (&d)[D], const float (&a)[2][16], uint64_t b, bool accumulate, bool transposed) {
    int lane = fibers.current % 32;
    for (int j = 0; j < D / 4; ++j)
        for (int c = 0; c < 2; ++c) {
            float sum[2] = {accumulate ? d[4 * j + c] : 0.0f, accumulate ? d[4 * j + 2 + c] : 0.0f};
            for (int k = 0; k < 16; ++k) {
                float right = operand_value(b, 8 * j + lane % 4 * 2 + c, k, transposed);
                for (int r = 0; r < 2; ++r) sum[r] = fmaf(a[r][k], right, sum[r]);
            }
            d[4 * j + c] = sum[0], d[4 * j + 2 + c] = sum[1];
        }
}
inline void meet_warpgroup() {
    meet(fibers.group[fibers.current / 128], 128);
}
template <bool kTransposed = false, int D>
inline void wgmma_f16(float (&d)[D], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool accumulate) {
    int warp = fibers.current / 32, lane = fibers.current % 32;
    uint32_t own[4] = {a0, a1, a2, a3};
    for (int i = 0; i < 4; ++i) fibers.held[warp][lane][i] = own[i];
    meet_warpgroup();
    float a[2][16];
    for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k) {
            uint32_t pair = fibers.held[warp][lane / 4 * 4 + k % 8 / 2][r + k / 8 * 2];
            a[r][k] = k % 2 ? high_half(pair) : low_half(pair);
        }
    multiply_rows(d, a, b, accumulate, kTransposed);
    meet_warpgroup();
}
template <int D>
inline void wgmma_f16(float (&d)[D], uint64_t left, uint64_t b, bool accumulate) {
    int row = fibers.current / 32 % 4 * 16 + fibers.current % 32 / 4;
    meet_warpgroup();
    float a[2][16];
    for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k) a[r][k] = operand_value(left, row + 8 * r, k, false);
    multiply_rows(d, a, b, accumulate, false);
    meet_warpgroup();
}
inline int operand_byte(uint64_t operand, int row, int k) {
    uint32_t address = ((operand & 0x3fff) << 4) + row * 128 + k;
    return static_cast<int8_t>(own_memory()[swizzled(address)]);
}
template <int D>
inline void wgmma_s8(int (&d)[D], uint64_t a, uint64_t b, bool accumulate) {
    int lane = fibers.current % 32, row = fibers.current / 32 % 4 * 16 + lane / 4;
    meet_warpgroup();
    int left[2][32];
    for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 32; ++k) left[r][k] = operand_byte(a, row + 8 * r, k);
    for (int j = 0; j < D / 4; ++j)
        for (int c = 0; c < 2; ++c) {
            int sum[2] = {};
            for (int k = 0; k < 32; ++k) {
                int right = operand_byte(b, 8 * j + lane % 4 * 2 + c, k);
                for (int r = 0; r < 2; ++r) sum[r] += left[r][k] * right;
            }
            for (int r = 0; r < 2; ++r) d[4 * j + 2 * r + c] = (accumulate ? d[4 * j + 2 * r + c] : 0) + sum[r];
        }
    meet_warpgroup();
}

// Launches -----------------------------------------------------------------------------------------------------------

template <class... A, size_t... I>
static void launch(void (*kernel)(A...), const uint64_t* values, Index grid, unsigned threads, int cluster,
                   std::index_sequence<I...>) {
    std::tuple<A...> arguments;
    (memcpy(&std::get<I>(arguments), values + I, sizeof(A)), ...);
    auto body = [&] { kernel(std::get<I>(arguments)...); };
    gridDim = grid, blockDim = {threads, 1, 1};
    const char* order = getenv("KQ_EMULATED_ORDER");
    fibers.order = order ? strtoull(order, nullptr, 10) : 0;
    unsigned across = grid.x / cluster, blocks = across * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
        unsigned block = fibers.order ? blocks - 1 - i : i;
        blockIdx = {block % across * cluster, block / across % grid.y, block / across / grid.y};
        memset(shared_memory, 0xff, static_cast<size_t>(cluster) * kEmulatedBytes);
        auto call = [](void* own) { (*static_cast<decltype(body)*>(own))(); };
        run_cluster(cluster, static_cast<int>(threads), call, &body);
    }
}
template <class... A>
static void launch(void (*kernel)(A...), const uint64_t* values, Index grid, unsigned threads, int cluster) {
    launch(kernel, values, grid, threads, cluster, std::index_sequence_for<A...>());
}
