// How the angles of rotary embedding come to the epilogue of Hopper's GEMMs of q, k and v (epilogue_heads.cuh): through
// the ring that brings x, after the last step of each output tile. So they come while the tile is still multiplied; as
// loads of the epilogue's threads, for whose results there are few registers, they were a quarter of an int8 product.
#pragma once
#include "sm90.cuh"

// A stage of the ring takes as many bytes of angles as a step has of x: those of kTokens of a token tile's tokens. Each
// has half a head of them, pairs (cos, sin), in panels of 16 pairs, 128 bytes, with the 128-byte swizzle.
template <class Config>
struct AngleStages {
    static constexpr int kPairs = Config::kHeadDim / 2, kPanelPairs = 16, kRowBytes = 128;
    static constexpr int kPanels = kPairs > 0 ? kPairs / kPanelPairs : 1;  // and as many stages of a token tile
    static constexpr int kTokens = Config::kTokens / kPanels, kPanelBytes = kTokens * kRowBytes;
    static constexpr int kBytes = kPanels * kPanelBytes;
    static_assert(kTokens % (8 * Config::kSharers) == 0, "a swizzled box has whole groups of eight rows");

    // Has the copy engine bring stage i of the token tile that begins with token `first`: each of a cluster's sharers
    // brings its share of the tokens, for all of them. map: the table's tensor map, boxes of 32 floats by kTokens /
    // kSharers rows.
    __device__ __forceinline__ static void copy(uint32_t to, const void* map, int first, int i, Barrier arrived) {
        constexpr int kSharers = Config::kSharers, kOwn = kTokens / kSharers;
        int rank = blockIdx.x % kSharers, token = first + i * kTokens + rank * kOwn;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            uint32_t place = to + panel * kPanelBytes + rank * kOwn * kRowBytes;
            tensor_copy_to<kSharers>(place, map, panel * 2 * kPanelPairs, token, arrived);
        }
    }

    // Does so for all stages of the tile, at the producer's position, if there is a map. Angles begin `in_stage` bytes
    // into a stage.
    template <class Ring, class Position>
    __device__ __forceinline__ static void produce(const Ring& ring, Position& at, int in_stage, const void* map,
                                                   int first) {
        for (int i = 0; i < kPanels && map != nullptr; ++i, at.advance()) {
            Barrier arrived = ring.begin_filling(at, kBytes);
            copy(ring.stage(at.stage) + in_stage, map, first, i, arrived);
        }
    }

    // Where pair `pair` of token `token` lies in a stage; of the token eight further on, 8 * kRowBytes later.
    __device__ __forceinline__ static uint32_t offset(int pair, int token) {
        return pair / kPanelPairs * kPanelBytes + token * kRowBytes + (pair % kPanelPairs / 2 ^ token % 8) * 16 +
               pair % 2 * 8;
    }
};

// A consumer's way to the angles of its output tile. Ring, position: the ring's that brings them, at their first stage;
// in_stage: where they begin in a stage. Where nothing is rotated (not `any`), none were brought.
template <class Config, class Ring, class Position>
struct AngleReader {
    using Stages = AngleStages<Config>;
    const Ring& ring;
    Position& position;
    int in_stage;
    bool any;

    // Waits for the next stage, which it returns the address of.
    __device__ __forceinline__ uint32_t begin() const {
        if (any) ring.wait_until_arrived(position);
        return ring.stage(position.stage) + in_stage;
    }
    // All threads of the warp have read the stage.
    __device__ __forceinline__ void end() const {
        if (!any) return;
        ring.template release_by_warp<Config::kSharers>(position.stage);
        position.advance();
    }
};
