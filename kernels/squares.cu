// Sums of the squares of a product's inputs, column by column, for importance matrices (llama.cpp, tools/imatrix). They
// are float64: the square of a half is exact in it, and so is that of a float. Columns stay in operand order; the host
// undoes that, and the inputs' scale. A lane has two neighbouring columns, a warp 64, which block x of the grid begins
// at.
#include "include/operand.cuh"
#include "include/types.cuh"

constexpr int kWarps = SQUARES_THREADS / 32;
constexpr int kColumns = 64;  // of a block
constexpr int kPiece = 128;   // rows that are summed by themselves
constexpr int kAhead = 16;    // rows that are read before the first of them is added

// Two neighbouring values as they are stored, and as numbers.
__device__ __forceinline__ uint32_t load_pair(const half_t* at) {
    return *reinterpret_cast<const uint32_t*>(at);
}
__device__ __forceinline__ float2 load_pair(const float* at) {
    return *reinterpret_cast<const float2*>(at);
}
__device__ __forceinline__ float2 numbers(uint32_t pair) {
    return make_float2(half_to_float(static_cast<half_t>(pair)), half_to_float(static_cast<half_t>(pair >> 16)));
}
__device__ __forceinline__ float2 numbers(float2 pair) {
    return pair;
}

template <bool kScaled>
__device__ __forceinline__ void add_pair(double2& sum, float2 pair, const float* row_scale, int row) {
    double a = pair.x, b = pair.y;
    if constexpr (kScaled) a *= row_scale[row], b *= row_scale[row];
    sum.x = fma(a, a, sum.x);
    sum.y = fma(b, b, sum.y);
}

// sum + the squares of the pairs of rows begin .. end - 1, one row after the other. x: the lane's pair of row 0.
// row_scale: where kScaled, powers of two that the rows are multiplied by.
template <bool kScaled, typename Value>
__device__ __forceinline__ double2 add_rows(double2 sum, const Value* x, int stride, int begin, int end,
                                            const float* row_scale) {
    int row = begin;
    x += static_cast<int64_t>(begin) * stride;
    for (; row + kAhead <= end; row += kAhead, x += static_cast<int64_t>(kAhead) * stride) {
        decltype(load_pair(x)) pairs[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) pairs[i] = load_pair(x + static_cast<int64_t>(i) * stride);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) add_pair<kScaled>(sum, numbers(pairs[i]), row_scale, row + i);
    }
    for (; row < end; ++row, x += stride) add_pair<kScaled>(sum, numbers(load_pair(x)), row_scale, row);
    return sum;
}

// sums[i] += the squares of column i of x, [rows, columns] with rows `stride` apart; both even. The rows are from
// number `offset` on of sequences of `length` rows each. Pieces of a sequence are summed at once, a warp each, and then
// one after the other: a sum's bits do not depend on how many sequences a batch has.
template <typename Value>
__device__ __forceinline__ void add_sequences(const Value* x, int stride, int columns, int rows, int length, int offset,
                                              const float* row_scale, double* sums) {
    __shared__ double2 partial[kWarps][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = kColumns * blockIdx.x + 2 * lane;
    bool has = column < columns;
    double2* own = reinterpret_cast<double2*>(sums + column);
    double2 total = warp == 0 && has ? *own : make_double2(0.0, 0.0);
    int in_sequence = ceil_div(length, kPiece), pieces = ceil_div(offset + rows, length) * in_sequence;
    for (int piece = warp; piece < ceil_div(pieces, kWarps) * kWarps; piece += kWarps) {
        int first = piece / in_sequence * length, end = min(first + length, offset + rows);
        first += piece % in_sequence * kPiece;
        end = min(end, first + kPiece);
        double2 zero = make_double2(0.0, 0.0);
        first = max(first - offset, 0), end -= offset;
        if (!has) partial[warp][lane] = zero;
        else if (row_scale == nullptr)
            partial[warp][lane] = add_rows<false>(zero, x + column, stride, first, end, nullptr);
        else partial[warp][lane] = add_rows<true>(zero, x + column, stride, first, end, row_scale);
        __syncthreads();
        if (warp == 0) {
            for (int w = 0; w < kWarps; ++w) total.x += partial[w][lane].x, total.y += partial[w][lane].y;
        }
        __syncthreads();
    }
    if (warp == 0 && has) *own = total;
}

extern "C" __global__ void __launch_bounds__(SQUARES_THREADS)
    add_squares(const half_t* x, int stride, int columns, int rows, int length, int offset, const float* row_scale,
                double* sums) {
    begin_kernel();
    add_sequences(x, stride, columns, rows, length, offset, row_scale, sums);
}

extern "C" __global__ void __launch_bounds__(SQUARES_THREADS)
    add_float_squares(const float* x, int stride, int columns, int rows, int length, int offset, double* sums) {
    begin_kernel();
    add_sequences(x, stride, columns, rows, length, offset, nullptr, sums);
}

// sums[e, i] += the squares of column i of expert e's rows; rows_of[e] += how many it has. x: an operand whose rows are
// sorted by expert, `rows` of them `stride` apart; firsts: each expert's first. A warp takes an expert, one row after
// the other.
extern "C" __global__ void __launch_bounds__(SQUARES_THREADS)
    add_expert_squares(const half_t* x, int stride, int rows, const int* firsts, int experts, double* sums,
                       double* rows_of) {
    begin_kernel();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, expert = blockIdx.y * kWarps + warp;
    if (expert >= experts) return;
    int first = firsts[expert], count = (expert + 1 < experts ? firsts[expert + 1] : rows) - first;
    int column = kColumns * blockIdx.x + 2 * lane;
    double2* own = reinterpret_cast<double2*>(sums + static_cast<uint64_t>(expert) * stride + column);
    if (count > 0) *own = add_rows<false>(*own, x + column, stride, first, first + count, nullptr);
    if (blockIdx.x == 0 && lane == 0) rows_of[expert] += count;
}
