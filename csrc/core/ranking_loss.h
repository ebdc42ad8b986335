// One pair of the ranking loss (Ouyang et al. 2022, eq. 1), shared by CPU and CUDA. F is a number: float, or a vector
// of floats in the compiler's vector types, whose comparisons and ?: work lane by lane.
#pragma once

#include "core/portable.h"

namespace pyrlhf {

// The doubles a group that ranking_loss sums over the groups: its mean loss, its right pairs, its pairs.
constexpr int ranking_sums = 3;

template <typename F>
struct RankingPair {
    F loss;   // softplus(-margin)
    F pull;   // sigmoid(-margin): what the loss gives to the worse score's gradient and takes from the better one's
    F right;  // 1 where the better answer scores higher, one half where both score the same
};

// margin: the better score less the worse one. u: e^-|margin|, log1p_u: log(1 + u).
template <typename F>
PYRLHF_HD RankingPair<F> ranking_pair(F margin, F u, F log1p_u) {
    const F zero = {}, one = zero + 1.0f, half = zero + 0.5f;
    RankingPair<F> out;
    out.loss = (margin < 0.0f ? -margin : zero) + log1p_u;
    out.pull = (margin > 0.0f ? u : one) / (1.0f + u);
    out.right = margin > 0.0f ? one : (margin == 0.0f ? half : zero);
    return out;
}

}  // namespace pyrlhf
