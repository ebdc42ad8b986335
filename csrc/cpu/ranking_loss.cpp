// Pairwise ranking loss over groups of K answers of one prompt (Ouyang et al. 2022, eq. 1): the mean over a group's
// pairs of softplus(-(s_better - s_worse)), then the mean over the groups that have a pair. Each answer i is compared
// with W answers at a time; only pairs in which i ranks better count, so every pair is met once. Groups never share a
// sum until the end, where they are added in order: the bits do not depend on the number of threads.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

PYRLHF_INLINE vi load_ranks(const int32_t* p, int n, int32_t fill) {
    vi out = broadcast(fill);
    if (n >= W)
        memcpy(&out, p, sizeof(out));
    else
        for (int j = 0; j < n; ++j) out[j] = p[j];
    return out;
}

// Writes this group's loss, correct pairs and pairs, and the gradient of its mean loss.
PYRLHF_INLINE void one_group(const float* scores, const int32_t* ranks, int64_t k, float* grad, double* row) {
    double loss = 0, correct = 0, pairs = 0;
    for (int64_t i = 0; i < k; ++i) grad[i] = 0.0f;
    for (int64_t i = 0; i < k; ++i) {
        vf losses = {}, pulls = {}, rights = {};
        vi found = {};
        for (int64_t j = 0; j < k; j += W) {
            const int n = k - j < W ? static_cast<int>(k - j) : W;
            const vi worse = load_ranks(ranks + j, n, ranks[i]) > ranks[i];
            const vf other = n == W ? load(scores + j) : load_first(scores + j, n, 0.0f);
            const vf margin = scores[i] - other;  // wants to be large
            const vf u = exp(-absolute(margin));
            const RankingPair<vf> pair = ranking_pair<vf>(margin, u, log1p_unit(u));
            const vf zero = {}, pull = worse ? pair.pull : zero;
            losses += worse ? pair.loss : zero;
            rights += worse ? pair.right : zero;
            pulls += pull;
            found -= worse;
            for (int l = 0; l < n; ++l) grad[j + l] += pull[l];
        }
        loss += sum(losses);
        correct += sum(rights);
        pairs += static_cast<double>(sum(found));
        grad[i] -= static_cast<float>(sum(pulls));
    }
    row[0] = pairs > 0 ? loss / pairs : 0.0;
    row[1] = correct;
    row[2] = pairs;
}

}  // namespace

void ranking_loss(const float* scores, const int32_t* cu_groups, const int32_t* ranks, int64_t groups,
                  float* grad_scores, float* loss, float* stats, double* scratch, int threads) {
    const bool alone = cu_groups[groups] < 2048;
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : threads)
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = cu_groups[g];
        one_group(scores + first, ranks + first, cu_groups[g + 1] - first, grad_scores + first,
                  scratch + g * ranking_sums);
    }
    double losses = 0, correct = 0, pairs = 0, counted = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const double* row = scratch + g * ranking_sums;
        losses += row[0];
        correct += row[1];
        pairs += row[2];
        counted += row[2] > 0;
    }
    for (int64_t g = 0; g < groups; ++g) {
        const double pairs_here = scratch[g * ranking_sums + 2];
        const float scale = pairs_here > 0 ? static_cast<float>(1.0 / (pairs_here * counted)) : 0.0f;
        for (int64_t i = cu_groups[g]; i < cu_groups[g + 1]; ++i) grad_scores[i] *= scale;
    }
    *loss = counted > 0 ? static_cast<float>(losses / counted) : 0.0f;
    stats[0] = pairs > 0 ? static_cast<float>(correct / pairs) : 0.0f;
    stats[1] = static_cast<float>(pairs);
    stats[2] = static_cast<float>(counted);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
