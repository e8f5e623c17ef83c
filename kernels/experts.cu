// Mixture of experts (arXiv 2401.04088): which experts a token goes to, its row's copies in the experts' order and back. All on
// the device, each sum in a fixed order. An entry is one of the `used` experts of a token: number token * used + slot.
#include "include/groups.cuh"
#include "include/operand.cuh"
#include "include/reduce.cuh"
#include "include/types.cuh"

constexpr int kMostExperts = 1024;  // 32 a lane

// The `used` largest of each token's scores, the lowest numbers of equals first, and their shares: of a softmax over all scores,
// or (routed_after) over theirs; normalise: made to add up to 1. A warp a token.
extern "C" __global__ void __launch_bounds__(256)
    route(const float* scores, int n, int experts, int used, int normalise, int routed_after, int* expert_of,
          float* share_of) {
    begin_kernel();
    int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= n) return;
    scores += static_cast<uint64_t>(token) * experts;
    float largest = 0.0f, total = 0.0f, shares = 0.0f, own_share = 0.0f;
    uint32_t taken = 0;  // a bit for each of this lane's experts
    int own_expert = 0;
    for (int slot = 0; slot < used; ++slot) {
        float best = -__int_as_float(0x7f800000);
        int index = 0x7fffffff;
        for (int i = 0; lane + 32 * i < experts; ++i) {
            float score = scores[lane + 32 * i];
            if (!(taken >> i & 1) && (score > best || index == 0x7fffffff)) best = score, index = lane + 32 * i;
        }
#pragma unroll
        for (int offset = 16; offset; offset >>= 1) {
            float other = __shfl_xor_sync(0xffffffffu, best, offset);
            int other_index = __shfl_xor_sync(0xffffffffu, index, offset);
            if (other > best || (other == best && other_index < index) || index == 0x7fffffff)
                best = other, index = other_index;
        }
        if (index % 32 == lane) taken |= 1u << index / 32;
        if (slot == 0) {
            largest = best;
            for (int i = lane; i < experts; i += 32) total += expf(scores[i] - largest);
            total = warp_sum(total);
        }
        float share = expf(best - largest);
        shares += share;
        if (slot == lane) own_expert = index, own_share = share;
    }
    if (lane >= used) return;
    expert_of[token * used + lane] = own_expert;
    share_of[token * used + lane] = own_share / (normalise || routed_after ? shares : total);
}

// counts[e] = how many of the entries are expert e's. A block an expert.
extern "C" __global__ void __launch_bounds__(256) count(const int* expert_of, int entries, int* counts) {
    begin_kernel();
    int found = 0;
    for (int i = threadIdx.x; i < entries; i += 256) found += expert_of[i] == static_cast<int>(blockIdx.x);
    float sum = block_sum<256>(static_cast<float>(found));  // exact: below 2^24
    if (threadIdx.x == 0) counts[blockIdx.x] = static_cast<int>(sum);
}

// place_of[entry] = its row among all entries ordered by expert, then by entry. A block an expert.
constexpr int kPlacing = 1024;
extern "C" __global__ void __launch_bounds__(kPlacing)
    place(const int* expert_of, int entries, const int* counts, int* place_of) {
    begin_kernel();
    __shared__ int in_warp[kPlacing / 32];
    int expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, next = 0;
    for (int e = 0; e < expert; ++e) next += counts[e];
    for (int begin = 0; begin < entries; begin += kPlacing) {
        int entry = begin + threadIdx.x;
        bool mine = entry < entries && expert_of[entry] == expert;
        uint32_t mask = __ballot_sync(0xffffffffu, mine);
        if (lane == 0) in_warp[warp] = __popc(mask);
        __syncthreads();
        int before = 0, all = 0;
        for (int w = 0; w < kPlacing / 32; ++w) {
            if (w < warp) before += in_warp[w];
            all += in_warp[w];
        }
        if (mine) place_of[entry] = next + before + __popc(mask & ((1u << lane) - 1));
        next += all;
        __syncthreads();
    }
}

// The GEMMs' tiles (gemm_sm90.cu: Rows): each expert's rows, `tokens` at a time. One block, a thread an expert.
extern "C" __global__ void __launch_bounds__(kMostExperts)
    make_groups(const int* counts, int experts, int tokens, Group* groups, int* group_count) {
    begin_kernel();
    int expert = threadIdx.x, row = 0, tile = 0;
    if (expert >= experts) return;
    for (int e = 0; e < expert; ++e) row += counts[e], tile += ceil_div(counts[e], tokens);
    int end = row + counts[expert];
    for (; row < end; row += tokens, ++tile) groups[tile] = {row, min(row + tokens, end), expert, 0};
    if (expert == experts - 1) *group_count = tile;
}

// sorted[place_of[entry]] = x[entry / used]: rows of `stride` halves. A block an entry.
extern "C" __global__ void __launch_bounds__(128)
    gather(const half_t* x, int used, int stride, const int* place_of, half_t* sorted) {
    begin_kernel();
    const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<uint64_t>(blockIdx.x / used) * stride);
    uint4* to = reinterpret_cast<uint4*>(sorted + static_cast<uint64_t>(place_of[blockIdx.x]) * stride);
    for (int i = threadIdx.x; i < stride / 8; i += 128) to[i] = from[i];
}

// x[t, :] += sum over slots of share * sums[its place, :]. A block a token.
extern "C" __global__ void __launch_bounds__(256)
    combine(float* x, const float* sums, int used, int columns, const int* place_of, const float* share_of) {
    begin_kernel();
    int entry = blockIdx.x * used;
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    for (int i = threadIdx.x; i < columns; i += 256) {
        float sum = 0.0f;
        for (int slot = 0; slot < used; ++slot)
            sum = fmaf(share_of[entry + slot], sums[static_cast<uint64_t>(place_of[entry + slot]) * columns + i], sum);
        x[i] += sum;
    }
}

// x[t, :] += sigmoid(h[t, :] · weight) * y[t, :]; h: halves of *scale times the values, in operand order, rows `stride` apart.
extern "C" __global__ void __launch_bounds__(256) add_gated(float* x, const float* y, const half_t* h, int columns,
                                                            int stride, const float* scale, const float* weight) {
    begin_kernel();
    x += static_cast<uint64_t>(blockIdx.x) * columns;
    y += static_cast<uint64_t>(blockIdx.x) * columns;
    h += static_cast<uint64_t>(blockIdx.x) * stride;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += 256) sum = fmaf(half_to_float(h[operand_position(i)]), weight[i], sum);
    float share = 1.0f / (1.0f + expf(-block_sum<256>(sum) / *scale));
    for (int i = threadIdx.x; i < columns; i += 256) x[i] = fmaf(share, y[i], x[i]);
}
