// From logits to what is asked for: the soft-cap, the log-probability of a target token, and the likeliest tokens.
#include "include/reduce.cuh"
#include "include/types.cuh"

// A token of a row of logits, as the host reads it.
struct Ranked {
    int token;  // -1 if any logit of its row is NaN
    float logit, logprob;
};

constexpr int kThreads = HEAD_THREADS;
static_assert((kThreads & (kThreads - 1)) == 0, "sort takes a power of two of candidates");

// logits = cap(scale * logits), cap(y) = softcap * tanh(y / softcap) where softcap > 0 (arXiv 2408.00118).
extern "C" __global__ void __launch_bounds__(kThreads)
    finish_logits(float* logits, uint64_t n, float scale, float softcap) {
    begin_kernel();
    uint64_t i = blockIdx.x * static_cast<uint64_t>(kThreads) + threadIdx.x;
    if (i >= n) return;
    float y = scale * logits[i];
    logits[i] = softcap > 0.0f ? softcap * tanhf(y / softcap) : y;
}

// A token that may be the likeliest: the one with the larger logit, of equals the one with the lower id.
struct Candidate {
    float logit = -__int_as_float(0x7f800000);
    int token = 0x7fffffff;

    __device__ bool before(float other_logit, int other_token) const {
        return logit > other_logit || (logit == other_logit && token < other_token);
    }
    __device__ void take(float other_logit, int other_token) {
        if (!before(other_logit, other_token)) logit = other_logit, token = other_token;
    }
};

// The likeliest of all threads' candidates, known to all threads of the block.
__device__ Candidate block_best(Candidate own) {
    __shared__ float logits[kThreads / 32];
    __shared__ int tokens[kThreads / 32];
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
        own.take(__shfl_xor_sync(0xffffffffu, own.logit, offset), __shfl_xor_sync(0xffffffffu, own.token, offset));
    if (threadIdx.x % 32 == 0) logits[threadIdx.x / 32] = own.logit, tokens[threadIdx.x / 32] = own.token;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) own.take(logits[w], tokens[w]);
    __syncthreads();
    return own;
}

#if __CUDA_ARCH__ >= 1000
constexpr int kUnroll = 1;  // NVRTC spills there (13.0 in one loop, 13.5 in another)
#else
constexpr int kUnroll = 4;
#endif
constexpr int kAhead = 8;  // logits that a thread of `rank` loads at a time
constexpr int kSets = 4, kMostCandidates = kSets * kThreads;

// Candidates in shared memory, to be sorted.
struct Candidates {
    float* logits;
    int* tokens;

    __device__ Candidate at(int i) const { return {logits[i], tokens[i]}; }
    __device__ void put(int i, float logit, int token) const { logits[i] = logit, tokens[i] = token; }

    // Sorts the first n, a power of two, the likelier first (a bitonic sort).
    __device__ void sort(int n) const {
        for (int size = 2; size <= n; size *= 2)
            for (int step = size / 2; step; step /= 2) {
                __syncthreads();
#pragma unroll kUnroll
                for (int i = threadIdx.x; i < n / 2; i += kThreads) {
                    int low = 2 * i - (i & (step - 1)), high = low + step;
                    Candidate a = at(low), b = at(high);
                    if (a.before(b.logit, b.token) == ((low & size) != 0))
                        put(low, b.logit, b.token), put(high, a.logit, a.token);
                }
            }
        __syncthreads();
    }

