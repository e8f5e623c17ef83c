// Hopper's instructions (PTX ISA: cp.async.bulk, barrier.cluster, wgmma, setmaxnreg), one small wrapper each. For
// sm_90a only. The barriers on which copies complete are in barriers.cuh.
#pragma once
#include "barriers.cuh"
#include "ptx.cuh"

// Copies from global to shared memory that the copy engine makes, completing on a barrier -----------------------------

// Copies `bytes` bytes, a multiple of 16; both addresses are 16-byte aligned. passing: whether the L2 cache gives the
// source up before what others bring (createpolicy's evict_first, as it is encoded).
__device__ __forceinline__ void bulk_copy(uint32_t destination, const void* source, int bytes, Barrier barrier,
                                          bool passing) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %4, 0;\n"
        "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "%5;\n"
        "@!p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n"
        "}" ::"r"(destination),
        "l"(source), "r"(bytes), "r"(barrier.address), "r"(static_cast<int>(passing)), "l"(0x12f0000000000000ull)
        : "memory");
}
// Asks for a tensor map, which tensor_copy would wait for. Only uploads write tensor maps, so this may be called before
// begin_kernel.
__device__ __forceinline__ void prefetch_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies the box of a two-dimensional tensor map whose first element is (column, row).
__device__ __forceinline__ void tensor_copy(uint32_t destination, const void* map, int column, int row,
                                            Barrier barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(destination),
        "l"(map), "r"(column), "r"(row), "r"(barrier.address)
        : "memory");
}
// Does the same for several blocks of the cluster (a bit of `blocks` each): in each of them the box goes to the same
// shared address, and completes on the barrier of the same address.
__device__ __forceinline__ void tensor_copy(uint32_t destination, const void* map, int column, int row, Barrier barrier,
                                            uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(destination),
        "l"(map), "r"(column), "r"(row), "r"(barrier.address), "h"(blocks)
        : "memory");
}
// Does so for each of the cluster's kBlocks blocks, or for this one where it has no cluster.
template <int kBlocks>
__device__ __forceinline__ void tensor_copy_to(uint32_t destination, const void* map, int column, int row,
                                               Barrier barrier) {
    if constexpr (kBlocks == 1) tensor_copy(destination, map, column, row, barrier);
    else tensor_copy(destination, map, column, row, barrier, (1 << kBlocks) - 1);
}

// to[0 .. 3] += values, 16 bytes in a run. The L2 cache adds, and nothing comes back.
__device__ __forceinline__ void reduce_add(float* to, const float4& values) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values.x), "f"(values.y), "f"(values.z),
                 "f"(values.w)
                 : "memory");
}

// Loads from a shared address where `inside`, without a branch.
__device__ __forceinline__ float2 load_shared_where(bool inside, uint32_t address, float2 otherwise) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; @p ld.shared.v2.f32 {%0, %1}, [%2];}"
                 : "+f"(otherwise.x), "+f"(otherwise.y)
                 : "r"(address), "r"(static_cast<int>(inside)));
    return otherwise;
}

// Stores four 8x8 matrices of halves, each turned over. Of each a lane has two neighbouring columns (lane % 4 * 2 and
// the next) of row lane / 4; and it gives the shared address where column lane % 8 of matrix lane / 8 goes, 16 bytes.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// This thread's loads from shared memory have been made when this returns. An arrival at another block's barrier does
// not wait for ldmatrix: on an H100 the copy engine was seen to fill a stage again before its last rows had been read
// (docs/tried.md).
__device__ __forceinline__ void finish_loads() {
    asm volatile("fence.acq_rel.cta;" ::: "memory");
}

// Cluster, and registers between warpgroups ---------------------------------------------------------------------------

// All threads of the cluster that have not exited wait for one another.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same of a cluster of kBlocks blocks; where there is no cluster, the threads of the block wait for one another.
template <int kBlocks>
__device__ __forceinline__ void sync_blocks() {
    if constexpr (kBlocks == 1) __syncthreads();
    else cluster_sync();
}
// As cluster_sync, for a thread by itself, not with its warp.
__device__ __forceinline__ void cluster_sync_by_thread() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The float at this shared address in block `rank` of the cluster becomes `value`.
__device__ __forceinline__ void store_in(int rank, uint32_t address, float value) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.f32 [remote], %2;\n"
        "}" ::"r"(address),
        "r"(rank), "f"(value)
        : "memory");
}

// kThreads threads of a block, whole warps, wait for one another at a barrier from 1 to 15 (0 is __syncthreads').
template <int kThreads>
__device__ __forceinline__ void sync_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// All warps of a warpgroup call one of these: its threads have kRegisters registers from then on.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma ---------------------------------------------------------------------------------------------------------------

// The descriptor of an operand in shared memory: rows of 64 halves (128 bytes) with the 128-byte swizzle, groups of 8
// rows 1024 bytes apart. A transposed operand of more than 64 columns has them in panels of 64, which are `panel` bytes
// apart.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address, uint32_t panel = 16) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(panel >> 4) << 16 | 64ull << 32 |
           1ull << 62;
}

__device__ __forceinline__ void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d (64 x N, floats) = a (64 x 16, shared or registers) * b (16 x N, shared) + (accumulate ? d : 0), one warpgroup.
// Thread t holds rows t/32*16 + t%32/4 (+8) and columns 8j + t%4*2 (+1): d[4j], d[4j+1] in the first row, d[4j+2],
// d[4j+3] in the second. Of a in registers it holds columns t%4*2 (+1) of both rows (a0, a1), and the columns 8 beyond
// (a2, a3).
#define WGMMA_D8(C, i) \
    C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define WGMMA_D16(C) WGMMA_D8(C, 0), WGMMA_D8(C, 8)
