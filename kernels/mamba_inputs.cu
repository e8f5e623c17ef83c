// Mamba-2 (arXiv 2405.21060), what comes before the recurrence and what comes after it: steps and decays, the causal
// convolution of x, B and C, and the gated norm of what the recurrence gives. For convolutions of KERNEL taps.
#include "include/activation.cuh"
#include "include/chunk_products.cuh"
#include "include/operand.cuh"
#include "include/reduce.cuh"
#include "include/scale_for.cuh"

constexpr int kThreads = MAMBA_THREADS, kWarps = kThreads / 32, kTaps = KERNEL;
constexpr int kAhead = 16;  // rows that are on their way at a time

constexpr int kMostScale = 60;  // as an exponent: products of two scales are numbers, too

// scales: of u = step * x, of B and of C as halves; and what the state, in units of u's and B's, is multiplied by to be
// halves: a state that decays at `rate` is at most (1 / |rate| + the largest step) times the largest x and B. norms,
// step_norms: of the rows of the matrices that make x, B and C, and the steps; sum_bias, step_sum_bias: null or these
// matrices' biases; an input row's length is at most gain. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    mamba_scales(const float* norms, const float* sum_bias, const float* taps, const float* bias,
                 const float* step_norms, const float* step_sum_bias, const float* step_bias, const float* rate,
                 int width, int state_width, int heads, float gain, float* scales) {
    begin_kernel();
    __shared__ float largest[5][kThreads];
    float found[5] = {};  // x, B, C, step, 1 / |rate|
    auto size = [](const float* values, int i) { return values != nullptr ? fabsf(values[i]) : 0.0f; };
    for (int i = threadIdx.x; i < width + 2 * state_width; i += kThreads) {
        float sum = 0.0f;
        for (int j = 0; j < kTaps; ++j) sum += fabsf(taps[i * kTaps + j]);
        int kind = i < width ? 0 : i < width + state_width ? 1 : 2;
        float most = (gain * norms[i] + size(sum_bias, i)) * sum + size(bias, i) + 0.3f;  // silu(v) > -0.3
        found[kind] = fmaxf(found[kind], most);
    }
    for (int h = threadIdx.x; h < heads; h += kThreads) {
        found[3] = fmaxf(found[3], gain * step_norms[h] + size(step_sum_bias, h) + fabsf(step_bias[h]) + 0.7f);
        found[4] = fmaxf(found[4], 1.0f / fmaxf(fabsf(rate[h]), 1e-20f));
    }
    for (int kind = 0; kind < 5; ++kind) largest[kind][threadIdx.x] = found[kind];
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int kind = 0; kind < 5; ++kind)
        for (int t = 0; t < kThreads; ++t) found[kind] = fmaxf(found[kind], largest[kind][t]);
    auto scale = [](float bound) { return scale_for<kMostScale>(bound, kHalfTop); };
    scales[0] = scale(found[0] * found[3]), scales[1] = scale(found[1]), scales[2] = scale(found[2]);
    scales[3] = scale(found[0] * found[1] * (found[3] + found[4]) * scales[0] * scales[1]);
}

// rates: float32 rows of what gives the steps, a value a head. Writes for each chunk and head [kChunk] steps, and the
// sums of step * rate up to each position; steps are zero from `count` on. A block takes a chunk, a warp its heads in
// turn.
extern "C" __global__ void __launch_bounds__(kThreads)
    mamba_steps(const float* rates, const float* step_bias, const float* rate, const Chunk* chunks, int heads,
                float* steps, float* decay) {
    begin_kernel();
    Chunk chunk = chunks[blockIdx.x];
    int lane = threadIdx.x % 32;
    for (int head = threadIdx.x / 32; head < heads; head += kWarps) {
        uint64_t own = (static_cast<uint64_t>(blockIdx.x) * heads + head) * kChunk;
        float step[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int t = 2 * lane + i;
            bool inside = t < chunk.count;
            step[i] =
                inside ? softplus(rates[static_cast<int64_t>(chunk.row_of(t)) * heads + head] + step_bias[head]) : 0.0f;
        }
        float2 sums = sums_up_to(lane, step[0] * rate[head], step[1] * rate[head]);
        steps[own + 2 * lane] = step[0], steps[own + 2 * lane + 1] = step[1];
        decay[own + 2 * lane] = sums.x, decay[own + 2 * lane + 1] = sums.y;
    }
}

