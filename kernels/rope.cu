// From the sums of the q/k/v matrices to attention's operands: RMSNorm of each q and k head, rotary embedding
// (arXiv 2104.09864), scaling into half's range, and the write of K and V to where attention (or the cache) has them.
#include "include/reduce.cuh"
#include "include/types.cuh"

// table[t, i] = magnitude * (cos, sin)(pi * positions[t] * half_turns[i]). In double: a float32 product is off by 0.01
// radian at position 100,000, and the table is made once a batch.
extern "C" __global__ void __launch_bounds__(256)
    rope_table(const int* positions, const double* half_turns, int n, int pairs, float magnitude, float2* table) {
    int index = blockIdx.x * 256 + threadIdx.x;
    if (index >= n * pairs) return;
    double s, c;
    sincospi(positions[index / pairs] * half_turns[index % pairs], &s, &c);
    table[index] = make_float2(static_cast<float>(c) * magnitude, static_cast<float>(s) * magnitude);
}

constexpr int kWarps = 8, kMaxHead = 256;

// qkv: float32 [T, (nq + 2 nkv) * head_dim]. q, k, v: halves, heads `padded` apart (zeros from head_dim to there), tokens
// q_stride and kv_stride apart. A warp a head; blockIdx.x is the token. norms may be null.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    rotate_qkv(const float* qkv, half_t* q, half_t* k, half_t* v, int nq, int nkv, int head_dim, int padded,
               const float* q_norm, const float* k_norm, float epsilon, const float2* table, int pairs, int interleaved,
               const float* q_scale, const float* k_scale, const float* v_scale) {
    __shared__ float heads[kWarps][kMaxHead];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y * kWarps + warp, token = blockIdx.x;
    if (head >= nq + 2 * nkv) return;
    const float* source = qkv + (static_cast<uint64_t>(token) * (nq + 2 * nkv) + head) * head_dim;
    float* x = heads[warp];
    bool is_q = head < nq, is_v = head >= nq + nkv;
    int slot = is_q ? head : is_v ? head - nq - nkv : head - nq;
    half_t* out = (is_q ? q + static_cast<uint64_t>(token) * nq * padded
                        : (is_v ? v : k) + static_cast<uint64_t>(token) * nkv * padded) + slot * padded;
    float scale = is_q ? *q_scale : is_v ? *v_scale : *k_scale;
    const float* norm = is_q ? q_norm : is_v ? nullptr : k_norm;

    float sum = 0.0f;
    for (int i = lane; i < head_dim; i += 32) {
        x[i] = source[i];
        sum = fmaf(x[i], x[i], sum);
    }
    if (norm != nullptr) {
        float r = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(head_dim) + epsilon);
        for (int i = lane; i < head_dim; i += 32) x[i] = x[i] * r * norm[i];
    }
    __syncwarp();
    const float2* angles = table + static_cast<uint64_t>(token) * pairs;
    for (int i = lane; i < padded; i += 32) {
        float y = i < head_dim ? x[i] : 0.0f;
        if (!is_v && i < 2 * pairs) {
            int pair = interleaved ? i / 2 : i % pairs;
            bool second = interleaved ? i & 1 : i >= pairs;
            float other = x[interleaved ? i ^ 1 : second ? i - pairs : i + pairs];
            y = second ? fmaf(y, angles[pair].x, other * angles[pair].y) : fmaf(y, angles[pair].x, -other * angles[pair].y);
        }
        out[i] = float_to_half(y * scale);
    }
}
