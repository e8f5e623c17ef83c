// From the sums of the q/k/v matrices to attention's operands: RMSNorm of each q and k head, rotary embedding
// (arXiv 2104.09864), scaling into half's range, and the write of K and V to where attention (or the cache) has them.
#include "include/reduce.cuh"
#include "include/types.cuh"

// table[t, i] = magnitude * (cos, sin)(pi * positions[t] * half_turns[i]). In double: a float32 product is off by 0.01
// radian at position 100,000, and the table is made once a batch.
extern "C" __global__ void __launch_bounds__(256)
    rope_table(const int* positions, const double* half_turns, int n, int pairs, float magnitude, float2* table) {
    begin_kernel();
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
    begin_kernel();
    __shared__ __align__(16) float heads[kWarps][kMaxHead];
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

    // Four values at a time, where that is aligned.
    bool fours = head_dim % 4 == 0;
    float sum = 0.0f;
    for (int i = fours ? 4 * lane : lane; i < head_dim; i += fours ? 128 : 32) {
        if (fours) {
            float4 v = *reinterpret_cast<const float4*>(source + i);
            *reinterpret_cast<float4*>(x + i) = v;
            sum = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, sum))));
        } else {
            x[i] = source[i];
            sum = fmaf(x[i], x[i], sum);
        }
    }
    float r = norm != nullptr ? 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(head_dim) + epsilon) : 1.0f;
    __syncwarp();
    const float2* angles = table + static_cast<uint64_t>(token) * pairs;
    auto normed = [&](float v, int i) { return norm != nullptr ? v * r * norm[i] : v; };
    for (int i = 4 * lane; i < padded; i += 128) {
        float y[4];
        bool rotated = !is_v && i < 2 * pairs;
        if (fours && rotated && !interleaved && pairs % 4 == 0) {
            bool second = i >= pairs;
            int partner = second ? i - pairs : i + pairs, pair = second ? partner : i;
            float4 own = *reinterpret_cast<const float4*>(x + i), other = *reinterpret_cast<const float4*>(x + partner);
            float4 low = *reinterpret_cast<const float4*>(angles + pair), high = *reinterpret_cast<const float4*>(angles + pair + 2);
            float a[4] = {own.x, own.y, own.z, own.w}, b[4] = {other.x, other.y, other.z, other.w};
            float cosines[4] = {low.x, low.z, high.x, high.z}, sines[4] = {low.y, low.w, high.y, high.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float turned = normed(b[e], partner + e) * sines[e];
                y[e] = fmaf(normed(a[e], i + e), cosines[e], second ? turned : -turned);
            }
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int at = i + e;
                y[e] = at < head_dim ? normed(x[at], at) : 0.0f;
                if (!is_v && at < 2 * pairs) {
                    int pair = interleaved ? at / 2 : at % pairs;
                    bool second = interleaved ? at & 1 : at >= pairs;
                    int partner = interleaved ? at ^ 1 : second ? at - pairs : at + pairs;
                    float turned = normed(x[partner], partner) * angles[pair].y;
                    y[e] = fmaf(y[e], angles[pair].x, second ? turned : -turned);
                }
            }
        }
        *reinterpret_cast<uint2*>(out + i) = make_uint2(pack_half2(y[0] * scale, y[1] * scale), pack_half2(y[2] * scale, y[3] * scale));
    }
}
