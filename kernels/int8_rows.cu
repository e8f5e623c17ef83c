// Makes int8 of operands' rows (round_rows), or, where NORMED, of what RMSNorm makes of rows (rms_norm_rounded). It is
// compiled for rows of up to kHeldColumns columns; longer ones take longer.
#include "include/combine.cuh"
#include "include/hadamard.cuh"
#include "include/int8.cuh"
#include "include/reduce.cuh"
#include "include/rms_norm.cuh"

constexpr int kRowThreads = ROW_THREADS;  // that share a row: neighbours
constexpr int kThreads = kRowThreads > INT8_THREADS ? kRowThreads : INT8_THREADS, kRows = kThreads / kRowThreads;
constexpr int kHeld = HELD;  // eights of columns that a thread has of a row: up to four of a group
constexpr int kOfGroup = kHeld < 4 ? kHeld : 4, kGroups = kHeld / kOfGroup;
using Share = GroupShare<kOfGroup>;
constexpr int kStep = kRowThreads / Share::kThreads * kRotated,
              kHeldColumns = kStep * kGroups;  // columns of the row's threads
// Blocks that a multiprocessor has registers for.
constexpr int kRoom = kHeld == 8 ? 2 : kHeld == 4 ? 3 : 4;
constexpr int kBlocks = kThreads > INT8_THREADS ? 1 : kTightRegisters && NORMED ? kRoom - 1 : kRoom;

// Waits for those threads of a block who share a row, and for others, too.
__device__ __forceinline__ void sync_row() {
    if constexpr (kRowThreads <= 32) __syncwarp();
    else __syncthreads();
}

// The largest of the bits that those threads of a block have who share a row, known to all of them.
__device__ __forceinline__ uint32_t largest_of_row(uint32_t largest) {
    if constexpr (kRowThreads < 32) {
#pragma unroll
        for (int lanes = 1; lanes < kRowThreads; lanes *= 2)
            largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    } else {
        largest = __reduce_max_sync(0xffffffffu, largest);
    }
    if constexpr (kRowThreads > 32) {
        constexpr int kWarps = kRowThreads / 32;
        __shared__ uint32_t of_warp[kThreads / 32];
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < kWarps; ++w) largest = max(largest, of_warp[threadIdx.x / kRowThreads * kWarps + w]);
    }
    return largest;
}

// A thread's columns of a row of an operand (operand.cuh), of kHeldColumns columns at a time.
struct RowShare {
    int first = threadIdx.x % kRowThreads / Share::kThreads * kRotated + Share::column(0);
    float values[kGroups][kOfGroup][8];

    // The first of the eight columns of a quarter of one of its groups.
    __device__ __forceinline__ int column(int group, int quarter) const { return first + group * kStep + quarter * 32; }

    // Reads and rotates its columns of the row, which has `stride` of them. All lanes of a warp call this.
    __device__ __forceinline__ void read(const half_t* row, int stride) {
        uint4 halves[kGroups][kOfGroup] = {};
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
            for (int i = 0; i < kOfGroup; ++i)
                if (column(group, i) < stride)
                    halves[group][i] = *reinterpret_cast<const uint4*>(row + column(group, i));
#pragma unroll
        for (int group = 0; group < kGroups; ++group) Share::rotate(halves[group], values[group]);
    }

    __device__ __forceinline__ void compare(Largest& largest) const {
#pragma unroll
        for (int i = 0; i < 8 * kHeld; ++i) largest.add(values[i / 8 / kOfGroup][i / 8 % kOfGroup][i % 8]);
    }

    // Writes its columns of a row that has `padded` of them, whole groups.
    __device__ __forceinline__ void write(const Rounding& rounding, int8_t* row, int padded) const {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            if (column(group, 0) >= padded) continue;
#pragma unroll
            for (int i = 0; i < kOfGroup; ++i) {
                const float (&v)[8] = values[group][i];
                *reinterpret_cast<uint2*>(row + column(group, i)) =
                    make_uint2(rounding.four(v[0], v[1], v[2], v[3]), rounding.four(v[4], v[5], v[6], v[7]));
            }
        }
    }
};

