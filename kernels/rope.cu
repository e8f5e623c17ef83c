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

struct Rotation {
    const float* source;  // a head's sums
    half_t* out;
    const float* norm;     // or null
    const float2* angles;  // null for v
    int head_dim, padded, pairs;
    float epsilon, scale;

    __device__ float inverse_rms(float sum) const {
        return norm != nullptr ? 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(head_dim) + epsilon) : 1.0f;
    }

    // Halves of a head, pairs half a head apart, all in fours: every load is on its way before the first is waited for.
    __device__ __forceinline__ void rotate_fours(int lane) const {
        constexpr int kFours = kMaxHead / 128;
        float4 own[kFours], other[kFours], weight[kFours], other_weight[kFours], angle[kFours][2];
        auto load = [](const float* from) { return *reinterpret_cast<const float4*>(from); };
        const float4 ones = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kFours; ++j) {
            int i = 4 * lane + 128 * j;
            own[j] = other[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            weight[j] = other_weight[j] = ones;
            angle[j][0] = angle[j][1] = make_float4(1.0f, 0.0f, 1.0f, 0.0f);
            if (i >= head_dim) continue;
            own[j] = load(source + i);
            if (norm != nullptr) weight[j] = load(norm + i);
            if (angles == nullptr || i >= 2 * pairs) continue;
            int pair = i < pairs ? i : i - pairs, partner = i < pairs ? i + pairs : pair;
            other[j] = load(source + partner);
            if (norm != nullptr) other_weight[j] = load(norm + partner);
            angle[j][0] = load(reinterpret_cast<const float*>(angles + pair));
            angle[j][1] = load(reinterpret_cast<const float*>(angles + pair + 2));
        }
#pragma unroll
        for (int j = 0; j < kFours; ++j) sum = add_squares(sum, own[j]);
        float r = inverse_rms(sum);
#pragma unroll
        for (int j = 0; j < kFours; ++j) {
            int i = 4 * lane + 128 * j;
            if (i >= padded) continue;
            float sign = i < pairs ? -r : r;
            auto turn = [&](float a, float wa, float b, float wb, float cosine, float sine) {
                return fmaf(a * r * wa, cosine, b * sign * wb * sine) * scale;
            };
            const float4 &a = own[j], &b = other[j], &wa = weight[j], &wb = other_weight[j], &low = angle[j][0],
                         &high = angle[j][1];
            *reinterpret_cast<uint2*>(out + i) = make_uint2(
                pack_half2(turn(a.x, wa.x, b.x, wb.x, low.x, low.y), turn(a.y, wa.y, b.y, wb.y, low.z, low.w)),
                pack_half2(turn(a.z, wa.z, b.z, wb.z, high.x, high.y), turn(a.w, wa.w, b.w, wb.w, high.z, high.w)));
        }
    }

    // The same for any shape, a value at a time. x: shared memory for a head.
    __device__ __forceinline__ void rotate(int lane, float* x, bool interleaved) const {
        float sum = 0.0f;
        for (int i = lane; i < head_dim; i += 32) {
            x[i] = source[i];
            sum = fmaf(x[i], x[i], sum);
        }
        float r = inverse_rms(sum);
        if (norm != nullptr)
            for (int i = lane; i < head_dim; i += 32) x[i] *= r * norm[i];
        __syncwarp();
        for (int i = lane; i < padded; i += 32) {
            float y = i < head_dim ? x[i] : 0.0f;
            if (angles != nullptr && i < 2 * pairs) {
                int pair = interleaved ? i / 2 : i % pairs;
                bool second = interleaved ? i & 1 : i >= pairs;
                float turned = x[interleaved ? i ^ 1 : second ? i - pairs : i + pairs] * angles[pair].y;
                y = fmaf(y, angles[pair].x, second ? turned : -turned);
            }
            out[i] = float_to_half(y * scale);
        }
    }
};

// qkv: float32 [T, (nq + 2 nkv) * head_dim]. q, k, v: halves [T, heads, padded], zeros from head_dim to there. A warp a head;
// blockIdx.x is the token; kv_rows says which rows of k and v are the tokens', where they are not in order. norms may be null.
// q at position p becomes (1 + beta ln(1 + p / beta_length)) times as large.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    rotate_qkv(const float* qkv, half_t* q, half_t* k, half_t* v, int nq, int nkv, int head_dim, int padded,
               const float* q_norm, const float* k_norm, float epsilon, const float2* table, int pairs, int interleaved,
               const float* q_scale, const float* k_scale, const float* v_scale, const int* kv_rows,
               const int* positions, float beta, int beta_length) {
    begin_kernel();
    __shared__ float heads[kWarps][kMaxHead];
    int warp = threadIdx.x / 32, head = blockIdx.y * kWarps + warp, token = blockIdx.x;
    if (head >= nq + 2 * nkv) return;
    bool is_q = head < nq, is_v = head >= nq + nkv;
    int slot = is_q ? head : is_v ? head - nq - nkv : head - nq, kv_row = kv_rows != nullptr ? kv_rows[token] : token;
    Rotation rotation = {
        qkv + (static_cast<uint64_t>(token) * (nq + 2 * nkv) + head) * head_dim,
        (is_q ? q + static_cast<uint64_t>(token) * nq * padded
              : (is_v ? v : k) + static_cast<uint64_t>(kv_row) * nkv * padded) +
            slot * padded,
        is_q   ? q_norm
        : is_v ? nullptr
               : k_norm,
        is_v ? nullptr : table + static_cast<uint64_t>(token) * pairs,
        head_dim,
        padded,
        pairs,
        epsilon,
        is_q   ? *q_scale
        : is_v ? *v_scale
               : *k_scale,
    };
    if (is_q && beta > 0.0f) rotation.scale *= 1.0f + beta * log1pf(static_cast<float>(positions[token] / beta_length));
    if (head_dim % 4 == 0 && pairs % 4 == 0 && !interleaved) rotation.rotate_fours(threadIdx.x % 32);
    else rotation.rotate(threadIdx.x % 32, heads[warp], interleaved);
}

// Rows of k and v that sequences which begin alike have each for itself (softmax.cuh: Tile): copies[i] is a row and where it
// goes. Rows of `chunks` 16 bytes; a block a copy.
extern "C" __global__ void __launch_bounds__(128) copy_rows(uint4* k, uint4* v, int chunks, const int2* copies) {
    begin_kernel();
    int2 copy = copies[blockIdx.x];
    uint64_t from = static_cast<uint64_t>(copy.x) * chunks, to = static_cast<uint64_t>(copy.y) * chunks;
    for (int i = threadIdx.x; i < chunks; i += 128) k[to + i] = k[from + i], v[to + i] = v[from + i];
}
