// Multi-head latent attention (arXiv 2405.04434): from what the matrices give to the latent rows that a layer keeps,
// and to the queries, keys and values that attention reads. Elements of a head's query or key are first `still` that
// are not rotated, then `rotary`; of these the first 2 * `pairs` turn by the angles of `table`.
#include "include/operand.cuh"
#include "include/reduce.cuh"
#include "include/rotation.cuh"
#include "include/types.cuh"

constexpr int kThreads = LATENT_THREADS, kWarps = kThreads / 32;
static_assert(SINGLE_THREAD == 1, "smaller_scale has work for one thread");

// Element i of `rotary` ones, rotated where it has a pair.
__device__ __forceinline__ float turned(const float* x, int i, const float2* angles, int pairs, bool interleaved) {
    return i < 2 * pairs ? rotated(x, i, angles, pairs, interleaved) : x[i];
}

// A warp writes out[i] = element(i) for i below `padded`, a multiple of 4; out lies at a multiple of 8 bytes.
template <typename Element>
__device__ __forceinline__ void write_head(half_t* out, int padded, Element element) {
    for (int i = threadIdx.x % 32 * 4; i < padded; i += 128)
        *reinterpret_cast<uint2*>(out + i) =
            make_uint2(pack_half2(element(i), element(i + 1)), pack_half2(element(i + 2), element(i + 3)));
}

// both: float32 [T, rank + rotary], what attn_kv_a_mqa gives. c: an operand, *c_scale * rms_norm(both's first `rank`
// columns) * weight, rows `stride` apart, with zeros from rank on. k_r: halves [T, rotary], the other columns rotated,
// times *r_scale. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    latent_rows(const float* both, const float* weight, half_t* c, half_t* k_r, int rank, int stride, int rotary,
                float epsilon, const float2* table, int pairs, int interleaved, const float* c_scale,
                const float* r_scale) {
    begin_kernel();
    both += static_cast<uint64_t>(blockIdx.x) * (rank + rotary);
    c += static_cast<uint64_t>(blockIdx.x) * stride;
    k_r += static_cast<uint64_t>(blockIdx.x) * rotary;
    table += static_cast<uint64_t>(blockIdx.x) * pairs;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < rank; i += kThreads) sum = fmaf(both[i], both[i], sum);
    float r = *c_scale / sqrtf(block_sum<kThreads>(sum) / static_cast<float>(rank) + epsilon);
    auto value = [&](int i) { return i < rank ? both[i] * r * weight[i] : 0.0f; };
    for (int i = 2 * threadIdx.x; i < stride; i += 2 * kThreads)
        store_operand(c, i, operand_pair(value(i), value(i + 1)));
    for (int i = threadIdx.x; i < rotary; i += kThreads)
        k_r[i] = float_to_half(turned(both + rank, i, table, pairs, interleaved) * *r_scale);
}

// sums: float32 [T, heads, still + rotary]. q: halves [T, heads, padded], times *scale, with zeros from still + rotary
// on. A warp takes a head; blockIdx.x is the token. Where beta > 0, q at position p becomes (1 + beta ln(1 + p /
// beta_length)) times as large, with p / beta_length rounded down.
extern "C" __global__ void __launch_bounds__(kThreads)
    latent_queries(const float* sums, half_t* q, int heads, int still, int rotary, int padded, const float2* table,
                   int pairs, int interleaved, const float* scale, const int* positions, float beta, int beta_length) {
    begin_kernel();
    int token = blockIdx.x, head = blockIdx.y * kWarps + threadIdx.x / 32;
    if (head >= heads) return;
    uint64_t slot = static_cast<uint64_t>(token) * heads + head;
    sums += slot * (still + rotary);
    table += static_cast<uint64_t>(token) * pairs;
    float factor = *scale;
    if (beta > 0.0f) factor *= 1.0f + beta * log1pf(static_cast<float>(positions[token] / beta_length));
    write_head(q + slot * padded, padded, [&](int i) {
        if (i >= still + rotary) return 0.0f;
        return factor * (i < still ? sums[i] : turned(sums + still, i - still, table, pairs, interleaved));
    });
}

// keys and values: float32, what the matrices make of latent rows. Head h of a row has its `still` elements of the key
// at h * key_step, its value_dim elements of the value at h * value_step, and rows are `heads` such steps apart. k_r:
// halves [rows, rotary] of *r_scale, the same for all heads. k: halves [key rows, heads, key_padded] of *k_scale; v:
// halves [key rows, heads, value_padded] of *v_scale; zeros in what is padded. key_rows: which rows of k and v are
// these rows'; null where they are in order. A warp takes a head; blockIdx.x is the row.
extern "C" __global__ void __launch_bounds__(kThreads)
    latent_heads(const float* keys, const float* values, int key_step, int value_step, const half_t* k_r, half_t* k,
                 half_t* v, int heads, int still, int rotary, int value_dim, int key_padded, int value_padded,
                 const float* r_scale, const float* k_scale, const float* v_scale, const int* key_rows) {
    begin_kernel();
    int row = blockIdx.x, head = blockIdx.y * kWarps + threadIdx.x / 32;
    if (head >= heads) return;
    uint64_t from = static_cast<uint64_t>(row) * heads + head;
    uint64_t to = static_cast<uint64_t>(key_rows != nullptr ? key_rows[row] : row) * heads + head;
    keys += from * key_step;
    values += from * value_step;
    k_r += static_cast<uint64_t>(row) * rotary;
    float key_factor = *k_scale, value_factor = *v_scale, rotary_factor = key_factor / *r_scale;
    write_head(k + to * key_padded, key_padded, [&](int i) {
        if (i >= still + rotary) return 0.0f;
        return i < still ? keys[i] * key_factor : half_to_float(k_r[i - still]) * rotary_factor;
    });
    write_head(v + to * value_padded, value_padded,
               [&](int i) { return i < value_dim ? values[i] * value_factor : 0.0f; });
}

// v[row, h, :] = columns first .. first + value_dim - 1 of latent row c, the same in all heads; zeros from rank on, and
// in what is padded. c: an operand, rows `stride` apart. v: halves [rows, heads, value_padded] under the same scale. A
// warp takes a head; blockIdx.x is the row.
extern "C" __global__ void __launch_bounds__(kThreads)
    latent_values(const half_t* c, int stride, int rank, int first, int value_dim, half_t* v, int heads,
                  int value_padded) {
    begin_kernel();
    int row = blockIdx.x, head = blockIdx.y * kWarps + threadIdx.x / 32;
    if (head >= heads) return;
    c += static_cast<uint64_t>(row) * stride;
    write_head(v + (static_cast<uint64_t>(row) * heads + head) * value_padded, value_padded,
               [&](int i) { return i < value_dim && first + i < rank ? load_operand(c, first + i) : 0.0f; });
}

// *scale = the smaller of *a and *b: of values that two bounds hold for.
extern "C" __global__ void smaller_scale(const float* a, const float* b, float* scale) {
    begin_kernel();
    *scale = fminf(*a, *b);
}
