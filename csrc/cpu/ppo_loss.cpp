// PPO's clipped policy loss and clipped value loss: one pass over the tokens gives both losses, both gradients and the
// statistics. Sums are taken over fixed blocks of ppo_block tokens, then over the blocks in order, in double: the bits
// do not depend on the number of threads.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int run = 8;  // vectors that are summed in float before double takes over

using Sums = PpoSums<vf>;

struct Totals {
    vd policy, value, kl, clipped, value_clipped, ratio;
};

using Tokens = PpoToken<vf>;

PYRLHF_INLINE Tokens load_tokens(const PpoArrays& in, float weight, int64_t at) {
    return {load(in.logprobs + at),
            load(in.old_logprobs + at),
            load(in.advantages + at),
            load(in.values + at),
            load(in.old_values + at),
            load(in.returns + at),
            in.weights ? load(in.weights + at) : broadcast(weight)};
}

PYRLHF_INLINE vf first_of(float x, int n) {
    vf out = {};
    for (int j = 0; j < n; ++j) out[j] = x;
    return out;
}

// Tokens beyond n have weight 0 and harmless numbers.
PYRLHF_INLINE Tokens load_last_tokens(const PpoArrays& in, float weight, int64_t at, int n) {
    return {load_first(in.logprobs + at, n, 0),
            load_first(in.old_logprobs + at, n, 0),
            load_first(in.advantages + at, n, 0),
            load_first(in.values + at, n, 0),
            load_first(in.old_values + at, n, 0),
            load_first(in.returns + at, n, 0),
            in.weights ? load_first(in.weights + at, n, 0) : first_of(weight, n)};
}

PYRLHF_INLINE void add_tokens(const Tokens& x, const PpoOptions& options, Sums& sums, vf& grad_logprob,
                              vf& grad_value) {
    vf kl;
    const vf ratio = exp_and_rest(x.logprob - x.old_logprob, kl);
    const PpoTerms<vf> terms = ppo_terms<vf>(x, ratio, kl, options);
    grad_logprob = terms.grad_logprob;
    grad_value = terms.grad_value;
    ppo_add(sums, terms);
}

// Empties the float sums into the totals; the largest ratio stays.
PYRLHF_INLINE void fold(Totals& totals, Sums& sums) {
    add_to(totals.policy, sums.policy);
    add_to(totals.value, sums.value);
    add_to(totals.kl, sums.kl);
    add_to(totals.clipped, sums.clipped);
    add_to(totals.value_clipped, sums.value_clipped);
    add_to(totals.ratio, sums.ratio);
    const vf ratio_max = sums.ratio_max;
    sums = Sums{};
    sums.ratio_max = ratio_max;
}

PYRLHF_INLINE void write_row(const Totals& totals, vf ratio_max, double* row) {
    row[0] = sum(totals.policy);
    row[1] = 0.5 * sum(totals.value);
    row[2] = sum(totals.kl);
    row[3] = sum(totals.clipped);
    row[4] = sum(totals.value_clipped);
    row[5] = sum(totals.ratio);
    row[6] = row[5] != row[5] ? row[5] : static_cast<double>(largest(ratio_max));  // a NaN ratio shows in the sum
}

PYRLHF_INLINE void one_block(const PpoArrays& in, const PpoOptions& options, int64_t first, int64_t last,
                             float* grad_logprobs, float* grad_values, double* row) {
    Sums sums = {};
    Totals totals = {};
    vf grad_logprob, grad_value;
    int64_t at = first;
    while (at + W <= last) {
        const int64_t end = at + run * W < last ? at + run * W : last;
        for (; at + W <= end; at += W) {
            add_tokens(load_tokens(in, options.weight, at), options, sums, grad_logprob, grad_value);
            store(grad_logprobs + at, grad_logprob);
            store(grad_values + at, grad_value);
        }
        fold(totals, sums);
    }
    if (const int left = static_cast<int>(last - at); left > 0) {
        add_tokens(load_last_tokens(in, options.weight, at, left), options, sums, grad_logprob, grad_value);
        store_first(grad_logprobs + at, grad_logprob, left);
        store_first(grad_values + at, grad_value, left);
        fold(totals, sums);
    }
    write_row(totals, sums.ratio_max, row);
}

}  // namespace

void ppo_loss(const PpoArrays& in, const PpoOptions& options, int64_t n, float* grad_logprobs, float* grad_values,
              float* policy, float* value, float* stats, double* scratch, int threads) {
    const int64_t blocks = (n + ppo_block - 1) / ppo_block;
#pragma omp parallel for schedule(static) num_threads(blocks < 4 ? 1 : threads)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * ppo_block, last = first + ppo_block < n ? first + ppo_block : n;
        one_block(in, options, first, last, grad_logprobs, grad_values, scratch + b * ppo_sums);
    }
    double total[ppo_sums] = {};
    for (int64_t b = 0; b < blocks; ++b) {
        const double* row = scratch + b * ppo_sums;
        for (int k = 0; k < ppo_sums - 1; ++k) total[k] += row[k];
        double& most = total[ppo_sums - 1];
        if (row[ppo_sums - 1] > most || row[ppo_sums - 1] != row[ppo_sums - 1]) most = row[ppo_sums - 1];
    }
    *policy = static_cast<float>(total[0]);
    *value = static_cast<float>(total[1]);
    for (int k = 2; k < ppo_sums; ++k) stats[k - 2] = static_cast<float>(total[k]);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
