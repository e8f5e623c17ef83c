// The gates of attention's output (Qwen 3.5): each head's values are multiplied by a sigmoid of what its query's matrix
// made beside the query.
#include "include/activation.cuh"
#include "include/operand.cuh"

constexpr int kThreads = NORM_THREADS;

// qkv: float32 rows of `row` values, which begin with each head's query and then its gates, head_dim values each.
// Writes gates, an operand: sigmoid of each head's gates, where attention writes the head's output. A block takes a
// token.
extern "C" __global__ void __launch_bounds__(kThreads)
    store_gates(const float* qkv, int row, int heads, int head_dim, half_t* gates, int stride) {
    begin_kernel();
    qkv += static_cast<uint64_t>(blockIdx.x) * row;
    gates += static_cast<uint64_t>(blockIdx.x) * stride;
    for (int i = 2 * threadIdx.x; i < heads * head_dim; i += 2 * kThreads) {  // head_dim is even
        const float* from = qkv + (2 * (i / head_dim) + 1) * head_dim + i % head_dim;
        store_operand(gates, i, operand_pair(sigmoid(from[0]), sigmoid(from[1])));
    }
}

// a[t, :] *= gates[t, :], two operands of `columns` columns. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    multiply_gates(half_t* a, const half_t* gates, int columns, int stride) {
    begin_kernel();
    a += static_cast<uint64_t>(blockIdx.x) * stride;
    gates += static_cast<uint64_t>(blockIdx.x) * stride;
    for (int i = 2 * threadIdx.x; i < columns; i += 2 * kThreads) {
        uint32_t gate = *reinterpret_cast<const uint32_t*>(gates + operand_position(i));
        uint32_t* value = reinterpret_cast<uint32_t*>(a + operand_position(i));
        *value = half2_multiply(*value, gate);
    }
}
