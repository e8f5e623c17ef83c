// Mixture of experts (arXiv 2401.04088): which experts a token goes to, copies of its row in the experts' order, and
// the way back. All of it is on the device, and each sum has a fixed order. An entry is one of the `used` experts of a
// token; it has the number token * used + slot.
#include "include/combine.cuh"
#include "include/groups.cuh"
#include "include/operand.cuh"
#include "include/reduce.cuh"
#include "include/rms_norm.cuh"
#include "include/routing.cuh"
#include "include/types.cuh"

constexpr int kThreads = EXPERT_THREADS;
static_assert(SHARED_ROW == 8 * kThreads, "what half of a block's threads keep, four columns four times each");
static_assert(ARRANGE_THREADS == MOST_EXPERTS, "arrange: a thread an expert");

// Finds the `used` largest of each of n tokens' scores, of equals the ones with the lowest numbers, and their shares. A
// share comes from a softmax over all scores or, with routed_after, over the chosen ones; with normalise, the shares of
// a token are made to add up to 1. Where expert_scale is not null, a share is at last multiplied by its expert's. A
// warp takes a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    route(const float* scores, const float* expert_scale, int n, int experts, int used, int normalise, int routed_after,
          int* expert_of, float* share_of) {
    begin_kernel();
    int token = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
    if (token >= n) return;
    Routed routed(token, scores, expert_scale, experts, used, expert_of, share_of);
    bool of_chosen = normalise || routed_after;
    if (experts <= 128) route_token<4>(routed, of_chosen);
    else if (experts <= 256) route_token<8>(routed, of_chosen);
    else route_token<MOST_EXPERTS / 32>(routed, of_chosen);
}

// The same where the choice is Biased (routing.cuh).
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    route_biased(const float* scores, const float* bias, const float* expert_scale, int n, int experts, int used,
                 int sigmoid, int normalise, float scale, int groups, int groups_used, int* expert_of,
                 float* share_of) {
    begin_kernel();
    int token = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
    if (token >= n) return;
    Routed routed(token, scores, expert_scale, experts, used, expert_of, share_of);
    Biased by = {bias, sigmoid != 0, normalise != 0, scale, groups, groups_used};
    if (experts <= 128) route_token_biased<4>(routed, by);
    else if (experts <= 256) route_token_biased<8>(routed, by);
    else route_token_biased<MOST_EXPERTS / 32>(routed, by);
}

// counts[c, e] = how many of the c-th kCounted entries are expert e's. A block, of one warp, counts so many.
constexpr int kCounted = ENTRIES_AT_ONCE;
static_assert(COUNT_THREADS == 32, "count and place: a block is a warp");
extern "C" __global__ void __launch_bounds__(32) count(const int* expert_of, int entries, int experts, int* counts) {
    begin_kernel();
    __shared__ int own[MOST_EXPERTS];
    int lane = threadIdx.x, first = blockIdx.x * kCounted, end = min(entries, first + kCounted);
    for (int e = lane; e < experts; e += 32) own[e] = 0;
    __syncwarp();
    for (int entry = first + lane; entry < end; entry += 32) atomicAdd(&own[expert_of[entry]], 1);
    __syncwarp();
    for (int e = lane; e < experts; e += 32) counts[static_cast<uint64_t>(blockIdx.x) * experts + e] = own[e];
}

// The token tiles of a GEMM (scheduler.cuh: TokenTiles) as a kernel lists them: each expert's rows, `tokens` at a time.
struct GroupList {
    Group* groups;
    int* count;
    int tokens;

    // Called by a block, in which a thread has the rows first .. end - 1 of an expert, of so many. rests: null, or an
    // integer for each thread: then tiles of fewer than `tokens` rows come last, the fullest of them first.
    __device__ void fill(int expert, int first, int end, int experts, int* rests) const {
        int whole = (end - first) / tokens, rest = end - first - whole * tokens, all;
        int own = whole + (rest > 0 && rests == nullptr), tile = block_scan<ARRANGE_THREADS>(own, all);
        for (int i = 0; i < own; ++i, ++tile, first += tokens)
            groups[tile] = {first, min(first + tokens, end), expert, 0};
        if (rests != nullptr) {
            rests[threadIdx.x] = rest;
            int others = __syncthreads_count(rest > 0);
            if (rest > 0) {
                int fuller = 0;
#pragma unroll 4
                for (int e = 0; e < experts; ++e) fuller += rests[e] > rest || (rests[e] == rest && e < expert);
                groups[all + fuller] = {first, end, expert, 0};
            }
            all += others;
        }
        if (threadIdx.x == 0) *count = all;
    }
};

