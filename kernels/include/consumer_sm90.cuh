// A consumer of gemm_sm90.cu: it decodes weights to the registers that wgmma reads, and multiplies.
#pragma once
#include "gemm_sm90.cuh"

// Which row of its row tiles a thread has. Where outputs are an operand a warp has such rows that each lane, when lanes
// have traded outputs (epilogue.cuh), writes four that are neighbours in operand order. For warp w of a warpgroup:
//
//     lanes          0-3     4-7     8-11    12-15   16-19   20-23   24-27   28-31
//     gemm_linear    8w      8w+1    8w+2    8w+3    8w+4    8w+5    8w+6    8w+7
//     the others     4w      4w+1    4w+16   4w+17   4w+2    4w+3    4w+18   4w+19
__device__ __forceinline__ int row_of_thread() {
    int warp = threadIdx.x / 32 % 4, slot = threadIdx.x % 32 / 4;
    return Config::kGated || Config::kActivated ? slot / 2 % 2 * 16 + warp * 4 + slot / 4 * 2 + slot % 2
                                                : warp * 8 + slot;
}

template <class First, class Second>
constexpr bool kSame = false;
template <class Format>
constexpr bool kSame<Format, Format> = true;

// A thread of a consumer warpgroup.
struct Consumer {
    static constexpr int kUnitSteps = Config::kUnitSteps, kStageSteps = Config::kStageSteps;
    const Rings& rings;
    int units, first;  // first: this warpgroup's first row tile, of the block's in shared memory
    int row, column;   // this thread's, of a row tile and of a step
    float scale;       // that weights are decoded with
    int tokens;        // that the token tile has
    ConsumerPosition<Config::kStages> stage;
    ConsumerPosition<Config::kRawStages> raw;

    // acc = W · Xᵀ for this warpgroup's row tiles: the first is of one format, and the second, where there is one, of
    // the same or of another. Of an expert's last token tile only so many tokens are multiplied as it may have.
    template <class First, class Second = First>
    __device__ __forceinline__ void multiply_tile(Accumulators& acc) {
        constexpr int kTokens = Config::kTokens;
        // gemm_linear's largest token tile leaves no register for more loops.
        constexpr bool kFewer = Config::kGrouped && (Config::kGated || kTokens < 256);
        // Q6_K, whose decoding takes the most registers, leaves none for a third loop in these.
        constexpr bool kFull = (kSame<First, Q6_K> || kSame<Second, Q6_K>) && (Config::kGated || kTokens == 64);
        if constexpr (kFewer && kTokens >= 64 && !kFull)
            if (tokens <= kTokens / 4) return multiply_tokens<First, Second, kTokens / 4>(acc);
        if constexpr (kFewer && kTokens >= 32)
            if (tokens <= kTokens / 2) return multiply_tokens<First, Second, kTokens / 2>(acc);
        multiply_tokens<First, Second, kTokens>(acc);
    }

    // Where this thread's weights of a step begin in their unit. `unit` counts the launch's units; where a format's own
    // are twice as long it counts halves of them.
    template <class Format>
    __device__ __forceinline__ int place(int unit, int step) const {
        return unit % (Format::kElements / Formats::kElements) * Formats::kElements + step * Config::kStep + column;
    }
    // Whether d and m are read once a unit, apart from the weights; grouped kernels, which have more loops, have no
    // registers to keep what was read.
    template <class Format>
    static constexpr bool kApart = Format::kHeader && !Config::kGrouped;

    // The quarter of a long unit that a step is; -1 where that is not known when this is compiled.
    __device__ static constexpr int quarter(int step) { return Formats::kMixed ? -1 : step; }

    // Loads the weights of a step.
    template <class Format>
    __device__ __forceinline__ void load(const uint8_t* tile, int unit, int step, Fields& weights,
                                         Fields& header) const {
        weights = load_fields<Format, true, !kApart<Format>>(tile, row, place<Format>(unit, step));
        if constexpr (kApart<Format>)
            if (step == 0) header = load_fields<Format, false, true>(tile, row, 0);
    }
    template <class Format>
    __device__ __forceinline__ void decode(int unit, int step, const HalfBits& bits, Fields& weights, Fields& header,
                                           uint32_t (&to)[8]) const {
        int at = place<Format>(unit, step);
        if constexpr (kApart<Format>)
            decode_integers<Format>(weights, at, decode_affine<Format>(header, at, quarter(step), scale), bits, to);
        else decode_halves<Format>(weights, at, scale, to);
    }

