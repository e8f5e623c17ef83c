// Kimi Delta Attention (arXiv 2510.26692) between its convolutions (delta_inputs.cu) and its output matrix, for heads
// of HEAD_DIM: decays by key element, the recurrence token by token, and the gated norm.
#include "include/activation.cuh"
#include "include/chunks.cuh"
#include "include/gated_norm.cuh"

constexpr int kThreads = KDA_THREADS, kDim = HEAD_DIM;
// kParts lanes share a column of a state, of which each has kRows rows; a head has kSlices blocks of kColumns columns.
constexpr int kParts = 8, kRows = kDim / kParts;
constexpr int kColumns = kThreads / kParts, kSlices = kDim / kColumns;
static_assert(kDim % kColumns == 0 && kRows % 4 == 0, "whole blocks of columns, and rows in fours");

// rates[t, :] = what a token's state decays by, e^(rate * softplus(f + step_bias)) for each of `width` key elements,
// then sigmoid(b) of each head. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    kda_rates(const float* f, const float* b, const float* step_bias, const float* rate, int heads, float* rates) {
    begin_kernel();
    int width = heads * kDim;
    f += static_cast<uint64_t>(blockIdx.x) * width;
    b += static_cast<uint64_t>(blockIdx.x) * heads;
    rates += static_cast<uint64_t>(blockIdx.x) * (width + heads);
    for (int i = threadIdx.x; i < width; i += kThreads) {
        rates[i] = expf(rate[i / kDim] * softplus(f[i] + step_bias[i]));
    }
    for (int h = threadIdx.x; h < heads; h += kThreads) rates[width + h] = sigmoid(b[h]);
}

// S = diag(decay) S, S = S + k (beta (v - S^T k))^T, o = S^T q / sqrt(HEAD_DIM). q, k, v: as delta_inputs makes them, a
// key head for each value head; rates: as kda_rates does, their rows as its sums'. states: float32 [states, heads,
// HEAD_DIM, HEAD_DIM]. Writes o, rows of heads * HEAD_DIM values. A block takes a sequence (x) and kColumns columns of
// a head (y).
extern "C" __global__ void __launch_bounds__(kThreads)
    kda_scan(const half_t* q, const half_t* k, const half_t* v, const float* rates, const Chunk* chunks,
             const Sequence* sequences, int heads, const float* v_scale, float* states, float* o) {
    begin_kernel();
    __shared__ float keys[kDim], queries[kDim], decays[kDim];
    Sequence sequence = sequences[blockIdx.x];
    int head = blockIdx.y / kSlices, column = blockIdx.y % kSlices * kColumns + threadIdx.x / kParts;
    int first = threadIdx.x % kParts * kRows, width = heads * kDim;
    const float unscale = 1.0f / *v_scale, scale = rsqrtf(static_cast<float>(kDim));
    auto place = [&](int number) {
        return (static_cast<int64_t>(number) * heads + head) * (kDim * kDim) + first * kDim + column;
    };
    float state[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) state[i] = sequence.from >= 0 ? states[place(sequence.from) + i * kDim] : 0.0f;
    auto keep = [&] {
        if (sequence.to < 0) return;
#pragma unroll
        for (int i = 0; i < kRows; ++i) states[place(sequence.to) + i * kDim] = state[i];
    };
    auto of_column = [](float sum) {
#pragma unroll
        for (int offset = kParts / 2; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        return sum;
    };
    bool whole = true;
    for (int index = 0; index < sequence.count; ++index) {
        Chunk chunk = chunks[sequence.first + index];
        if (chunk.count < kChunk) keep(), whole = false;  // only the last may be: what is kept is that of whole chunks
        uint64_t own = (static_cast<uint64_t>(sequence.first + index) * heads + head) * (kChunk * kDim);
        for (int t = 0; t < chunk.count; ++t) {
            const float* row = rates + static_cast<int64_t>(chunk.row_of(t)) * (width + heads);
            __syncthreads();
            for (int i = threadIdx.x; i < kDim; i += kThreads) {
                keys[i] = half_to_float(k[own + t * kDim + i]);
                queries[i] = half_to_float(q[own + t * kDim + i]);
                decays[i] = row[head * kDim + i];
            }
            __syncthreads();
            float seen[4] = {}, read[4] = {};  // four sums, none of which waits for another
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                state[i] *= decays[first + i];
                seen[i % 4] = fmaf(keys[first + i], state[i], seen[i % 4]);
            }
            float value = half_to_float(v[own + t * kDim + column]) * unscale;
            float change = row[width + head] * (value - of_column((seen[0] + seen[1]) + (seen[2] + seen[3])));
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                state[i] = fmaf(keys[first + i], change, state[i]);
                read[i % 4] = fmaf(queries[first + i], state[i], read[i % 4]);
            }
            float sum = of_column((read[0] + read[1]) + (read[2] + read[3]));
            if (threadIdx.x % kParts == 0 && t >= chunk.begin)
                o[static_cast<int64_t>(chunk.row + t) * width + head * kDim + column] = sum * scale;
        }
    }
    if (whole) keep();
}

// out[t, :] = half(*scale * rms_norm(o[t, head, :]) * norm * sigmoid(z[t, head, :])) (gated_norm.cuh).
extern "C" __global__ void __launch_bounds__(kThreads)
    kda_output(const float* o, const float* z, const float* norm, int heads, float epsilon, const float* scale,
               half_t* out, int stride) {
    begin_kernel();
    gated_norm<kThreads, kDim, sigmoid>(o, z, norm, heads, epsilon, scale, out, stride);
}
