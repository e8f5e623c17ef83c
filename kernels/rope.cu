// From what the q, k and v matrices give to what attention reads: RMSNorm of each head of q and k, rotary embedding
// (arXiv 2104.09864), scaling into half's range, and the write of k and v to where attention (or the cache) has them.
#include "include/reduce.cuh"
#include "include/rotation.cuh"
#include "include/types.cuh"

// table[t, i] = magnitude * (cos, sin)(pi * positions[t] * half_turns[i]) for n tokens. The angle is a double, since as
// a float32 product it is off by 0.01 radian at position 100,000, and since the table is made once a batch.
extern "C" __global__ void __launch_bounds__(ROPE_TABLE_THREADS)
    rope_table(const int* positions, const double* half_turns, int n, int pairs, float magnitude, float2* table) {
    begin_kernel();
    int index = blockIdx.x * ROPE_TABLE_THREADS + threadIdx.x;
    if (index >= n * pairs) return;
    double s, c;
    sincospi(positions[index / pairs] * half_turns[index % pairs], &s, &c);
    table[index] = make_float2(static_cast<float>(c) * magnitude, static_cast<float>(s) * magnitude);
}

constexpr int kWarps = ROTATE_THREADS / 32;
constexpr int kMostFours = 256;  // columns of a head that rotate_fours takes: more would cost it registers

// What a warp does with one head of one token.
struct Rotation {
    const float* source;   // [head_dim]
    half_t* out;           // [padded]: zeros from head_dim on
    const float* norm;     // the norm's weight [head_dim]; null for ones
    const float2* angles;  // cosine and sine of each of `pairs` pairs; null for no rotation (v)
    int head_dim, padded, pairs;
    bool normalised;
    float epsilon, scale;

    // squares: those of the whole head.
    __device__ float inverse_rms(float squares) const {
        return normalised ? 1.0f / sqrtf(squares / static_cast<float>(head_dim) + epsilon) : 1.0f;
    }

    // The squares of a head of 64 or 128 whose columns 4 lane to 4 lane + 3 are own, added up as the GEMMs that make
    // heads of their sums do it (epilogue_heads.cuh: by which bits of the columns' numbers).
    __device__ __forceinline__ float squares_of_halves(int lane, const float4& own, bool int8) const {
        int half = head_dim / 8;  // in lanes
        bool low = lane < half;
        auto both = [&](float x) {
            float given = __shfl_xor_sync(0xffffffffu, x, half);
            float a = low ? x : given, b = low ? given : x;
            return fmaf(b, b, a * a);
        };
        float x = both(own.x), y = both(own.y), z = both(own.z), w = both(own.w);
        float sum = (x + y) + (z + w);
        sum += __shfl_xor_sync(0xffffffffu, sum, int8 ? 4 : 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, int8 ? 1 : 2);
        sum += __shfl_xor_sync(0xffffffffu, sum, int8 ? 2 : 4);
        return half > 8 ? sum + __shfl_xor_sync(0xffffffffu, sum, 8) : sum;
    }