    // multiply_tile for the first kTokens of the token tile. Weights go through two steps of work: what is multiplied
    // in step i was decoded in step i - 1, and loaded in step i - 2.
    template <class First, class Second, int kTokens>
    __device__ __forceinline__ void multiply_tokens(Accumulators& all) {
        float (&acc)[kTokens / 2] = reinterpret_cast<float (&)[kTokens / 2]>(all);
        // Of two row tiles of a format neighbouring lanes make d and m of one each, where they need the same. With the
        // fewer tokens of an expert there is no register for it.
        constexpr bool kShared =
            First::kShared && kSame<First, Second> && Config::kTiles == 2 && kTokens == Config::kTokens;
        Fields loaded[2], headers[2];
        uint32_t w[2][2][8] = {}, affine[2];
        // What follows from the column would else keep its registers through the epilogue.
        if (!Config::kGrouped && !(Formats::kMany && Config::kTiles == 1)) forget(column);
        // The compiler does not know that this is 0: else it would set these registers anew for each use.
        uint32_t zero = (units + threadIdx.x) >> 30;
        HalfBits bits = {HalfBits().even | zero, HalfBits().odd | zero};
        auto load_step = [&](int unit, int step) {
            const uint8_t* from =
                rings.shared + Config::kRawOffset + raw.stage * Config::kRawStageBytes + first * Formats::kTileBytes;
            constexpr int kOther = Formats::kTileBytes;
            if constexpr (kShared) {
                loaded[0] = load_fields<First, true, false>(from, row, place<First>(unit, step));
                loaded[1] = load_fields<First, true, false>(from + kOther, row, place<First>(unit, step));
                if (step == 0 || Config::kGrouped)
                    headers[0] = load_fields<First, false, true>(from + threadIdx.x % 2 * kOther, row, 0);
            } else {
                load<First>(from, unit, step, loaded[0], headers[0]);
                if constexpr (Config::kTiles == 2) load<Second>(from + kOther, unit, step, loaded[1], headers[1]);
            }
        };
        // Of row tile i, of a step whose weights were loaded.
        auto decode_step = [&](int i, int unit, int step, uint32_t (&to)[2][8]) {
            if constexpr (kShared) {
                int at = place<First>(unit, step);
                if (i == 0) {
                    uint32_t own = decode_affine<First>(headers[0], at, quarter(step), scale);
                    uint32_t other = __shfl_xor_sync(0xffffffffu, own, 1);
                    bool odd = threadIdx.x & 1;
                    affine[0] = odd ? other : own, affine[1] = odd ? own : other;
                }
                decode_integers<First>(loaded[i], at, affine[i], bits, to[i]);
            } else if (i == 0) decode<First>(unit, step, bits, loaded[0], headers[0], to[0]);
            else if constexpr (Config::kTiles == 2) decode<Second>(unit, step, bits, loaded[1], headers[1], to[1]);
        };
        uint64_t first_x = wgmma_operand(rings.x.stage(0));
        rings.raw.wait_until_arrived(raw);
        load_step(0, 0);
        decode_step(0, 0, 0, w[0]);
        decode_step(1, 0, 0, w[0]);
        load_step(0, 1);
        for (int unit = 0; unit < units; ++unit) {
            bool more = unit + 1 < units;
            // Three warpgroups and several formats leave no registers for what the compiler would make of it before.
            if (Config::kWarpgroups == 3 && Formats::kMany) forget(column);
#pragma unroll
            for (int step = 0; step < kUnitSteps; ++step) {
                if (step % kStageSteps == 0) rings.x.wait_until_arrived(stage);
                int offset = stage.stage * Config::kStageBytes + step % kStageSteps * Config::kStepBytes;
                uint64_t x = first_x + offset / 16;
                uint32_t (&now)[2][8] = w[step % 2], (&next)[2][8] = w[(step + 1) % 2];
                auto ahead = [&](int steps) { return unit + (step + steps) / kUnitSteps; };  // the unit of a later step
                auto multiply = [&](int k16) {
                    wgmma_f16(acc, now[0][2 * k16], now[1][2 * k16], now[0][2 * k16 + 1], now[1][2 * k16 + 1],
                              x + 2 * k16, unit > 0 || step > 0 || k16 > 0);
                };
                // The matrix units take one instruction after another, and a warp that gives them the next waits until
                // there is room: the decoding stands between them, so as to run beside them.
                wgmma_begin();
                multiply(0);
                multiply(1);
                wgmma_commit();
                wgmma_wait<1>();  // the step before this is done with: its registers may be used again, and its stage
                if (step % kStageSteps == 0 && (unit > 0 || step > 0)) release_previous_stage();
                if (step < kUnitSteps - 1 || more) decode_step(0, ahead(1), (step + 1) % kUnitSteps, next);
                wgmma_begin();
                multiply(2);
                multiply(3);
                wgmma_commit();
                if (step < kUnitSteps - 1 || more) decode_step(1, ahead(1), (step + 1) % kUnitSteps, next);
                if (step == kUnitSteps - 2) {  // the unit has been loaded; the next follows
                    rings.raw.release_by_thread(raw.stage);
                    raw.advance();
                    if (more) rings.raw.wait_until_arrived(raw);
                }
                if (step < kUnitSteps - 2 || more) load_step(ahead(2), (step + 2) % kUnitSteps);
                if (step % kStageSteps == kStageSteps - 1) stage.advance();
            }
        }
        wgmma_wait<0>();
        release_previous_stage();
    }

    __device__ __forceinline__ void release_previous_stage() const {
        // Heads of 64, groups with token tiles of 64, and loops for several formats leave no register for `last`.
        constexpr bool kFull = Config::kHeadDim == 64 || (Config::kGrouped && Config::kTokens == 64) ||
                               (Formats::kMany && !Config::kGated);
        rings.x.release_by_warp<Config::kSharers>(kFull ? stage.previous() : stage.last);
    }
};