    // Finds the `top` likeliest of n logits. Each thread looks through a set of them, or through kSets sets. Of the
    // sets' largest logits the `top`th is a bound: that many logits are no smaller, so what is below it cannot be among
    // them, and few are left to sort. own_largest: the largest of this thread's set, where it has one. Returns false
    // where too many are left, as where many are equal, or asked for.
    __device__ bool find(const float* from, int n, int top, float own_largest) const {
        __shared__ int found;
        int sets = top <= kThreads / 4 ? 1 : kSets;
        if (top > sets * kThreads) return false;
        float largest[kSets];
        largest[0] = own_largest;
        if (sets > 1) {
#pragma unroll
            for (int set = 0; set < kSets; ++set) largest[set] = Candidate().logit;
            for (int i = threadIdx.x; i < n; i += kMostCandidates)
#pragma unroll
                for (int set = 0; set < kSets; ++set)
                    if (i + set * kThreads < n) largest[set] = fmaxf(largest[set], from[i + set * kThreads]);
        }
#pragma unroll
        for (int set = 0; set < kSets; ++set)
            if (set < sets) put(set * kThreads + threadIdx.x, largest[set], threadIdx.x);
        if (threadIdx.x == 0) found = 0;
        sort(sets * kThreads);
        float least = logits[top - 1];
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += kThreads)
            if (from[i] >= least)
                if (int place = atomicAdd(&found, 1); place < kMostCandidates) put(place, from[i], i);
        __syncthreads();
        int count = found, room = 2;
        if (count > kMostCandidates) return false;
        while (room < count) room *= 2;
        for (int i = count + threadIdx.x; i < room; i += kThreads) put(i, Candidate().logit, Candidate().token);
        sort(room);
        return true;
    }
};

// Writes top + 1 tokens for each row of n logits: first its target (token 0 where targets is null), then the `top` (1
// to n) likeliest. A block a row.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    rank(const float* logits, int n, const int* targets, int top, Ranked* out) {
    begin_kernel();
    __shared__ float candidate_logits[kMostCandidates];
    __shared__ int candidate_tokens[kMostCandidates];
    logits += blockIdx.x * static_cast<uint64_t>(n);
    out += blockIdx.x * static_cast<uint64_t>(top + 1);
    Candidate own;
    float sum = 0.0f;  // of exponentials, relative to own.logit
    bool nan = false;
    for (int first = threadIdx.x; first < n; first += kAhead * kThreads) {
        float some[kAhead];  // they are on their way together
#pragma unroll
        for (int j = 0; j < kAhead; ++j) some[j] = first + j * kThreads < n ? logits[first + j * kThreads] : 0.0f;
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            int i = first + j * kThreads;
            float x = some[j];
            if (i >= n) break;
            nan |= x != x;
            if (x > own.logit) sum = fmaf(sum, expf(own.logit - x), 1.0f), own.logit = x, own.token = i;
            else sum += x == own.logit ? 1.0f : expf(x - own.logit);  // both may be -inf
        }
    }
    Candidate best = block_best(own);
    float largest = best.logit, log_sum = logf(block_sum<kThreads>(sum * expf(own.logit - largest)));
    bool bad = __syncthreads_or(nan || best.token == 0x7fffffff);
    auto ranked = [&](int token, float logit) {
        return bad ? Ranked{-1, logit, __int_as_float(0x7fc00000)} : Ranked{token, logit, logit - largest - log_sum};
    };
    if (threadIdx.x == 0) {
        int target = targets != nullptr ? targets[blockIdx.x] : 0;
        out[0] = ranked(target, logits[target]);
        out[1] = ranked(best.token, largest);
    }
    if (top == 1) return;
    Candidates candidates = {candidate_logits, candidate_tokens};
    if (candidates.find(logits, n, top, own.logit)) {
        for (int i = threadIdx.x; i < top; i += kThreads)
            out[1 + i] = ranked(candidates.at(i).token, candidates.at(i).logit);
        return;
    }
    for (int place = 2; place <= top; ++place) {
        Candidate next;
#pragma unroll kUnroll
        for (int i = threadIdx.x; i < n; i += kThreads)
            if (best.before(logits[i], i)) next.take(logits[i], i);
        Candidate found = block_best(next);
        best.logit = found.logit, best.token = found.token;
        if (threadIdx.x == 0) out[place] = ranked(best.token, best.logit);
    }
}
