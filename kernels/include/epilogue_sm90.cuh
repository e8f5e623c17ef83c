// Hopper's GEMMs' outputs that leave through shared memory (token_rows.cuh): those of experts, and of gate and up.
#pragma once
#include "epilogue.cuh"
#include "token_rows.cuh"

// A grouped gemm_linear's outputs: halves, or kInBlocks (output_blocks.cuh), with rows `ldo` halves, or bytes, apart,
// times a scale that is in the sums already, and in the bias. Experts give many times a token's values, which are read
// once: they are as short as can be.
template <int kTokens, RowOrder kOrder, int kStagedTokens = 16, bool kInBlocks = false>
struct ExpertOutput {
    using Rows = TokenRows<kTokens, kOrder, kStagedTokens>;
    void* out;
    int ldo, all, column;  // all: columns of a row. column: the first of this warpgroup's `tiles` row tiles
    int tiles;
    uint8_t* memory;  // Rows::kBytes of shared memory for each warpgroup of the block

    // Writes the outputs of tokens first, the tile's first, to end - 1. sums: as HalfSums.
    template <class Sums>
    __device__ __forceinline__ void store(const Sums& sums, const float (&bias)[2], int first, int end) const {
        uint32_t warpgroup = thread_here() / 128;
        Rows rows = {memory + warpgroup * Rows::kBytes, 1 + static_cast<int>(warpgroup)};
        auto make = [&](int j, uint32_t (&pairs)[2]) {
            auto batch = sums.batch(j);
#pragma unroll
            for (int i = 0; i < 2; ++i) pairs[i] = pack_half2(batch(i, 0, bias[i]), batch(i, 1, bias[i]));
        };
        auto row = [&](int token, uint32_t& number) {
            number = first + token;
            return first + token < end && column < all;
        };
        uint32_t stride = ldo;
        bool both = tiles == 2 && column + TILE_ROWS < all;
        if constexpr (kInBlocks)
            rows.store(BlockRows{static_cast<uint8_t*>(out), stride, all, column, both}, make, row);
        else rows.store(HalfRows{static_cast<half_t*>(out) + column, stride, TILE_ROWS, both}, make, row);
    }
};

// gemm_gated's outputs, scale * act(gate) * up of `features` features: an operand, with rows `ldo` apart.
struct GatedOutput {
    half_t* out;
    int ldo, features;
    float scale;
    int activation;
    uint8_t* memory;  // of OperandRows, where two warpgroups have a group of features

    // Of feature first + row, for tokens `token`, the tile's first, to end - 1. The sums' row 0 is gate's, row 1 up's.
    template <int kTokens, int kWarpgroups, class Sums>
    __device__ __forceinline__ void store_transposed(const Sums& sums, const float* gate_bias, const float* up_bias,
                                                     int expert, int first, int row, int token, int end) const {
        static_assert(!Sums::kSiluScaled, "such sums come with their biases");
        Biases biases = {expert, features, first + row, first + row < features};
        const float bias[2] = {biases.of(gate_bias), biases.of(up_bias)};
        store<kTokens, kWarpgroups>(sums, bias, first, row, token, end);
    }

    // The same, with gate's bias and up's. For SiLU, where sums are kSiluScaled, they and the biases have all factors,
    // `scale`, too; a feature that does not exist is then 0 only for tokens whose sums are finite.
    template <int kTokens, int kWarpgroups, class Sums>
    __device__ __forceinline__ void store(const Sums& sums, const float (&bias)[2], int first, int row, int token,
                                          int end) const {
        OperandColumn column = {out, ldo, features, first + row, row};
        if (activation == kSilu && Sums::kSiluScaled)  // rows that do not exist have a scale of 0
            store_all<kTokens, kWarpgroups>(column, sums, bias, token, end,
                                            [](float g, float u) { return scaled_silu(g, u); });
        else if (activation == kSilu)
            store_all<kTokens, kWarpgroups>(column, sums, bias, token, end, scaled<kSilu>(column));
        else if (activation == kGeluTanh)
            store_all<kTokens, kWarpgroups>(column, sums, bias, token, end, scaled<kGeluTanh>(column));
        else store_all<kTokens, kWarpgroups>(column, sums, bias, token, end, scaled<kSwigluOai>(column));
    }

    // The output of a gate and an up; 0 where the feature does not exist.
    template <int kActivation>
    __device__ __forceinline__ auto scaled(const OperandColumn& column) const {
        return [this, &column](float g, float u) { return column.kept(gated<kActivation>(g, u) * scale); };
    }

    template <int kTokens, int kWarpgroups, class Sums, class Activate>
    __device__ __forceinline__ void store_all(const OperandColumn& column, const Sums& sums, const float (&bias)[2],
                                              int token, int end, Activate activate) const {
        auto make = [&](int j, float (&y)[2]) {
            auto batch = sums.batch(j);
#pragma unroll
            for (int c = 0; c < 2; ++c) y[c] = activate(batch(0, c, bias[0]), batch(1, c, bias[1]));
        };
        if constexpr (kWarpgroups == 2) {
            half_t* group = out + column.feature / kOperandGroup * kOperandGroup;
            OperandRows<kTokens>{memory, 1}.store(group, ldo, token, column.inside() ? end : 0, make);
        } else column.store<kTokens>(token + thread_here() % 4 * 2, end, make);
    }
};
