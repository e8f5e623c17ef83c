// From the rows that a cache keeps of a layer to real values, for whoever writes them to a file.
#include "include/operand.cuh"
#include "include/types.cuh"

constexpr int kThreads = STATE_THREADS;
constexpr float kLargestHalf = 65504.0f;

// kept: halves of *scale, rows `stride` apart, of heads `padded` apart; in operand order where `operand`. Writes rows
// of `columns` values, heads of `head_dim` side by side: to `halves`, or where that is null to `floats`. *beyond
// becomes 1 where a half cannot hold one. A block takes a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    real_rows(const half_t* kept, int stride, int padded, int head_dim, int columns, int operand, const float* scale,
              half_t* halves, float* floats, int* beyond) {
    begin_kernel();
    kept += static_cast<uint64_t>(blockIdx.x) * stride;
    uint64_t to = static_cast<uint64_t>(blockIdx.x) * columns;
    float factor = 1.0f / *scale;
    bool within = true;
    for (int i = threadIdx.x; i < columns; i += kThreads) {
        float held = operand ? load_operand(kept, i) : half_to_float(kept[i / head_dim * padded + i % head_dim]);
        float value = held * factor;
        if (halves == nullptr) {
            floats[to + i] = value;
            continue;
        }
        within = within && fabsf(value) <= kLargestHalf;
        halves[to + i] = float_to_half(value);
    }
    if (!within) *beyond = 1;
}
