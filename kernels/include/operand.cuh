// How the columns of a GEMM's operands are ordered in memory ("operand order"), and how values are written in that
// order.
//
// One mma or wgmma instruction takes 16 columns. Of these a thread holds numbers 2c, 2c + 1, 2c + 8 and 2c + 9, where c
// is lane % 4: four columns that are not neighbours. But a sum does not mind an order that both operands share. So both
// are stored with the columns of each group of kOperandGroup = 64 permuted, such that what a thread holds for four
// instructions are 16 neighbouring columns, 16c .. 16c + 15. These are weights that share one scale, and they are
// decoded at once, straight to the registers where they are multiplied.
//
// A group in memory; each number is a column, and the columns of one thread stand one below another:
//
//                         c = 0    c = 1    c = 2    c = 3  |  c = 0    c = 1    c = 2    c = 3
//     position            0   1    2   3    4   5    6   7  |  8   9   10  11   12  13   14  15
//     instruction 0       0   1   16  17   32  33   48  49  |  2   3   18  19   34  35   50  51
//     instruction 1       4   5   20  21   36  37   52  53  |  6   7   22  23   38  39   54  55
//     instruction 2       8   9   24  25   40  41   56  57  | 10  11   26  27   42  43   58  59
//     instruction 3      12  13   28  29   44  45   60  61  | 14  15   30  31   46  47   62  63
//
// In bits, column  c1 c0 i1 i0 h e  (c: thread, i: instruction, h: left or right half above, e: even or odd) lies at
// position  i1 i0 h c1 c0 e. Columns 2i and 2i + 1 stay neighbours; pairs that are 16 columns apart become neighbours.
#pragma once
#include "types.cuh"

constexpr int kOperandGroup = OPERAND_GROUP;
static_assert(kOperandGroup == 64, "the permutation is one of 64 columns");

// Where column `column` of an operand's row lies.
__host__ __device__ constexpr int operand_position(int column) {
    return (column & ~63) | (column >> 2 & 3) << 4 | (column >> 1 & 1) << 3 | (column >> 4 & 3) << 1 | (column & 1);
}

// The one format that operands have today: halves, each a power of two times its value. Another would bring its own
// pair, load_operand and store_operand.

// Columns 2i and 2i + 1 of a row, as they are stored.
using OperandPair = uint32_t;

__device__ __forceinline__ OperandPair operand_pair(float even, float odd) {
    return pack_half2(even, odd);
}

// Writes columns `column` (an even number) and column + 1 of a row.
__device__ __forceinline__ void store_operand(half_t* row, int column, OperandPair pair) {
    *reinterpret_cast<OperandPair*>(row + operand_position(column)) = pair;
}

// The same for the pairs that begin at `column` and at column + 16, 8 bytes at once; column % 32 is below 16. `to` is
// where `column` lies in the row.
__device__ __forceinline__ void store_operand(half_t* to, uint2 pairs) {
    *reinterpret_cast<uint2*>(to) = pairs;
}

// The same for columns `column` to column + 3, the first a multiple of four.
__device__ __forceinline__ void store_operand(half_t* to, OperandPair first, OperandPair second) {
    *reinterpret_cast<OperandPair*>(to) = first;
    *reinterpret_cast<OperandPair*>(to + (operand_position(2) - operand_position(0))) = second;
}

// Writes, 16 bytes at once, the pairs that begin at column, + 16, + 32 and + 48; column % 64 is below 16.
__device__ __forceinline__ void store_operand(half_t* row, int column, const OperandPair (&pairs)[4]) {
    *reinterpret_cast<uint4*>(row + operand_position(column)) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Writes a row whose columns are value(i), and zeros from `columns` on, by all of a block's threads.
template <int kThreads, class Value>
__device__ __forceinline__ void store_row(half_t* row, int columns, int stride, Value value) {
    auto inside = [&](int i) { return i < columns ? value(i) : 0.0f; };
    for (int i = 2 * threadIdx.x; i < stride; i += 2 * kThreads)
        store_operand(row, i, operand_pair(inside(i), inside(i + 1)));
}

// Column `column` of a row, still scaled.
__device__ __forceinline__ float load_operand(const half_t* row, int column) {
    return half_to_float(row[operand_position(column)]);
}
