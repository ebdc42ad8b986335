// One token of PPO's losses (Schulman et al. 2017, eq. 7), shared by CPU and CUDA. F is a number: float, or a vector of
// floats in the compiler's vector types, whose comparisons and ?: work lane by lane.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace pyrlhf {

// The seven inputs of ppo_loss, [n] each; weights may be null (then every weight is options.weight).
struct PpoArrays {
    const float *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns, *weights;
};

// dual_clip and value_clip are off when infinite.
struct PpoOptions {
    float clip, value_clip, dual_clip, weight;
};

// ppo_loss sums this many numbers a block of ppo_block tokens: the losses, then the statistics in the order of PPOStats
// in pyrlhf/ops/ppo_loss.py; the last one is a maximum.
constexpr int ppo_sums = 7;
constexpr int64_t ppo_block = 2048;

template <typename F>
struct PpoToken {
    F logprob, old_logprob, advantage, value, old_value, target, weight;
};

// What a token adds to each sum (value: twice its loss), its part in the largest ratio, and its gradients.
template <typename F>
struct PpoTerms {
    F policy, value, kl, clipped, value_clipped, ratio;
    F counted_ratio;
    F grad_logprob, grad_value;
};

// NaN in x stays.
template <typename F>
PYRLHF_HD F ppo_clamp(F x, F low, F high) {
    return x < low ? low : (x > high ? high : x);
}

// ratio: e^(logprob - old_logprob), kl: ratio - 1 - (logprob - old_logprob). Comparisons are such that a NaN is not
// clipped away.
template <typename F>
PYRLHF_HD PpoTerms<F> ppo_terms(const PpoToken<F>& x, const F ratio, const F kl, const PpoOptions& options) {
    const F zero = {};
    const F plain = -x.advantage * ratio;
    const F bounded = -x.advantage * ppo_clamp<F>(ratio, zero + (1.0f - options.clip), zero + (1.0f + options.clip));
    const F cap = -options.dual_clip * x.advantage;
    const F policy = bounded > plain ? bounded : plain;
    const auto capped = (x.advantage < 0.0f) & (policy > cap);
    const auto clipped = (bounded > plain) | capped;

    const F error = x.value - x.target;
    const F near = ppo_clamp<F>(x.value, x.old_value - options.value_clip, x.old_value + options.value_clip) - x.target;
    const auto value_clipped = near * near > error * error;

    PpoTerms<F> out;
    out.policy = x.weight * (capped ? cap : policy);
    out.value = x.weight * (value_clipped ? near * near : error * error);
    out.kl = x.weight * kl;
    out.clipped = clipped ? x.weight : zero;
    out.value_clipped = value_clipped ? x.weight : zero;
    out.ratio = x.weight * ratio;
    out.counted_ratio = x.weight != 0.0f ? ratio : zero;
    out.grad_logprob = clipped ? zero : x.weight * plain;
    out.grad_value = value_clipped ? zero : x.weight * error;
    return out;
}

// Sums of terms, and the largest ratio: of a lane where F is a vector.
template <typename F>
struct PpoSums {
    F policy, value, kl, clipped, value_clipped, ratio, ratio_max;
};

template <typename F>
PYRLHF_HD void ppo_add(PpoSums<F>& sums, const PpoTerms<F>& terms) {
    sums.policy += terms.policy;
    sums.value += terms.value;
    sums.kl += terms.kl;
    sums.clipped += terms.clipped;
    sums.value_clipped += terms.value_clipped;
    sums.ratio += terms.ratio;
    sums.ratio_max = terms.counted_ratio > sums.ratio_max ? terms.counted_ratio : sums.ratio_max;
}

}  // namespace pyrlhf
