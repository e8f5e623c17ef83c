// Embeddings of a token for each layer (Gemma 4's small models): `width` values a layer, beside the residual stream.
#include "include/activation.cuh"
#include "include/operand.cuh"
#include "include/reduce.cuh"

constexpr int kWarps = PER_LAYER_THREADS / 32;

// embeddings[t, l, :] = (own[t, l, :] + rms_norm(embeddings[t, l, :]) * norm) / sqrt(2), float32 [T, layers, width].
// blockIdx.x is the token; a warp takes a layer.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    join_embeddings(float* embeddings, const float* own, const float* norm, int layers, int width, float epsilon) {
    begin_kernel();
    int layer = blockIdx.y * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (layer >= layers) return;
    uint64_t row = (static_cast<uint64_t>(blockIdx.x) * layers + layer) * width;
    embeddings += row;
    own += row;
    float sum = 0.0f;
    for (int i = lane; i < width; i += 32) sum = fmaf(embeddings[i], embeddings[i], sum);
    float r = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(width) + epsilon);
    for (int i = lane; i < width; i += 32) embeddings[i] = fmaf(embeddings[i] * r, norm[i], own[i]) * 0.70710678f;
}

// out[t, :] = gelu(gates[t, :]) * embeddings[t, :] / row_scale[t], as an operand: rows are `stride` apart, with zeros
// from `width` to there. gates: float32 [T, width]; embeddings: float32, rows `apart` apart. row_scale: the power of
// two that leaves the row's largest value between 2^14 and 2^15: no bound on these values is known beforehand. A warp
// takes one of n tokens.
extern "C" __global__ void __launch_bounds__(32 * kWarps)
    gate_embeddings(const float* gates, const float* embeddings, uint64_t apart, int n, int width, half_t* out,
                    int stride, float* row_scale) {
    begin_kernel();
    int token = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= n) return;
    gates += static_cast<uint64_t>(token) * width;
    embeddings += token * apart;
    out += static_cast<uint64_t>(token) * stride;
    auto value = [&](int i) { return i < width ? gated(gates[i], embeddings[i], kGeluTanh) : 0.0f; };
    uint32_t largest = 0;  // as bits, of which a NaN's are above every number's
    for (int i = lane; i < width; i += 32) largest = max(largest, __float_as_uint(fabsf(value(i))));
    largest = __reduce_max_sync(0xffffffffu, largest);
    int exponent = min(max(static_cast<int>(largest >> 23) - 127 - 14, -126), 126);
    if (largest == 0) exponent = 0;
    float scale = bits_to_float(static_cast<uint32_t>(127 - exponent) << 23);
    for (int i = 2 * lane; i < stride; i += 64)
        store_operand(out, i, operand_pair(value(i) * scale, value(i + 1) * scale));
    if (lane == 0) row_scale[token] = bits_to_float(static_cast<uint32_t>(127 + exponent) << 23);
}
