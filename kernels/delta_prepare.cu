// Gated DeltaNet (arXiv 2412.06464) in chunks: all that does not depend on the state before a chunk, for all chunks at
// once. With rows for positions, G the sums of the gates g up to each, D[t][s] = e^(G_t - G_s) for s <= t:
//     A = the part below the diagonal of  diag(beta) (K K^T * D),      P = (Q K^T * D) / sqrt(HEAD_DIM)
//     (I + A) U = diag(beta) V,        (I + A) W = diag(beta e^G) K
// With the state S before the chunk, the recurrence then adds K^T (U - W S) to it (delta_scan.cu). |W_t| <= 1, and
// |U_t| <= kChunk max |v|: each is what the recurrence does to a state of its own.
#include "include/activation.cuh"
#include "include/chunk_products.cuh"

constexpr int kThreads = 256, kDim = HEAD_DIM;
constexpr int kRow = kDim + 8, kSumRow = kChunk + 4;  // halves and floats from row to row: banks, and 16-byte alignment
constexpr int kKeys = 0, kQueries = kKeys + kChunk * kRow * 2, kSums = kQueries + kChunk * kRow * 2;
constexpr int kGates = kSums + kChunk * kSumRow * 4, kShared = kGates + 3 * kChunk * 4;
static_assert(kThreads == THREADS && kShared <= SHARED_BYTES, "what the host launches with");
static_assert(2 * kDim <= kThreads, "a thread has a column of U or of W");

// q, k: [chunks, key_heads, kChunk, HEAD_DIM], v: [chunks, value_heads, ...] times *v_scale (delta_inputs). gates: rows
// of the sums of 2 * value_heads values, those for beta, then those for the decay; rate: ssm_a, step_bias: ssm_dt.
// Writes for each chunk and value head w [kChunk, HEAD_DIM], u the same, times *v_scale / kChunk, p [kChunk, kChunk]
// and the sums G [kChunk]. by_turns: value head h uses key head h % key_heads, else h / (value_heads / key_heads). A
// block takes a chunk (x) of a value head (y).
extern "C" __global__ void __launch_bounds__(kThreads)
    delta_prepare(const half_t* q, const half_t* k, const half_t* v, const float* gates, const float* rate,
                  const float* step_bias, const Chunk* chunks, int key_heads, int value_heads, int by_turns, half_t* w,
                  half_t* u, half_t* p, float* decay) {
    begin_kernel();
    extern __shared__ __align__(128) uint8_t shared[];
    half_t *keys = reinterpret_cast<half_t*>(shared + kKeys), *queries = reinterpret_cast<half_t*>(shared + kQueries);
    float *sums = reinterpret_cast<float*>(shared + kSums), *total = reinterpret_cast<float*>(shared + kGates);
    float *beta = total + kChunk, *growth = beta + kChunk;
    Chunk chunk = chunks[blockIdx.x];
    int head = blockIdx.y, key_head = by_turns ? head % key_heads : head / (value_heads / key_heads);
    uint64_t own = static_cast<uint64_t>(blockIdx.x) * value_heads + head;
    uint64_t shared_keys = static_cast<uint64_t>(blockIdx.x) * key_heads + key_head;

    constexpr int kPieces = kDim / 8;  // of 16 bytes in a row
    for (int i = threadIdx.x; i < kChunk * kPieces; i += kThreads) {
        int row = i / kPieces, piece = i % kPieces * 8;
        uint64_t from = shared_keys * (kChunk * kDim) + row * kDim + piece;
        *reinterpret_cast<uint4*>(keys + row * kRow + piece) = *reinterpret_cast<const uint4*>(k + from);
        *reinterpret_cast<uint4*>(queries + row * kRow + piece) = *reinterpret_cast<const uint4*>(q + from);
    }
    if (threadIdx.x < kChunk) {
        int t = threadIdx.x;
        float b = 0.0f, g = 0.0f;
        if (t < chunk.count) {
            const float* row = gates + static_cast<int64_t>(chunk.row_of(t)) * (2 * value_heads);
            b = sigmoid(row[head]);
            float step = row[value_heads + head] + step_bias[head];
            g = rate[head] * softplus(step);
        }
        beta[t] = b;
        total[t] = g;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int lane = threadIdx.x;
        float2 sums = sums_up_to(lane, total[2 * lane], total[2 * lane + 1]);
        total[2 * lane] = sums.x, total[2 * lane + 1] = sums.y;
    }
    __syncthreads();
    if (threadIdx.x < kChunk) {
        growth[threadIdx.x] = expf(total[threadIdx.x]);
        decay[own * kChunk + threadIdx.x] = total[threadIdx.x];
    }

    // Four warps multiply keys by keys, four queries by keys: 16 rows each.
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = warp % 4 * 16;
    bool of_queries = warp >= 4;
    uint32_t left = shared_address(of_queries ? queries : keys), right = shared_address(keys);
    float acc[kChunk / 8][4] = {};
    multiply_by_rows<kDim>(acc, left, right, kRow, row0, lane);
    const float scale = rsqrtf(static_cast<float>(kDim));
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int t = row0 + lane / 4 + 8 * r, s = 8 * j + lane % 4 * 2;
            float value[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                bool seen = of_queries ? s + c <= t : s + c < t;
                float factor = of_queries ? scale : beta[t];
                // Masked first: e^(G_t - G_s) of a later s could overflow.
                value[c] = seen ? factor * expf(total[t] - total[s + c]) * acc[j][2 * r + c] : 0.0f;
            }
            if (of_queries)
                *reinterpret_cast<uint32_t*>(p + own * (kChunk * kChunk) + t * kChunk + s) =
                    pack_half2(value[0], value[1]);
            else *reinterpret_cast<float2*>(sums + t * kSumRow + s) = make_float2(value[0], value[1]);
        }
    __syncthreads();
    if (threadIdx.x >= 2 * kDim) return;

    // Forward substitution, a column a thread. What is not below the diagonal is zero: it changes nothing.
    bool of_keys = threadIdx.x >= kDim;
    int column = threadIdx.x % kDim;
    const half_t* values = v + own * (kChunk * kDim) + column;
    float x[kChunk];
#pragma unroll
    for (int t = 0; t < kChunk; ++t)
        x[t] = of_keys ? beta[t] * growth[t] * half_to_float(keys[t * kRow + column])
                       : beta[t] * half_to_float(values[t * kDim]) * (1.0f / kChunk);
#pragma unroll
    for (int t = 1; t < kChunk; ++t) {
        float part[4] = {x[t]};  // four sums, none of which waits for another
#pragma unroll
        for (int s = 0; s < t; s += 4) {
            float4 a = *reinterpret_cast<const float4*>(sums + t * kSumRow + s);
            part[0] = fmaf(-a.x, x[s], part[0]);
            part[1] = fmaf(-a.y, x[s + 1], part[1]);
            part[2] = fmaf(-a.z, x[s + 2], part[2]);
            part[3] = fmaf(-a.w, x[s + 3], part[3]);
        }
        x[t] = (part[0] + part[1]) + (part[2] + part[3]);
    }
    half_t* out = (of_keys ? w : u) + own * (kChunk * kDim) + column;
#pragma unroll
    for (int t = 0; t < kChunk; ++t) out[t * kDim] = float_to_half(x[t]);
}
