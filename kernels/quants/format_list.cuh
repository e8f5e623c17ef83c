// A list of formats as a type: those that the matrices of one launch may have, chosen between by number.
#pragma once
#include "common.cuh"

template <class First, class... Rest>
struct FormatList {
    using Next = FormatList<Rest...>;
    static constexpr int kElements = First::kElements;
    static constexpr int kTileBytes =
        kTileRows * First::kBytes > Next::kTileBytes ? kTileRows * First::kBytes : Next::kTileBytes;
    static_assert(First::kElements == Next::kElements, "formats of one launch have units of one length");

    __device__ static int tile_bytes(int format) {
        return format == 0 ? kTileRows * First::kBytes : Next::tile_bytes(format - 1);
    }
    // consumer.multiply_tile<that format>(acc)
    template <class Consumer, class Accumulators>
    __device__ __forceinline__ static void multiply_tile(int format, Consumer& consumer, Accumulators& acc) {
        if (format == 0) consumer.template multiply_tile<First>(acc);
        else Next::multiply_tile(format - 1, consumer, acc);
    }
};
template <class Only>
struct FormatList<Only> {
    static constexpr int kElements = Only::kElements, kTileBytes = kTileRows * Only::kBytes;

    __device__ static int tile_bytes(int) { return kTileBytes; }
    template <class Consumer, class Accumulators>
    __device__ __forceinline__ static void multiply_tile(int, Consumer& consumer, Accumulators& acc) {
        consumer.template multiply_tile<Only>(acc);
    }
};