#define WGMMA_D32(C, i) WGMMA_D8(C, i), WGMMA_D8(C, i + 8), WGMMA_D8(C, i + 16), WGMMA_D8(C, i + 24)
#define WGMMA_D64(C) WGMMA_D32(C, 0), WGMMA_D32(C, 32)
#define WGMMA_D96(C) WGMMA_D64(C), WGMMA_D32(C, 64)
#define WGMMA_D128(C) WGMMA_D64(C), WGMMA_D32(C, 64), WGMMA_D32(C, 96)
// clang-format off
#define WGMMA_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_R32 WGMMA_R16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_R64 WGMMA_R32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_R96 WGMMA_R64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_R128 WGMMA_R96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on

// The numbers of the operands after d, which asm wants as text, differ with the size. A transposed b has its 16 rows,
// not its columns, one after another.
#define WGMMA_RS(SIZE, D, R, OUT, A0, A1, A2, A3, B, P, T)                                                       \
    template <bool kTransposed = false>                                                                          \
    __device__ __forceinline__ void wgmma_f16(float (&d)[D], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                              uint64_t b, bool accumulate) {                                     \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" SIZE            \
                     "k16.f32.f16.f16 {" R "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p, 1, 1, " T ";}"        \
                     : OUT                                                                                       \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(accumulate)),            \
                       "n"(int(kTransposed)));                                                                   \
    }
#define WGMMA_SS(SIZE, D, R, OUT, A, B, P)                                                              \
    __device__ __forceinline__ void wgmma_f16(float (&d)[D], uint64_t a, uint64_t b, bool accumulate) { \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" SIZE   \
                     "k16.f32.f16.f16 {" R "}, " A ", " B ", p, 1, 1, 0, 0;}"                           \
                     : OUT                                                                              \
                     : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                              \
    }
WGMMA_RS("16", 8, WGMMA_R8, WGMMA_D8("+f", 0), "%8", "%9", "%10", "%11", "%12", "%13", "%14")
WGMMA_RS("32", 16, WGMMA_R16, WGMMA_D16("+f"), "%16", "%17", "%18", "%19", "%20", "%21", "%22")
WGMMA_RS("64", 32, WGMMA_R32, WGMMA_D32("+f", 0), "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WGMMA_RS("128", 64, WGMMA_R64, WGMMA_D64("+f"), "%64", "%65", "%66", "%67", "%68", "%69", "%70")
WGMMA_RS("256", 128, WGMMA_R128, WGMMA_D128("+f"), "%128", "%129", "%130", "%131", "%132", "%133", "%134")
WGMMA_SS("32", 16, WGMMA_R16, WGMMA_D16("+f"), "%16", "%17", "%18")
WGMMA_SS("64", 32, WGMMA_R32, WGMMA_D32("+f", 0), "%32", "%33", "%34")
WGMMA_SS("128", 64, WGMMA_R64, WGMMA_D64("+f"), "%64", "%65", "%66")

// d (64 x N, integers) = a (64 x 32 bytes, shared) * b (32 x N bytes, shared) + (accumulate ? d : 0): as above.
#define WGMMA_S8(SIZE, D, R, OUT, A, B, P)                                                            \
    __device__ __forceinline__ void wgmma_s8(int (&d)[D], uint64_t a, uint64_t b, bool accumulate) {  \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" SIZE \
                     "k32.s32.s8.s8 {" R "}, " A ", " B ", p;}"                                       \
                     : OUT                                                                            \
                     : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                            \
    }
WGMMA_S8("16", 8, WGMMA_R8, WGMMA_D8("+r", 0), "%8", "%9", "%10")
WGMMA_S8("32", 16, WGMMA_R16, WGMMA_D16("+r"), "%16", "%17", "%18")
WGMMA_S8("64", 32, WGMMA_R32, WGMMA_D32("+r", 0), "%32", "%33", "%34")
WGMMA_S8("128", 64, WGMMA_R64, WGMMA_D64("+r"), "%64", "%65", "%66")
WGMMA_S8("192", 96, WGMMA_R96, WGMMA_D96("+r"), "%96", "%97", "%98")
WGMMA_S8("256", 128, WGMMA_R128, WGMMA_D128("+r"), "%128", "%129", "%130")

// The same, of a in registers: of each 16 columns a thread holds columns t%4*4 to t%4*4 + 3 of its first row (a[0], and
// a[2] of the next 16) and of its second (a[1], a[3]), as ldmatrix_x4 gives them.
#define WGMMA_S8_RS(SIZE, D, R, OUT, A0, A1, A2, A3, B, P)                                                       \
    __device__ __forceinline__ void wgmma_s8(int (&d)[D], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" SIZE            \
                     "k32.s32.s8.s8 {" R "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", p;}"                       \
                     : OUT                                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));   \
    }
WGMMA_S8_RS("64", 32, WGMMA_R32, WGMMA_D32("+r", 0), "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_S8_RS("128", 64, WGMMA_R64, WGMMA_D64("+r"), "%64", "%65", "%66", "%67", "%68", "%69")

#undef WGMMA_RS
#undef WGMMA_SS
#undef WGMMA_S8
#undef WGMMA_S8_RS