// sums: float32 rows of `channels` values, the heads of x, then the groups of B and of C; taps [channels, KERNEL], bias
// [channels] or null. Writes of each chunk halves of each position, zeros from `count` on: u = step * x [chunks, heads,
// kChunk, padded], zeros from head_dim on, and b and c [chunks, groups, kChunk, state], times their scales
// (mamba_scales); and of the chunk's own rows o [n, heads * head_dim] = skip * x. A block takes a chunk (x), a thread a
// channel (y).
extern "C" __global__ void __launch_bounds__(kThreads)
    mamba_inputs(const float* sums, const float* taps, const float* bias, const float* skip, const float* steps,
                 const Chunk* chunks, int heads, int head_dim, int padded, int groups, int state, const float* scales,
                 half_t* u, half_t* b, half_t* c, float* o) {
    begin_kernel();
    Chunk chunk = chunks[blockIdx.x];
    int width = heads * head_dim, of_state = groups * state, channels = width + 2 * of_state;
    int channel = blockIdx.y * kThreads + threadIdx.x;
    if (channel >= channels) return;
    auto load = [&](int position) {
        bool inside = position + chunk.behind >= 0 && position < chunk.count;
        return inside ? sums[static_cast<int64_t>(chunk.row_of(position)) * channels + channel] : 0.0f;
    };
    bool is_x = channel < width, is_c = channel >= width + of_state;
    int head = is_x ? channel / head_dim : 0, place = channel - (is_x   ? head * head_dim
                                                                 : is_c ? width + of_state
                                                                        : width);
    int group = is_x ? 0 : place / state, column = is_x ? place : place % state, step = is_x ? padded : state;
    uint64_t own = static_cast<uint64_t>(blockIdx.x) * (is_x ? heads : groups) + (is_x ? head : group);
    half_t* out = (is_x ? u : is_c ? c : b) + own * kChunk * step + column;
    const float* own_steps = steps + (static_cast<uint64_t>(blockIdx.x) * heads + head) * kChunk;
    float scale = scales[is_x ? 0 : is_c ? 2 : 1], share = is_x ? skip[head] : 0.0f;
    bool pads = is_x && column < padded - head_dim;  // a column behind the head's
    float added = bias != nullptr ? bias[channel] : 0.0f;
    convolve<kTaps, kChunk, kAhead>(taps + channel * kTaps, added, 0, load, [&](int t, float sum) {
        float value = t < chunk.count ? silu(sum) : 0.0f;
        out[t * step] = float_to_half(value * scale * (is_x ? own_steps[t] : 1.0f));
        if (pads) out[t * step + head_dim] = 0;
        if (is_x && t >= chunk.begin && t < chunk.count)
            o[static_cast<int64_t>(chunk.row + t) * width + channel] = share * value;
    });
}

// y = o * silu(z), [n, groups * columns], RMS-normalised over each group's columns (where norm is not null) and times
// norm: out[t, :] = *scale * y[t, :], an operand with rows `stride` apart, zeros behind the groups' columns. Without a
// norm y goes to o itself, and out is null. A block takes a token (x) and a group (y).
extern "C" __global__ void __launch_bounds__(kThreads)
    mamba_output(float* o, const float* z, const float* norm, int columns, float epsilon, const float* scale,
                 half_t* out, int stride) {
    begin_kernel();
    int first = blockIdx.y * columns, all = gridDim.y * columns;
    o += static_cast<uint64_t>(blockIdx.x) * all + first;
    z += static_cast<uint64_t>(blockIdx.x) * all + first;
    auto gated_output = [&](int i) { return o[i] * silu(z[i]); };
    if (norm == nullptr) {
        for (int i = threadIdx.x; i < columns; i += kThreads) o[i] = gated_output(i);
        return;
    }
    float squares = 0.0f;
    for (int i = threadIdx.x; i < columns; i += kThreads) {
        float y = gated_output(i);
        squares = fmaf(y, y, squares);
    }
    float r = *scale / sqrtf(block_sum<kThreads>(squares) / static_cast<float>(columns) + epsilon);
    out += static_cast<uint64_t>(blockIdx.x) * stride;
    auto normed = [&](int i) { return gated_output(i) * r * norm[first + i]; };  // from the L1 cache, mostly
    for (int i = 2 * threadIdx.x; i < columns; i += 2 * kThreads)
        store_operand(out, first + i, operand_pair(normed(i), normed(i + 1)));
    if (blockIdx.y + 1 == gridDim.y)
        for (int i = all + 2 * threadIdx.x; i < stride; i += 2 * kThreads) store_operand(out, i, 0u);
}
