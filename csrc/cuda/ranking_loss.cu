// Pairwise ranking loss on a GPU: a warp a group of K answers, then a second, small kernel for the mean over the
// groups.
//
// Each thread holds one answer and meets all the others of its group in order, in either role: where it ranks better it
// takes the pair's pull and counts the pair, where it ranks worse it gives it. Every pair is met from both sides, so no
// two threads ever add to the same number, and an answer's gradient is one thread's sum in one order. A group of more
// than `large` answers is taken by the whole block; which of the two it is depends on its own size alone, and so do its
// bits. Work is K^2 exponentials against 12 K bytes: arithmetic is the limit from some tens of answers on, the launch
// before that.
//
// The gradient of a group's mean loss is divided by the number of groups that have a pair, which is known only after
// all groups are done: every block of the second kernel counts them for itself (a sum of integers, the same in any
// order), and scales its share of the groups; the first one also adds up the losses in a fixed order. Groups whose
// offsets fall or leave 0..answers are flagged, count as groups without a pair, and their answers are not touched.
#include "core/ranking_loss.h"
#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / warp_size;
constexpr int large = 256;  // answers of a group that a warp still takes

struct Group {
    int64_t first;
    int size;
    bool broken;
};

PYRLHF_DEVICE Group group_at(const int32_t* cu_groups, int64_t g, int64_t answers) {
    const int64_t first = cu_groups[g], last = cu_groups[g + 1];
    const bool broken = first < 0 || last < first || last > answers;
    return {first, broken ? 0 : static_cast<int>(last - first), broken};
}

// Of the pairs in which this thread's answers rank better.
struct Sums {
    double loss = 0.0, right = 0.0, pairs = 0.0;
};

// Thread `index` of `sharing` takes the answers index, index + sharing, ... and writes their gradients, unscaled.
PYRLHF_DEVICE Sums meet_all(const float* __restrict__ scores, const int32_t* __restrict__ ranks, int size, int index,
                            int sharing, float* __restrict__ grad) {
    Sums sums;
    for (int j = index; j < size; j += sharing) {
        const float score = scores[j];
        const int32_t rank = ranks[j];
        double pulls = 0.0;
        for (int i = 0; i < size; ++i) {
            const int32_t other_rank = ranks[i];
            if (other_rank == rank) continue;
            const bool better = rank < other_rank;
            const float other = scores[i], margin = better ? score - other : other - score;
            const float u = expf(-fabsf(margin));
            const RankingPair<float> pair = ranking_pair<float>(margin, u, log1pf(u));
            pulls += static_cast<double>(better ? -pair.pull : pair.pull);
            if (better) {
                sums.loss += static_cast<double>(pair.loss);
                sums.right += static_cast<double>(pair.right);
                sums.pairs += 1.0;
            }
        }
        grad[j] = static_cast<float>(pulls);
    }
    return sums;
}

// sums [ranking_sums, groups]: the group's mean loss, right pairs, pairs.
PYRLHF_DEVICE void write_sums(const Sums& of, double* sums, int64_t g, int64_t groups) {
    sums[g] = of.pairs > 0.0 ? of.loss / of.pairs : 0.0;
    sums[groups + g] = of.right;
    sums[2 * groups + g] = of.pairs;
}

struct Shared {
    double sums[warps];
};

