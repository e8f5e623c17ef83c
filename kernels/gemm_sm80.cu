// out[m, n] = sum over k of x[m, k] * w[n, k]: halves into float32, with mma.sync and cp.async (tiles_sm80.cuh).
//
// Each output is one chain of sums over k in order, whatever the tile: a row's bits depend neither on the other rows
// nor on the configuration.
#include "include/epilogue.cuh"
#include "include/tiles_sm80.cuh"

static_assert(kOperandGroup % BLOCK_K == 0, "operands are padded to whole steps");

// A thread's share of the copies of w: rows of k halves, n of each expert's.
struct HalfWeights {
    const half_t* w;
    int n, k;
    Loader<BLOCK_N> loader;

    __device__ void begin(int expert, int row) {
        loader.begin(GROUPED ? w + static_cast<uint64_t>(expert) * n * k : w, row, n, k);
    }
    __device__ void load(uint32_t stage, int step) const { loader.load(stage, step); }
};

#if ACTIVATED

// out[m, f] = *out_scale * act(sums / (*x_scale * *w_scale) + bias) as an operand, rows `ldo` apart. w has room for
// `width` rows, of which `features` are there. bias, [features], may be null. Columns from `features` to `width` become
// zero.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_activated(const half_t* x, const half_t* w, int m, int features, int width, int k, half_t* out, int ldo,
                   const float* x_scale, const float* w_scale, const float* bias, const float* out_scale,
                   int activation) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators<float>& acc) {
        float alpha = unscale(x_scale, w_scale), scale = *out_scale;
        for_each_pair(tile, 0, 1, [&](int row, int column, int i, int j, int half) {
            if (column >= width) return;
            float y[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                bool inside = column + c < features;
                float own_bias = bias != nullptr && inside ? bias[column + c] : 0.0f;
                float sum = fmaf(acc[i][j][2 * half + c], alpha, own_bias);
                y[c] = inside ? activated(sum, activation) * scale : 0.0f;
            }
            store_operand(out + static_cast<uint64_t>(row) * ldo, column, operand_pair(y[0], y[1]));
        });
    };
    multiply_tiles<float>(x, HalfWeights{w, width, k}, {m, nullptr, nullptr}, {0, 0}, width, k, write);
}

#else

// out = sums / (*x_scale * *w_scale) + bias + residual, float32, rows `ldo` apart. bias (a row for each expert) and
// residual may be null, and residual may be out itself. Grouped: halves, times *out_scale; n is even, and no residual.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_linear(const half_t* x, const half_t* w, int m, int n, int k, void* out, int ldo, const float* x_scale,
                const float* w_scale, const float* out_scale, const float* bias, const float* residual,
                const Group* groups, const int* group_count, int first_expert, int last_expert) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators<float>& acc) {
        float alpha = unscale(x_scale, w_scale);
        // Both of a pair's addresses are then 8-byte aligned.
        bool paired = ldo % 2 == 0 && reinterpret_cast<uint64_t>(out) % sizeof(float2) == 0;
        for_each_pair(tile, 0, 1, [&](int row, int column, int i, int j, int half) {
            if (column >= n) return;
            bool both = column + 1 < n;
            uint64_t at = static_cast<uint64_t>(row) * ldo + column;
            auto bias_of = [&](int c) {
                return bias != nullptr && column + c < n ? bias[tile.expert * n + column + c] : 0.0f;
            };
            float a = fmaf(acc[i][j][2 * half], alpha, bias_of(0)),
                  b = fmaf(acc[i][j][2 * half + 1], alpha, bias_of(1));
            float* to = static_cast<float*>(out) + at;
            if (GROUPED) {
                float scale = *out_scale;
                *reinterpret_cast<uint32_t*>(static_cast<half_t*>(out) + at) = pack_half2(a * scale, b * scale);
            } else if (both && paired) {
                float2 r =
                    residual != nullptr ? *reinterpret_cast<const float2*>(residual + at) : make_float2(0.0f, 0.0f);
                *reinterpret_cast<float2*>(to) = make_float2(a + r.x, b + r.y);
            } else {
                to[0] = residual != nullptr ? a + residual[at] : a;
                if (both) to[1] = residual != nullptr ? b + residual[at + 1] : b;
            }
        });
    };
    multiply_tiles<float>(x, HalfWeights{w, n, k}, {m, groups, group_count}, {first_expert, last_expert}, n, k, write);
}

// out[m, f] = *out_scale * act(gate) * up as an operand, rows `ldo` apart. w's rows are gate and up, 8 and 8 in turn
// (dequantize's `gated`), with room for `width` of each. gate_bias and up_bias, [features] for each expert, may be
// null. Columns from `features` to `width` become zero.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_gated(const half_t* x, const half_t* w, int m, int features, int width, int k, half_t* out, int ldo,
               const float* x_scale, const float* w_scale, const float* gate_bias, const float* up_bias,
               const float* out_scale, int activation, const Group* groups, const int* group_count, int first_expert,
               int last_expert) {
    begin_kernel();
    auto write = [&](OutputTile tile, const Accumulators<float>& acc) {
        float alpha = unscale(x_scale, w_scale), scale = *out_scale;
        for_each_pair(tile, 0, 2, [&](int row, int column, int i, int j, int half) {
            int f = column / 16 * 8 + column % 8;
            if (f >= width) return;
            float y[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                bool inside = f + c < features;
                auto bias_of = [&](const float* bias) {
                    return bias != nullptr && inside ? bias[tile.expert * features + f + c] : 0.0f;
                };
                float gate = fmaf(acc[i][j][2 * half + c], alpha, bias_of(gate_bias)),
                      up = fmaf(acc[i][j + 1][2 * half + c], alpha, bias_of(up_bias));
                y[c] = inside ? gated(gate, up, activation) * scale : 0.0f;
            }
            OperandPair pair = operand_pair(y[0], y[1]);
            store_operand(out + static_cast<uint64_t>(row) * ldo, f, pair);
        });
    };
    multiply_tiles<float>(x, HalfWeights{w, 2 * width, k}, {m, groups, group_count}, {first_expert, last_expert},
                          2 * width, k, write);
}

#endif