// Of `blocks` blocks' counts it makes starts: counts[c, e] = the row, among all entries ordered by expert and then by
// entry, of the first of block c's that is expert e's. Lists the token tiles of two GEMMs; the second's, where
// fullest_first, by how many rows they have. One block: several threads have an expert, each of them some of the
// blocks' counts.
extern "C" __global__ void __launch_bounds__(ARRANGE_THREADS)
    arrange(int* counts, int blocks, int experts, int gated_tokens, Group* gated_groups, int* gated_count,
            int linear_tokens, Group* linear_groups, int* linear_count, int fullest_first) {
    begin_kernel();
    constexpr int kAtOnce = 8;  // loads on their way
    __shared__ int totals[ARRANGE_THREADS], firsts[ARRANGE_THREADS];
    int thread = threadIdx.x, width = ceil_div(experts, 32) * 32, parts = ARRANGE_THREADS / width;
    int part = thread / width, expert = thread % width, each = ceil_div(blocks, parts);
    int begin = part * each, end = expert < experts ? min(blocks, begin + each) : 0, own[kAtOnce];
    counts += expert;
    auto load = [&](int from) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) own[i] = from + i < end ? counts[(from + i) * experts] : 0;
    };
    int sum = 0;
    for (int from = begin; from < end; from += kAtOnce) {
        load(from);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sum += own[i];
    }
    totals[thread] = sum;
    __syncthreads();
    int total = 0, all;
    for (int i = 0; i < parts && thread < experts; ++i) total += totals[thread + i * width];
    int first = firsts[thread] = block_scan<ARRANGE_THREADS>(total, all);
    __syncthreads();
    int next = firsts[expert];
    for (int i = 0; i < part && part < parts; ++i) next += totals[expert + i * width];
    for (int from = begin; from < end; from += kAtOnce) {
        if (each > kAtOnce) load(from);  // else they are here still
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (from + i < end) counts[(from + i) * experts] = next;
            next += own[i];
        }
    }
    int* rests = fullest_first ? totals : nullptr;
    GroupList{gated_groups, gated_count, gated_tokens}.fill(thread, first, first + total, experts, nullptr);
    GroupList{linear_groups, linear_count, linear_tokens}.fill(thread, first, first + total, experts, rests);
}

// place_of[entry] = its row among all entries, ordered by expert and then by entry. starts: as arrange leaves counts.
extern "C" __global__ void __launch_bounds__(32)
    place(const int* expert_of, int entries, int experts, const int* starts, int* place_of) {
    begin_kernel();
    __shared__ int next[MOST_EXPERTS];
    int lane = threadIdx.x, first = blockIdx.x * kCounted;
    for (int e = lane; e < experts; e += 32) next[e] = starts[static_cast<uint64_t>(blockIdx.x) * experts + e];
    __syncwarp();
    for (int begin = first; begin < min(entries, first + kCounted); begin += 32) {
        int entry = begin + lane, expert = entry < entries ? expert_of[entry] : -1 - lane;
        uint32_t same = __match_any_sync(0xffffffffu, expert);
        int row = expert >= 0 ? next[expert] + __popc(same & ((1u << lane) - 1)) : 0;
        __syncwarp();
        if (expert >= 0) {
            place_of[entry] = row;
            if (same >> lane == 1) next[expert] = row + 1;  // the last of the lanes with this expert
        }
        __syncwarp();
    }
}

// sorted[place_of[entry]] = x[entry / used]: rows of `row_bytes`, a multiple of 16. And the same of their scales,
// float32, if there are any (not null). A block reads the row of one token.
extern "C" __global__ void __launch_bounds__(COPY_THREADS)
    gather(const void* x, const float* scales, int used, int row_bytes, const int* place_of, void* sorted,
           float* sorted_scales) {
    begin_kernel();
    place_of += blockIdx.x * used;
    const uint8_t* from = static_cast<const uint8_t*>(x) + static_cast<uint64_t>(blockIdx.x) * row_bytes;
    for (int at = threadIdx.x * 16; at < row_bytes; at += COPY_THREADS * 16) {
        uint4 piece = *reinterpret_cast<const uint4*>(from + at);
        for (int slot = 0; slot < used; ++slot) {
            uint64_t to = static_cast<uint64_t>(place_of[slot]) * row_bytes + at;
            *reinterpret_cast<uint4*>(static_cast<uint8_t*>(sorted) + to) = piece;
        }
    }
    for (int slot = threadIdx.x; scales != nullptr && slot < used; slot += COPY_THREADS)
        sorted_scales[place_of[slot]] = scales[blockIdx.x];
}

