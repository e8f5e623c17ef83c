// How the columns of a GEMM's operands are ordered in memory.
//
// A thread of a warp holds, of 16 columns that one mma or wgmma instruction takes, numbers 2c, 2c+1, 2c+8 and 2c+9
// (c = lane % 4). Sums do not mind an order that both operands share, so operands are stored with the columns of each
// group of 64 permuted such that what a thread holds for four instructions are 16 neighbouring columns, 16c .. 16c+15: the
// weights of such a run share one scale and are decoded at once, straight to where they are multiplied.
#pragma once
#include "types.cuh"

constexpr int kOperandGroup = 64;

// Where column `column` of an operand's row lies. Columns 2i and 2i+1 stay neighbours, 4-byte aligned.
__host__ __device__ constexpr int operand_position(int column) {
    return (column & ~63) | (column >> 2 & 3) << 4 | (column >> 1 & 1) << 3 | (column >> 4 & 3) << 1 | (column & 1);
}