__global__ void __launch_bounds__(threads)
    ranking_loss_kernel(const float* __restrict__ scores, const int32_t* __restrict__ cu_groups,
                        const int32_t* __restrict__ ranks, int64_t groups, int64_t answers, float* __restrict__ grad,
                        double* __restrict__ sums, int32_t* faults) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size;
    const int64_t first_group = int64_t{blockIdx.x} * warps;
    if (const int64_t g = first_group + thread / warp_size; g < groups) {
        const Group group = group_at(cu_groups, g, answers);
        if (group.broken && lane == 0) raise_fault(faults, Fault::ranking_loss_cu_groups);
        if (group.size <= large) {
            const int64_t at = group.size > 0 ? group.first : 0;
            const Sums mine = meet_all(scores + at, ranks + at, group.size, lane, warp_size, grad + at);
            const Sums all = {warp_sum(mine.loss), warp_sum(mine.right), warp_sum(mine.pairs)};
            if (lane == 0) write_sums(all, sums, g, groups);
        }
    }
    for (int64_t g = first_group; g < min(groups, first_group + warps); ++g) {
        const Group group = group_at(cu_groups, g, answers);
        if (group.size <= large) continue;
        Shared& shared = shared_memory<Shared>();
        const Sums mine =
            meet_all(scores + group.first, ranks + group.first, group.size, thread, threads, grad + group.first);
        const Sums all = {block_sum<threads>(mine.loss, shared.sums), block_sum<threads>(mine.right, shared.sums),
                          block_sum<threads>(mine.pairs, shared.sums)};
        if (thread == 0) write_sums(all, sums, g, groups);
    }
}

struct SharedTotals {
    double sums[warps];
    int counts[warps];
};

// stats: the share of right pairs, pairs, groups with a pair.
__global__ void __launch_bounds__(threads)
    ranking_loss_totals_kernel(const int32_t* __restrict__ cu_groups, const double* __restrict__ sums, int64_t groups,
                               int64_t answers, float* __restrict__ grad, float* __restrict__ loss,
                               float* __restrict__ stats, int32_t* faults) {
    SharedTotals& shared = shared_memory<SharedTotals>();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size;
    const double *losses = sums, *rights = sums + groups, *pairs = sums + 2 * groups;
    int mine = 0;
    for (int64_t g = thread; g < groups; g += threads) mine += pairs[g] > 0.0;
    const int counted = block_sum<threads>(mine, shared.counts);

    for (int64_t g = int64_t{blockIdx.x} * warps + thread / warp_size; g < groups; g += int64_t{gridDim.x} * warps) {
        const Group group = group_at(cu_groups, g, answers);
        const float scale = pairs[g] > 0.0 ? static_cast<float>(1.0 / (pairs[g] * counted)) : 0.0f;
        for (int j = lane; j < group.size; j += warp_size) grad[group.first + j] *= scale;
    }

    if (blockIdx.x > 0) return;
    if (thread == 0 && (cu_groups[0] != 0 || cu_groups[groups] != answers))
        raise_fault(faults, Fault::ranking_loss_cu_groups);
    Sums total;
    for (int64_t g = thread; g < groups; g += threads) {
        total.loss += losses[g];
        total.right += rights[g];
        total.pairs += pairs[g];
    }
    total = {block_sum<threads>(total.loss, shared.sums), block_sum<threads>(total.right, shared.sums),
             block_sum<threads>(total.pairs, shared.sums)};
    if (thread > 0) return;
    *loss = counted > 0 ? static_cast<float>(total.loss / counted) : 0.0f;
    stats[0] = total.pairs > 0.0 ? static_cast<float>(total.right / total.pairs) : 0.0f;
    stats[1] = static_cast<float>(total.pairs);
    stats[2] = static_cast<float>(counted);
}

}  // namespace

void ranking_loss(const float* scores, const int32_t* cu_groups, const int32_t* ranks, int64_t groups, int64_t answers,
                  float* grad_scores, float* loss, float* stats, double* sums, int32_t* faults, Queue queue) {
    const int64_t blocks = ceil_div(groups, int64_t{warps});
    if (blocks > 0)
        launch("ranking_loss", ranking_loss_kernel, dim3(static_cast<unsigned>(blocks)), threads, sizeof(Shared), queue,
               scores, cu_groups, ranks, groups, answers, grad_scores, sums, faults);
    const int64_t scaling = max(int64_t{1}, min(blocks, 2 * int64_t{processors(queue)}));
    launch("ranking_loss", ranking_loss_totals_kernel, dim3(static_cast<unsigned>(scaling)), threads,
           sizeof(SharedTotals), queue, cu_groups, sums, groups, answers, grad_scores, loss, stats, faults);
}

}  // namespace cuda
}  // namespace pyrlhf
