#pragma once
#include "common.cuh"

// A list of block formats as a type: those that the matrices of one launch may have. A number says which one a matrix
// has. A unit of the launch is the shortest of theirs; a weight tile of a format whose units are twice as long serves
// two of it.

template <class First, class... Rest>
struct FormatList {
    using Next = FormatList<Rest...>;
    using Gate = First;
    using Up = typename Next::Gate;  // as the second one
    static constexpr int kElements = First::kElements < Next::kElements ? First::kElements : Next::kElements;
    // Of the largest weight tile.
    static constexpr int kTileBytes =
        kTileRows * First::kBytes > Next::kTileBytes ? kTileRows * First::kBytes : Next::kTileBytes;
    // kMixed: whether units differ. kMany: whether there are several formats.
    static constexpr bool kMixed = First::kElements != Next::kElements || Next::kMixed, kMany = true;

    __device__ static int tile_bytes(int format) {
        return format == 0 ? kTileRows * First::kBytes : Next::tile_bytes(format - 1);
    }
    // Units of the launch that a weight tile serves: one, or two.
    __device__ static int served(int format) {
        return format == 0 ? First::kElements / kElements : Next::elements(format - 1) / kElements;
    }
    __device__ static int elements(int format) { return format == 0 ? First::kElements : Next::elements(format - 1); }
    // Bytes of a row tile of so many of the launch's units.
    __device__ static uint64_t row_tile_bytes(int format, int units) {
        return static_cast<uint64_t>(kMixed ? ceil_div(units, served(format)) : units) * tile_bytes(format);
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
    using Gate = Only;
    using Up = Only;
    static constexpr int kElements = Only::kElements, kTileBytes = kTileRows * Only::kBytes;
    static constexpr bool kMixed = false, kMany = false;

    __device__ static int tile_bytes(int) { return kTileBytes; }
    __device__ static int elements(int) { return kElements; }
    __device__ static uint64_t row_tile_bytes(int, int units) { return static_cast<uint64_t>(units) * kTileBytes; }
    __device__ static int served(int) { return 1; }
    template <class Consumer, class Accumulators>
    __device__ __forceinline__ static void multiply_tile(int, Consumer& consumer, Accumulators& acc) {
        consumer.template multiply_tile<Only>(acc);
    }
};