// The same of halves, `stride` in a row, times their share, which is then 1: it has been given. A block has one entry.
extern "C" __global__ void __launch_bounds__(COPY_THREADS)
    gather_shares(const half_t* x, int used, int stride, const int* place_of, float* share_of, half_t* sorted) {
    begin_kernel();
    const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<uint64_t>(blockIdx.x / used) * stride);
    uint4* to = reinterpret_cast<uint4*>(sorted + static_cast<uint64_t>(place_of[blockIdx.x]) * stride);
    float share = share_of[blockIdx.x];
    auto times = [&](uint32_t pair) {
        return pack_half2(share * half_to_float(static_cast<half_t>(pair)),
                          share * half_to_float(static_cast<half_t>(pair >> 16)));
    };
    for (int i = threadIdx.x; i < stride / 8; i += COPY_THREADS) {
        uint4 v = from[i];
        to[i] = make_uint4(times(v.x), times(v.y), times(v.z), times(v.w));
    }
    __syncthreads();
    if (threadIdx.x == 0) share_of[blockIdx.x] = 1.0f;
}

// x[t, :] = the sum over slots of share_of[entry] * sums[place_of[entry], :] / *sums_scale, in the order of the slots
// (+ sigmoid(h[t, :] · gate) * shared[t, :], if shared is not null) (+ x[t, :], if add). sums, in_blocks: as in Copies;
// columns: a multiple of 8. h: an operand, scaled by *h_scale, with rows `stride` apart. A block takes a token.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    combine(float* x, const void* sums, int in_blocks, const float* sums_scale, int used, int columns,
            const int* place_of, const float* share_of, const float* shared, const half_t* h, int stride,
            const float* h_scale, const float* gate, int add) {
    begin_kernel();
    int entry = blockIdx.x * used;
    uint64_t row = static_cast<uint64_t>(blockIdx.x) * columns;
    float unscale = 1.0f / *sums_scale, opened = 0.0f;
    if (shared != nullptr) {
        h += static_cast<uint64_t>(blockIdx.x) * stride;
        for (int i = threadIdx.x; i < columns; i += kThreads) opened = fmaf(load_operand(h, i), gate[i], opened);
        opened = 1.0f / (1.0f + expf(-block_sum<kThreads>(opened) / *h_scale));
    }
    Copies copies = {sums, in_blocks, place_of + entry, share_of + entry, used, columns};
    for (int i = 8 * threadIdx.x; i < columns; i += 8 * kThreads) {
        float sum[1][8];
        copies.add_up<uint2, uint4>(i, 0, sum);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float4* to = reinterpret_cast<float4*>(x + row + i) + half;
            float4 y = shared != nullptr ? *(reinterpret_cast<const float4*>(shared + row + i) + half) : zero;
            *to = combined(sum[0] + 4 * half, unscale, opened, y, add ? *to : zero);
        }
    }
}

// x[t, :] += the same sum, without `shared`; and norm.cu's rms_norm of that, of `tokens` tokens. A block takes a token,
// or two whose rows are no longer than SHARED_ROW: then more of a row is on its way to each thread.
extern "C" __global__ void __launch_bounds__(kThreads, kTightRegisters ? 3 : 4)
    combine_rms_norm(float* x, int tokens, const void* sums, int in_blocks, const float* sums_scale, int used,
                     int columns, const int* place_of, const float* share_of, const float* weight, half_t* out,
                     int stride, float epsilon, const float* scale) {
    begin_kernel();
    constexpr int kRows = 2;
    bool together = columns <= SHARED_ROW;
    int token = together ? block_from_last() * kRows + threadIdx.x / (kThreads / kRows) : block_from_last();
    bool inside = token < tokens;
    if (!inside) token = 0;
    CombinedRow row(x, sums, in_blocks, sums_scale, used, columns, place_of, share_of, token);
    if (!inside) row.copies.columns = stride = 0;  // nothing is read or written
    out += static_cast<uint64_t>(token) * stride;
    if (together) normalise_row<kThreads, kRows>(row, weight, out, columns, stride, epsilon, *scale);
    else normalise_row<kThreads>(row, weight, out, columns, stride, epsilon, *scale);
}