// out, scale = a row of an operand (halves, x_scale times their values), rotated and rounded; out has `padded` columns,
// whole groups. All threads of a block call this; nothing is written unless `inside`. Of a row that is longer than
// kHeldColumns all but the last columns are read and rotated twice.
__device__ __forceinline__ void round_row(const half_t* x, int stride, float x_scale, int8_t* out, int padded,
                                          float* scale, bool inside) {
    RowShare share;
    Largest largest;
    int last = (padded - 1) / kHeldColumns * kHeldColumns;
    for (int before = 0;; before += kHeldColumns, share.first += kHeldColumns) {
        share.read(x, stride);
        share.compare(largest);
        if (before == last) break;
    }
    Rounding rounding(largest_of_row(largest.bits()));
    if (inside && threadIdx.x % kRowThreads == 0) *scale = rounding.scale / x_scale;
    for (int before = last;;) {
        if (inside) share.write(rounding, out, padded);
        if (before == 0) break;
        before -= kHeldColumns, share.first -= kHeldColumns;
        share.read(x, stride);
    }
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

// A norm's weights. Few rows would wait for them: then each thread copies those that it will read to shared memory,
// which takes no barrier. Nothing that may still run writes weights, so this is called before begin_kernel.
__device__ __forceinline__ const float* weights_at_hand(const float* weight, int columns) {
    constexpr bool kFits = kRows * kHeldColumns * sizeof(float) <= 16384;
    __shared__ __align__(16) float copies[kRows][kFits ? kHeldColumns : 4];
    if (!kFits || gridDim.x > kFewRows || columns > kHeldColumns || columns % 4 != 0) {
        ask_for_weights<kThreads>(weight, columns);
        return weight;
    }
    float* own = copies[threadIdx.x / kRowThreads];
#pragma unroll
    for (int j = 0; j < 2 * kHeld; ++j) {
        int i = (j * kRowThreads + threadIdx.x % kRowThreads) * 4;
        if (i < columns) *reinterpret_cast<float4*>(own + i) = *reinterpret_cast<const float4*>(weight + i);
    }
    return own;
}

// Of the rows that `read` gives (RowThere, CombinedRow): out = norm.cu's rms_norm, and rounded, scales = its rows,
// rounded. row: this thread's, if it is inside. out: null where nobody reads its halves, for rows of up to kHeldColumns
// columns.
template <class Read>
__device__ __forceinline__ void normalise_and_round(const Read& read, const float* weight, half_t* out, int columns,
                                                    int stride, float epsilon, const float* scale, int8_t* rounded,
                                                    int padded, float* scales, int row, bool inside) {
    __shared__ __align__(16) half_t staged[kRows][kHeldColumns];  // rows, if they are short enough
    int own = threadIdx.x / kRowThreads;
    uint64_t from = inside ? row : 0;
    bool short_enough = kRows > 1 || stride <= kHeldColumns;
    half_t* to = short_enough ? staged[own] : out + from * stride;
    normalise_row<kThreads, kRows, 2 * kHeld>(read, weight, to, columns, stride, epsilon, *scale);
    sync_row();
    if (short_enough && inside && out != nullptr)
        for (int i = threadIdx.x % kRowThreads * 8; i < stride; i += kRowThreads * 8)
            *reinterpret_cast<uint4*>(out + from * stride + i) = *reinterpret_cast<const uint4*>(to + i);
    round_row(to, stride, *scale, rounded + from * padded, padded, scales + from, inside);
}

// All `rows` rows of x.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    rms_norm_rounded(const float* x, int rows, const float* weight, half_t* out, int columns, int stride, float epsilon,
                     const float* scale, int8_t* rounded, int padded, float* scales) {
    weight = weights_at_hand(weight, columns);
    begin_short_kernel();
    int row = block_from_last() * kRows + threadIdx.x / kRowThreads;
    bool inside = row < rows;
    RowThere there = {x + static_cast<uint64_t>(inside ? row : 0) * columns, columns};
    normalise_and_round(there, weight, out, columns, stride, epsilon, scale, rounded, padded, scales, row, inside);
}

// The same of rows to which experts' outputs are added first: see experts.cu's combine_rms_norm.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    combine_rms_norm_rounded(float* x, const void* sums, int in_blocks, const float* sums_scale, int used,
                             const int* place_of, const float* share_of, int rows, const float* weight, half_t* out,
                             int columns, int stride, float epsilon, const float* scale, int8_t* rounded, int padded,
                             float* scales) {
    weight = weights_at_hand(weight, columns);
    begin_kernel();
    int row = block_from_last() * kRows + threadIdx.x / kRowThreads;
    bool inside = row < rows;
    CombinedRow stream(x, sums, in_blocks, sums_scale, used, columns, place_of, share_of, inside ? row : 0);
    if (!inside) stream.copies.columns = 0;  // nothing is read, and nothing added
    normalise_and_round(stream, weight, out, columns, stride, epsilon, scale, rounded, padded, scales, row, inside);
}

#endif
