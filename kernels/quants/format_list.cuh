#pragma once
#include "common.cuh"

// A list of block formats as a type: those that the matrices of one launch may have. A number says which one a matrix
// has.

template <class First, class... Rest>
struct FormatList {
    using Next = FormatList<Rest...>;
    static constexpr int kElements = First::kElements;
    // Of the largest weight tile.
    static constexpr int kTileBytes =
        kTileRows * First::kBytes > Next::kTileBytes ? kTileRows * First::kBytes : Next::kTileBytes;
    static_assert(First::kElements == Next::kElements, "formats of one launch have units of one length");

    __device__ static int tile_bytes(int format) {
        return format == 0 ? kTileRows * First::kBytes : Next::tile_bytes(format - 1);
    }
    // Calls consumer.multiply_tile<F>(acc) for the format F that has this number.
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
