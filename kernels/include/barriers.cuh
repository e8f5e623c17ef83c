// Hopper's barriers in shared memory (PTX ISA: mbarrier), and the rings through which producer warps hand data to
// consumer warps. For sm_90a only.
#pragma once
#include "types.cuh"

// The bodies of Barrier's methods that differ in what other memory they order: SEMANTICS is a text, as asm wants it.
#define BARRIER_ARRIVE_IN(SEMANTICS)                 \
    asm volatile(                                    \
        "{\n"                                        \
        ".reg .b32 remote;\n"                        \
        "mapa.shared::cluster.u32 remote, %0, %1;\n" \
        "mbarrier.arrive" SEMANTICS                  \
        ".shared::cluster.b64 _, [remote];\n"        \
        "}" ::"r"(address),                          \
        "r"(rank)                                    \
        : "memory")
#define BARRIER_WAIT(SEMANTICS)              \
    asm volatile(                            \
        "{\n"                                \
        ".reg .pred done;\n"                 \
        "again:\n"                           \
        "mbarrier.try_wait.parity" SEMANTICS \
        ".shared::cta.b64 done, [%0], %1;\n" \
        "@done bra ready;\n"                 \
        "bra again;\n"                       \
        "ready:\n"                           \
        "}" ::"r"(address),                  \
        "r"(parity)                          \
        : "memory")

// A barrier: 8 bytes of shared memory, known by their address. Its phases follow one another; one ends when as many
// arrivals have come as `init` was told, and all bytes that these arrivals announced.
struct Barrier {
    static constexpr int kBytes = 8;
    uint32_t address;

    __device__ __forceinline__ void init(int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive() const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
    }
    // Arrives, and announces so many bytes of asynchronous copies.
    __device__ __forceinline__ void arrive_expecting(int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    }
    // Arrives at the barrier that has this address in block `rank` of the cluster.
    __device__ __forceinline__ void arrive_in(int rank) const { BARRIER_ARRIVE_IN(""); }
    // Does the same; what this thread wrote before is seen by those of the cluster that wait_for_cluster.
    __device__ __forceinline__ void publish_in(int rank) const { BARRIER_ARRIVE_IN(".release.cluster"); }
    // Waits until the phase of this parity (0 for the first, 1 for the second, 0 for the third ...) has ended.
    __device__ __forceinline__ void wait(uint32_t parity) const { BARRIER_WAIT(""); }
    // Does the same, for arrivals of the cluster's threads that publish.
    __device__ __forceinline__ void wait_for_cluster(uint32_t parity) const { BARRIER_WAIT(".acquire.cluster"); }
};
#undef BARRIER_ARRIVE_IN
#undef BARRIER_WAIT

// Makes initialised barriers visible to the copy engine and to the other blocks of a cluster.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Where a producer or a consumer is in a ring: at which stage, and whether in an even (0) or an odd round through the
// ring.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};
template <int kStages>
struct ProducerPosition : RingPosition<kStages> {};
template <int kStages>
struct ConsumerPosition : RingPosition<kStages> {
    int last = 0;  // the stage before, once there was one; or, where that register is needed, previous()

    __device__ __forceinline__ void advance() {
        last = this->stage;
        RingPosition<kStages>::advance();
    }
    __device__ __forceinline__ int previous() const { return this->stage == 0 ? kStages - 1 : this->stage - 1; }
};

// The lane of a warp that tells its own block that a stage may be filled again (Ring::release_by_warp), where so many
// blocks of a cluster fill each other's.
template <int kCluster>
__device__ __forceinline__ int releasing_lane() {
    return kCluster == 1 ? 0 : blockIdx.x % kCluster;
}

// A ring of kStages stages of kStageBytes each in shared memory, which are filled and read in turn. Each stage has two
// barriers. A phase of `arrived` ends when the stage's data have come: the producers arrive there, and announce bytes.
// A phase of `finished` ends when all consumers have read them: then the stage may be filled again.
template <int kStages, int kStageBytes>
struct Ring {
    static constexpr int kBytes = kStages * kStageBytes, kBarrierBytes = 2 * kStages * Barrier::kBytes;
    uint32_t stages, barriers;  // the shared addresses of the kBytes of stages and the kBarrierBytes of barriers

    __device__ __forceinline__ uint32_t stage(int index) const { return stages + index * kStageBytes; }
    __device__ __forceinline__ Barrier arrived(int stage) const { return {barriers + stage * Barrier::kBytes}; }
    __device__ __forceinline__ Barrier finished(int stage) const {
        return {barriers + (kStages + stage) * Barrier::kBytes};
    }

    // Called by one thread, which then calls fence_barrier_init: each phase has so many arrivals of producers, and of
    // consumers.
    __device__ __forceinline__ void init(int producers, int consumers) const {
        for (int i = 0; i < kStages; ++i) {
            arrived(i).init(producers);
            finished(i).init(consumers);
        }
    }

    // A producer waits until the stage may be filled.
    __device__ __forceinline__ void wait_until_finished(const ProducerPosition<kStages>& at) const {
        finished(at.stage).wait(at.phase ^ 1);
    }

    // A producer waits until then, arrives, and announces so many bytes. Its copies are to complete
    // on the barrier that is returned.
    __device__ __forceinline__ Barrier begin_filling(const ProducerPosition<kStages>& at, int bytes) const {
        wait_until_finished(at);
        arrived(at.stage).arrive_expecting(bytes);
        return arrived(at.stage);
    }

    // A consumer waits until the stage's data have come.
    __device__ __forceinline__ void wait_until_arrived(const ConsumerPosition<kStages>& at) const {
        arrived(at.stage).wait(at.phase);
    }

    // A consumer has finished with a stage: each thread says so for itself, or a warp once for all its threads. Where
    // the blocks of a cluster fill each other's stages, each of them must know: of a warp, lane i tells block i.
    __device__ __forceinline__ void release_by_thread(int stage) const { finished(stage).arrive(); }
    template <int kCluster = 1>
    __device__ __forceinline__ void release_by_warp(int stage) const {
        int lane = threadIdx.x % 32;
        if (kCluster == 1 && lane == 0) finished(stage).arrive();
        if (kCluster > 1 && lane < kCluster) finished(stage).arrive_in(lane);
    }
};
