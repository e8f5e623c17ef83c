// What gemm_sm90.cu is compiled for, and the names that follow from it.
#pragma once
#include "gemm_blocks_sm90.cuh"
#include "operand.cuh"
#include "../quants/all.cuh"
#include "../quants/format_list.cuh"

// What the host chose (HopperConfig in kqprefill/backends/cuda/gemm/hopper.py), and the sizes that follow from it.
struct Config : BlockConfig {
    using Formats = FormatList<FORMATS>;           // the block formats that the launch's matrices may have
    static constexpr int kMostSteps = STEPS;       // steps that a stage of x has at most
    static constexpr int kRawStages = RAW_STAGES;  // of the ring of weight tiles

    static constexpr int kStep = kOperandGroup;                    // columns that are multiplied at a time
    static constexpr int kUnitSteps = Formats::kElements / kStep;  // steps that one unit of W gives
    static constexpr int kStageSteps = kMostSteps < kUnitSteps ? kMostSteps : kUnitSteps;  // of a stage of x
    static constexpr int kStepBytes = kTokens * kStep * 2, kStageBytes = kStageSteps * kStepBytes;
    static constexpr int kRawStageBytes = kBlockTiles * Formats::kTileBytes;

    using XRing = Ring<kStages, kStageBytes>;
    using RawRing = Ring<kRawStages, kRawStageBytes>;
    // In shared memory: x's ring, the weight tiles' ring, the barriers of both, and what the epilogue needs.
    static constexpr int kRawOffset = XRing::kBytes, kBarrierOffset = kRawOffset + RawRing::kBytes;
    static constexpr int kEpilogueOffset = kBarrierOffset + XRing::kBarrierBytes + RawRing::kBarrierBytes;
    static constexpr int kSharedBytes = kEpilogueOffset + EPILOGUE_BYTES;

    static_assert(kUnitSteps % kStageSteps == 0, "whole stages in a unit");
    static_assert(kRawStages >= 2, "a stage is released when the next has begun");
    static_assert(kSharedBytes <= SHARED_BYTES, "what the host launches with");
};

// Weights that are read for at most so many tokens leave the L2 cache to what stays longer. Of more tokens some blocks
// would find that row tiles have gone which others had brought (docs/tried.md).
constexpr int kPassing = 512;
using Formats = Config::Formats;
using Accumulators = float[Config::kTokens / 2];

struct Rings {
    Config::XRing x;        // steps of x
    Config::RawRing raw;    // weight tiles, still quantised: one for each row tile of the block
    const uint8_t* shared;  // the generic address at which shared memory begins
};
