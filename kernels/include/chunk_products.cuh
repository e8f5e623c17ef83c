// Products of a chunk's rows (chunks.cuh) on the matrix units, by mma.m16n8k16 from halves in shared memory, and the
// state of a recurrence, which such products read and make. A warp has 16 rows of the left side; four have all 64.
#pragma once
#include "chunks.cuh"

// Sums up to each position of a chunk, of two values that a lane has for positions 2 * lane and 2 * lane + 1.
__device__ __forceinline__ float2 sums_up_to(int lane, float first, float second) {
    float sum = first + second;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        float other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    float before = __shfl_up_sync(0xffffffffu, sum, 1);
    return make_float2(lane > 0 ? before + first : first, sum);
}

// What a warp computes of a chunk's 64 rows and a slice's columns: 16 rows from 16 * row on, and 32 columns from
// `column` on. mma gives a thread the values at own_row (within the 16) and own_column, at the next column, and 8 rows
// and multiples of 8 columns further.
struct WarpPlace {
    int lane, row, column, own_row, own_column;

    __device__ WarpPlace() {
        int warp = threadIdx.x / 32;
        lane = threadIdx.x % 32, row = warp % 4, column = warp / 4 * 32;
        own_row = lane / 4, own_column = column + lane % 4 * 2;
    }
};

// Loads the left side of step `step` of a product: 16 rows of 16 columns, rows `halves` apart.
__device__ __forceinline__ void load_left(uint32_t (&a)[4], uint32_t from, int halves, int row, int step, int lane) {
    ldmatrix_x4(a, from + ((row + lane % 16) * halves + step * 16 + lane / 16 * 8) * 2);
}

// Loads its right side: 16 rows, and 16 columns from `column` on.
__device__ __forceinline__ void load_right(uint32_t (&b)[4], uint32_t from, int halves, int column, int step,
                                           int lane) {
    ldmatrix_x4_trans(b, from + ((step * 16 + lane % 16) * halves + column + lane / 16 * 8) * 2);
}

// Adds a * b to two neighbouring tiles of 8 columns.
__device__ __forceinline__ void multiply_tiles(float (&first)[4], float (&second)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[4]) {
    mma_m16n8k16(first, a, b[0], b[1]);
    mma_m16n8k16(second, a, b[2], b[3]);
}

// sums += A Bᵀ, of a warp's rows of A and all of B: both are a chunk's rows of kColumns halves, `halves` apart.
template <int kColumns>
__device__ __forceinline__ void multiply_by_rows(float (&sums)[kChunk / 8][4], uint32_t left, uint32_t right,
                                                 int halves, int row, int lane) {
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step) {
        uint32_t a[4];
        load_left(a, left, halves, row, step, lane);
#pragma unroll
        for (int j = 0; j < kChunk / 16; ++j) {
            uint32_t b[4];
            ldmatrix_x4(b, right + ((j * 16 + lane / 16 * 8 + lane % 8) * halves + step * 16 + lane / 8 % 2 * 8) * 2);
            multiply_tiles(sums[2 * j], sums[2 * j + 1], a, b);
        }
    }
}

// sums += P V, where P are a chunk's weights [kChunk, kChunk], zeros behind the diagonal, and V its rows of a slice.
__device__ __forceinline__ void multiply_weights(float (&sums)[4][4], const WarpPlace& at, uint32_t weights,
                                                 int weight_halves, uint32_t rows, int halves) {
    for (int step = 0; step <= at.row; ++step) {
        uint32_t a[4], b[4];
        load_left(a, weights, weight_halves, at.row * 16, step, at.lane);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            load_right(b, rows, halves, at.column + j * 16, step, at.lane);
            multiply_tiles(sums[2 * j], sums[2 * j + 1], a, b);
        }
    }
}

// A slice of a recurrence's state, kRows rows of it, in float32 and the registers of a block's threads.
template <int kRows>
struct StateSlice {
    static constexpr int kTiles = (kRows + 63) / 64;  // of 16 rows that a warp has
    float values[kTiles][4][4];

    // use(row, column, value) for each of a thread's values.
    template <class Use>
    __device__ __forceinline__ void each(const WarpPlace& at, Use use) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    use((at.row + 4 * tile) * 16 + at.own_row + 8 * (i / 2), at.own_column + 8 * j + i % 2,
                        values[tile][j][i]);
    }

    // Writes the values times factor as halves to shared memory, rows `halves` apart.
    __device__ __forceinline__ void hold(const WarpPlace& at, uint8_t* to, int halves, float factor) const {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int row = (at.row + 4 * tile) * 16 + at.own_row + 8 * r;
                if (row >= kRows) continue;
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    *reinterpret_cast<uint32_t*>(to + (row * halves + at.own_column + 8 * j) * 2) =
                        pack_half2(values[tile][j][2 * r] * factor, values[tile][j][2 * r + 1] * factor);
            }
    }

    // S = share * S + Kᵀ U, where K are a chunk's rows of kRows halves, and U of a slice.
    __device__ __forceinline__ void advance(const WarpPlace& at, float share, uint32_t k, int k_halves, uint32_t u,
                                            int u_halves) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            int row = (at.row + 4 * tile) * 16;
            if (row >= kRows) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) values[tile][j][i] *= share;
#pragma unroll
            for (int step = 0; step < kChunk / 16; ++step) {
                uint32_t a[4], b[4];
                ldmatrix_x4_trans(
                    a, k + ((step * 16 + at.lane / 16 * 8 + at.lane % 8) * k_halves + row + at.lane / 8 % 2 * 8) * 2);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    load_right(b, u, u_halves, at.column + j * 16, step, at.lane);
                    multiply_tiles(values[tile][2 * j], values[tile][2 * j + 1], a, b);
                }
            }
        }
    }
};