    // Rotates a head whose pairs are `pairs` columns apart, four columns at a time; head_dim and pairs are multiples of
    // 4. All loads are on their way before the first is waited for.
    __device__ __forceinline__ void rotate_fours(int lane, bool int8) const {
        constexpr int kFours = kMostFours / 128;  // a warp takes 128 columns at a time
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
        bool halves = (head_dim == 64 || head_dim == 128) && (pairs == 0 || 2 * pairs == head_dim);
        float r = inverse_rms(halves ? squares_of_halves(lane, own[0], int8) : warp_sum(sum));
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

    // Rotates a head of any shape, a value at a time. x: shared memory for a head. interleaved: pairs are neighbours.
    __device__ __forceinline__ void rotate(int lane, float* x, bool interleaved) const {
        float sum = 0.0f;
        for (int i = lane; i < head_dim; i += 32) {
            x[i] = source[i];
            sum = fmaf(x[i], x[i], sum);
        }
        float r = inverse_rms(warp_sum(sum));
        if (normalised)
            for (int i = lane; i < head_dim; i += 32) x[i] *= norm != nullptr ? r * norm[i] : r;
        __syncwarp();
        for (int i = lane; i < padded; i += 32) {
            float y = i < head_dim ? x[i] : 0.0f;
            if (angles != nullptr && i < 2 * pairs) y = rotated(x, i, angles, pairs, interleaved);
            out[i] = float_to_half(y * scale);
        }
    }
};

// qkv: float32 [T, (nq + 2 nkv) * head_dim]. q [T, nq, padded], k and v [rows, nkv, padded]: halves, zeros from
// head_dim on, scaled by *q_scale, *k_scale and *v_scale. A warp takes a head; blockIdx.x is the token. q_norm and
// k_norm may be null; v_normed: 1 where v is normalised, too, without a weight. kv_rows: which rows of k and v are the
// tokens'; null where they are in order. Where beta > 0, q at position p becomes (1 + beta ln(1 + p / beta_length))
// times as large, with p / beta_length rounded down. gated: 1 where each head of q is followed by as many gates, which
// this passes over (gates.cu), else 0. v_is_k: 1 where qkv has no columns of v, which is made of k's. int8: 1 where q
// was multiplied in int8.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    rotate_qkv(const float* qkv, half_t* q, half_t* k, half_t* v, int nq, int nkv, int head_dim, int padded,
               const float* q_norm, const float* k_norm, int v_normed, float epsilon, const float2* table, int pairs,
               int interleaved, const float* q_scale, const float* k_scale, const float* v_scale, const int* kv_rows,
               const int* positions, float beta, int beta_length, int gated, int v_is_k, int int8) {
    begin_short_kernel();
    __shared__ float heads[kWarps][MAX_HEAD_DIM];
    int warp = threadIdx.x / 32, head = blockIdx.y * kWarps + warp, token = blockIdx.x;
    if (head >= nq + 2 * nkv) return;
    bool is_q = head < nq, is_v = head >= nq + nkv;
    int slot = is_q ? head : is_v ? head - nq - nkv : head - nq, kv_row = kv_rows != nullptr ? kv_rows[token] : token;
    int in_row = nq + (2 - v_is_k) * nkv + gated * nq, at = is_v ? head - v_is_k * nkv : head;  // in heads
    const float* norm = is_q ? q_norm : is_v ? nullptr : k_norm;
    Rotation rotation = {
        qkv + (static_cast<uint64_t>(token) * in_row + at + gated * (is_q ? head : nq)) * head_dim,
        (is_q ? q + static_cast<uint64_t>(token) * nq * padded
              : (is_v ? v : k) + static_cast<uint64_t>(kv_row) * nkv * padded) +
            slot * padded,
        norm,
        is_v ? nullptr : table + static_cast<uint64_t>(token) * pairs,
        head_dim,
        padded,
        pairs,
        is_v ? v_normed != 0 : norm != nullptr,
        epsilon,
        is_q   ? *q_scale
        : is_v ? *v_scale
               : *k_scale,
    };
    if (is_q && beta > 0.0f) rotation.scale *= 1.0f + beta * log1pf(static_cast<float>(positions[token] / beta_length));
    if (head_dim % 4 == 0 && pairs % 4 == 0 && !interleaved && padded <= kMostFours)
        rotation.rotate_fours(threadIdx.x % 32, int8 != 0);
    else rotation.rotate(threadIdx.x % 32, heads[warp], interleaved);
}

// The mean and the inverse of the root mean square of what is left of x [head_dim], which a warp has in shared memory.
__device__ __forceinline__ float2 moments(const float* x, int head_dim, bool centred, float epsilon) {
    int lane = threadIdx.x % 32;
    float mean = 0.0f, squares = 0.0f;
    if (centred) {
        for (int i = lane; i < head_dim; i += 32) mean += x[i];
        mean = warp_sum(mean) / static_cast<float>(head_dim);
    }
    for (int i = lane; i < head_dim; i += 32) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    return make_float2(mean, 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(head_dim) + epsilon));
}

