// Makes int8 of operands' rows (round_rows), or of what RMSNorm makes of rows (rms_norm_rounded, where NORMED). It is
// compiled for rows of up to 16 * ROW_THREADS * KEPT columns, and longer ones where KEPT is 4.
#include "include/int8.cuh"
#include "include/reduce.cuh"
#include "include/rms_norm.cuh"

constexpr int kRowThreads = ROW_THREADS;  // that share a row: neighbours
constexpr int kThreads = kRowThreads > INT8_THREADS ? kRowThreads : INT8_THREADS, kRows = kThreads / kRowThreads;
constexpr int kKept = KEPT;  // sixteens of a row that a thread keeps; it reads and rotates the others twice
// Blocks that a multiprocessor has registers for.
constexpr int kBlocks = kThreads > INT8_THREADS ? 1 : kKept == 1 ? 4 : kKept < 4 ? 3 : 2;

// The largest of the bits that those threads of a block have who share a row, known to all of them.
__device__ __forceinline__ uint32_t largest_of_row(uint32_t largest) {
    if constexpr (kRowThreads < 32) {
#pragma unroll
        for (int lanes = 1; lanes < kRowThreads; lanes *= 2)
            largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    } else {
        constexpr int kWarps = kRowThreads / 32;
        __shared__ uint32_t of_warp[kThreads / 32];
        largest = __reduce_max_sync(0xffffffffu, largest);
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < kWarps; ++w) largest = max(largest, of_warp[threadIdx.x / kRowThreads * kWarps + w]);
    }
    return largest;
}

// Calls kept(where, its number) for the first kKept sixteens of a row that are a thread's, also where a row has no such
// columns, and read(where) for the others that it has; the lanes of a warp go on together.
template <class Kept, class Read>
__device__ __forceinline__ void each_sixteen(int padded, Kept kept, Read read) {
    constexpr int kRound = 16 * kRowThreads;
    int own = threadIdx.x % kRowThreads * 16, first = own / 512 * 512;
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept(own + i * kRound, i);  // no branch: it would stand before each shuffle
    if constexpr (kKept == 4)
        for (int i = kKept; first + i * kRound < padded; ++i) read(own + i * kRound);
}

// out, scale = a row of an operand (operand.cuh: halves, x_scale times their values), rotated and rounded; out has
// `padded` columns, whole groups. Eight lanes take a group, each sixteen columns that are neighbours in memory.
// All threads of a block call this; nothing is written unless `inside`.
__device__ __forceinline__ void round_row(const half_t* x, int stride, float x_scale, int8_t* out, int padded,
                                          float* scale, bool inside) {
    auto rotated = [&](int at, float (&v)[16]) {
        uint4 pieces[2] = {};
        if (at < stride) {  // a whole group of operand order, half a group of the rotation's
            pieces[0] = *reinterpret_cast<const uint4*>(x + at);
            pieces[1] = *reinterpret_cast<const uint4*>(x + at + 8);
        }
        const uint32_t pairs[8] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w,
                                   pieces[1].x, pieces[1].y, pieces[1].z, pieces[1].w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[2 * i] = half_to_float(static_cast<half_t>(pairs[i]));
            v[2 * i + 1] = half_to_float(static_cast<half_t>(pairs[i] >> 16));
        }
        rotate(v);
    };
    float v[kKept][16];
    uint32_t largest = 0;
    each_sixteen(
        padded, [&](int at, int i) { rotated(at, v[i]), largest = largest_of(v[i], largest); },
        [&](int at) {
            float w[16];
            rotated(at, w);
            largest = largest_of(w, largest);
        });
    Rounding rounding(largest_of_row(largest));
    if (!inside) return;
    if (threadIdx.x % kRowThreads == 0) *scale = rounding.scale / x_scale;
    auto write = [&](int at, const float (&w)[16]) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = rounding.byte(w[4 * i]) | rounding.byte(w[4 * i + 1]) << 8 | rounding.byte(w[4 * i + 2]) << 16 |
                       rounding.byte(w[4 * i + 3]) << 24;
        if (at < padded) *reinterpret_cast<uint4*>(out + at) = make_uint4(words[0], words[1], words[2], words[3]);
    };
    each_sixteen(
        padded, [&](int at, int i) { write(at, v[i]); },
        [&](int at) {
            float w[16];
            rotated(at, w);
            write(at, w);
        });
}

#if !NORMED

// out[t, :], scales[t] = row t of x, rounded. A block takes kRows of the `rows` rows.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    round_rows(const half_t* x, int rows, int stride, const float* scale, int8_t* out, int padded, float* scales) {
    begin_short_kernel();
    int row = blockIdx.x * kRows + threadIdx.x / kRowThreads;
    bool inside = row < rows;
    uint64_t from = inside ? row : 0;
    round_row(x + from * stride, stride, *scale, out + from * padded, padded, scales + from, inside);
}

#else

// norm.cu's rms_norm of all rows, and rounded, scales = its rows, rounded. out: null where nobody reads its halves, for
// rows that `staged` has room for.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    rms_norm_rounded(const float* x, int rows, const float* weight, half_t* out, int columns, int stride, float epsilon,
                     const float* scale, int8_t* rounded, int padded, float* scales) {
    ask_for_weights<kThreads>(weight, columns);
    begin_short_kernel();
    constexpr int kStaged = 16 * kKept * kRowThreads;
    __shared__ __align__(16) half_t staged[kRows][kStaged];  // rows, if they are short enough
    int own = threadIdx.x / kRowThreads, row = block_from_last() * kRows + own;
    bool inside = row < rows;
    uint64_t from = inside ? row : 0;
    bool short_enough = kRows > 1 || stride <= kStaged;
    half_t* to = short_enough ? staged[own] : out + from * stride;
    normalise_row<kThreads, kRows>(x + from * columns, weight, to, columns, stride, epsilon, *scale);
    __syncthreads();
    if (short_enough && inside && out != nullptr)
        for (int i = threadIdx.x % kRowThreads * 8; i < stride; i += kRowThreads * 8)
            *reinterpret_cast<uint4*>(out + from * stride + i) = *reinterpret_cast<const uint4*>(to + i);
    round_row(to, stride, *scale, rounded + from * padded, padded, scales + from, inside);
}

#endif
