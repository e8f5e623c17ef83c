// Which experts a token goes to, and with what shares: a warp finds them from the router's scores.
#pragma once
#include "reduce.cuh"
#include "types.cuh"

static_assert(MOST_EXPERTS <= 32 * 32, "a lane has a bit for each of 32 experts");
static_assert(MOST_USED_EXPERTS <= 32, "a warp has a lane for each expert that a token uses");
static_assert(MOST_EXPERT_GROUPS <= 32, "a lane has a group, a word a bit for each");

constexpr int kNoExpert = 0x7fffffff;

// A number of 32 bits that is larger than another's where the value is; -0 and 0 have the same. NaNs have numbers, too:
// so all lanes agree on which value is the largest.
__device__ __forceinline__ uint32_t in_order(float value) {
    uint32_t bits = __float_as_uint(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Of the values that a warp's lanes have, each with its expert, the largest, and of equals the one with the lowest
// number: to all lanes. Expert e is lane e % 32's. A lane without any has kNoExpert.
__device__ __forceinline__ void best_of_warp(float& best, int& expert) {
    uint32_t own = expert == kNoExpert ? 0 : in_order(best), largest = __reduce_max_sync(0xffffffffu, own);
    uint32_t lowest = own == largest ? kNoExpert - expert : 0;
    expert = kNoExpert - __reduce_max_sync(0xffffffffu, lowest);
    best = __shfl_sync(0xffffffffu, best, expert);
}

// What a token chooses its experts by. Expert e is lane e % 32's, and a lane has up to kHeld.
template <int kHeld>
struct Choices {
    static constexpr int kAtOnce = kHeld <= 8 ? kHeld : 1;  // more are not in registers
    float values[kHeld];
    uint32_t left = 0;  // a bit for each of the lane's experts that may yet be taken

    // value(e) of each of so many experts.
    template <class Value>
    __device__ __forceinline__ Choices(int experts, Value value) {
#pragma unroll kAtOnce
        for (int i = 0; i < kHeld; ++i) {
            bool there = number(i) < experts;
            values[i] = there ? value(number(i)) : 0.0f;
            left |= static_cast<uint32_t>(there) << i;
        }
    }
    __device__ __forceinline__ static int number(int i) { return threadIdx.x % 32 + 32 * i; }

    // Takes the expert with the largest value, of equals the one with the lowest number; best: its value.
    __device__ __forceinline__ int take(float& best) {
        int expert = kNoExpert;
        best = -__int_as_float(0x7f800000);
#pragma unroll kAtOnce
        for (int i = 0; i < kHeld; ++i)
            if ((left >> i & 1) && (values[i] > best || expert == kNoExpert)) best = values[i], expert = number(i);
        best_of_warp(best, expert);
        if (expert % 32 == threadIdx.x % 32) left &= ~(1u << expert / 32);
        return expert;
    }
};

// A token's scores, and where its experts and their shares go. expert_scale: null, or what a share is multiplied by.
struct Routed {
    const float *scores, *expert_scale;
    int experts, used;
    int* expert_of;
    float* share_of;

    __device__ __forceinline__ Routed(int token, const float* scores, const float* expert_scale, int experts, int used,
                                      int* expert_of, float* share_of)
        : scores(scores + static_cast<uint64_t>(token) * experts),
          expert_scale(expert_scale),
          experts(experts),
          used(used),
          expert_of(expert_of + token * used),
          share_of(share_of + token * used) {}
    // Lane i of the warp puts down the token's expert i and its share.
    __device__ __forceinline__ void put(int expert, float share) const {
        int lane = threadIdx.x % 32;
        if (lane >= used) return;
        expert_of[lane] = expert;
        share_of[lane] = expert_scale != nullptr ? share * expert_scale[expert] : share;
    }
};

// Finds a token's experts, those with the largest scores, and their shares: from a softmax over all scores or, with
// normalise, over the chosen ones. A warp calls this.
template <int kHeld>
__device__ __forceinline__ void route_token(const Routed& token, bool normalise) {
    constexpr int kAtOnce = Choices<kHeld>::kAtOnce;
    int lane = threadIdx.x % 32, own_expert = 0;
    float largest = 0.0f, total = 0.0f, shares = 0.0f, own_share = 0.0f;
    Choices<kHeld> choices(token.experts, [&](int expert) { return token.scores[expert]; });
    for (int slot = 0; slot < token.used; ++slot) {
        float best;
        int expert = choices.take(best);
        if (slot == 0) {
            largest = best;
#pragma unroll kAtOnce
            for (int i = 0; i < kHeld; ++i)
                if (choices.number(i) < token.experts) total += expf(choices.values[i] - largest);
            total = warp_sum(total);
        }
        float share = expf(best - largest);
        shares += share;
        if (slot == lane) own_expert = expert, own_share = share;
    }
    token.put(own_expert, own_share / (normalise ? shares : total));
}

// Where the choice is by another value than the share (arXiv 2412.19437): a score becomes a probability, by a sigmoid
// or by the softmax over all scores; the choice is by probability + bias, among the experts of the best `groups_used`
// of `groups` groups of neighbours, a group being worth its two best experts together; a share is scale * probability,
// with normalise over the chosen ones' sum.
struct Biased {
    const float* bias;  // may be null
    bool sigmoid, normalise;
    float scale;
    int groups, groups_used;
};

// The same where the choice is Biased. A warp calls this.
constexpr float kLeastSum = 6.103515625e-5f;  // of shares that are normalised: 2^-14, as llama.cpp has it
template <int kHeld>
__device__ __forceinline__ void route_token_biased(const Routed& token, const Biased& by) {
    constexpr int kAtOnce = Choices<kHeld>::kAtOnce;
    const float kNone = __int_as_float(0xff800000);
    int lane = threadIdx.x % 32;
    float largest = kNone, total = 0.0f;
    if (!by.sigmoid) {
        for (int i = lane; i < token.experts; i += 32) largest = fmaxf(largest, token.scores[i]);
        for (int offset = 16; offset; offset >>= 1)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
        for (int i = lane; i < token.experts; i += 32) total += expf(token.scores[i] - largest);
        total = warp_sum(total);
    }
    auto probability = [&](int i) {
        return by.sigmoid ? 1.0f / (1.0f + expf(-token.scores[i])) : expf(token.scores[i] - largest) / total;
    };
    Choices<kHeld> choices(token.experts,
                           [&](int i) { return probability(i) + (by.bias != nullptr ? by.bias[i] : 0.0f); });

    int in_group = token.experts / by.groups;
    if (by.groups > 1) {
        float own = kNone;  // lane g: what group g is worth
        auto in = [&](int i, int group) { return choices.number(i) / in_group == group; };
        for (int g = 0; g < by.groups; ++g) {
            float first = kNone, second = kNone;
#pragma unroll kAtOnce
            for (int i = 0; i < kHeld; ++i) {
                if (!(choices.left >> i & 1) || !in(i, g)) continue;
                float c = choices.values[i];
                if (c > first) second = first, first = c;
                else second = fmaxf(second, c);
            }
            for (int offset = 16; offset; offset >>= 1) {
                float other = __shfl_xor_sync(0xffffffffu, first, offset);
                float other_second = __shfl_xor_sync(0xffffffffu, second, offset);
                second = fmaxf(fminf(first, other), fmaxf(second, other_second));
                first = fmaxf(first, other);
            }
            if (lane == g) own = first + second;
        }
        uint32_t allowed = 0;  // a bit for each group
        for (int round = 0; round < by.groups_used; ++round) {
            float best = allowed >> lane & 1 || lane >= by.groups ? kNone : own;
            int index = allowed >> lane & 1 || lane >= by.groups ? kNoExpert : lane;
            best_of_warp(best, index);
            allowed |= 1u << index;
        }
#pragma unroll kAtOnce
        for (int i = 0; i < kHeld; ++i)
            if (!(allowed >> choices.number(i) / in_group & 1)) choices.left &= ~(1u << i);
    }

    float shares = 0.0f, own_share = 0.0f;
    int own_expert = 0;
    for (int slot = 0; slot < token.used; ++slot) {
        float best;
        int expert = choices.take(best);
        float share = probability(expert);
        shares += share;
        if (slot == lane) own_expert = expert, own_share = share;
    }
    token.put(own_expert, by.scale * (by.normalise ? own_share / fmaxf(shares, kLeastSum) : own_share));
}