// As rotate_qkv, without gates and with v of its own, for what few models do. normed: 0 where q and k are not
// normalised, 1 where they are before they are rotated, 2 where they are after. q_norm and k_norm: null for weights of
// 1; norm_step: from one head's weights to the next's. centred: 1 for LayerNorm. q at position p is multiplied by 1 +
// beta ln(1 + (p + beta_offset) / beta_length).
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    rotate_and_norm(const float* qkv, half_t* q, half_t* k, half_t* v, int nq, int nkv, int head_dim, int padded,
                    const float* q_norm, const float* k_norm, int norm_step, int normed, int centred, float epsilon,
                    const float2* table, int pairs, int interleaved, const float* q_scale, const float* k_scale,
                    const float* v_scale, const int* kv_rows, const int* positions, float beta, int beta_length,
                    int beta_offset) {
    begin_kernel();
    __shared__ float heads[kWarps][MAX_HEAD_DIM], turned[kWarps][MAX_HEAD_DIM];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y * kWarps + warp, token = blockIdx.x;
    if (head >= nq + 2 * nkv) return;
    bool is_q = head < nq, is_v = head >= nq + nkv;
    int slot = is_q ? head : is_v ? head - nq - nkv : head - nq, kv_row = kv_rows != nullptr ? kv_rows[token] : token;
    const float *source = qkv + (static_cast<uint64_t>(token) * (nq + 2 * nkv) + head) * head_dim,
                *norm = is_q ? q_norm : k_norm;
    const float2* angles = table + static_cast<uint64_t>(token) * pairs;
    half_t* out = (is_q ? q + static_cast<uint64_t>(token) * nq * padded
                        : (is_v ? v : k) + static_cast<uint64_t>(kv_row) * nkv * padded) +
                  slot * padded;
    if (norm != nullptr) norm += slot * norm_step;
    float *x = heads[warp], *y = turned[warp], scale = is_q ? *q_scale : is_v ? *v_scale : *k_scale;
    if (is_q && beta > 0.0f)
        scale *= 1.0f + beta * log1pf(static_cast<float>((positions[token] + beta_offset) / beta_length));
    auto normalise = [&](float* values) {
        float2 found = moments(values, head_dim, centred != 0, epsilon);
        for (int i = lane; i < head_dim; i += 32)
            values[i] = (values[i] - found.x) * found.y * (norm != nullptr ? norm[i] : 1.0f);
        __syncwarp();
    };
    for (int i = lane; i < head_dim; i += 32) x[i] = source[i];
    __syncwarp();
    if (normed == 1 && !is_v) normalise(x);
    for (int i = lane; i < head_dim; i += 32)
        y[i] = !is_v && i < 2 * pairs ? rotated(x, i, angles, pairs, interleaved != 0) : x[i];
    __syncwarp();
    if (normed == 2 && !is_v) normalise(y);
    for (int i = lane; i < padded; i += 32) out[i] = float_to_half(i < head_dim ? y[i] * scale : 0.0f);
}

// Copies rows of k and v, k_chunks and v_chunks times 16 bytes: row copies[i].x becomes row copies[i].y. A block makes
// a copy. These are rows that sequences which begin alike have each for itself (softmax.cuh: QueryTile).
extern "C" __global__ void __launch_bounds__(COPY_THREADS)
    copy_rows(uint4* k, uint4* v, int k_chunks, int v_chunks, const int2* copies) {
    begin_kernel();
    int2 copy = copies[blockIdx.x];
    auto copy_row = [&](uint4* rows, int chunks) {
        uint64_t from = static_cast<uint64_t>(copy.x) * chunks, to = static_cast<uint64_t>(copy.y) * chunks;
        for (int i = threadIdx.x; i < chunks; i += COPY_THREADS) rows[to + i] = rows[from + i];
    };
    copy_row(k, k_chunks);
    copy_row(v, v_chunks);
}
