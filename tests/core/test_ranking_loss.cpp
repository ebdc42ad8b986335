// ranking_loss against its definition: one plain loop over the pairs of each group.
#include "buffer.h"
#include "check.h"
#include "cpu/dispatch.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

struct Batch {
    explicit Batch(const std::vector<int64_t>& sizes, int64_t different_ranks, float scale = 2.0f)
        : groups(static_cast<int64_t>(sizes.size())),
          different_ranks(different_ranks),
          scale(scale),
          cu(running_sums(sizes)) {}
    int64_t answers() const { return cu[groups]; }

    int64_t groups, different_ranks;
    float scale;
    Random random{3};
    Buffer<int32_t> cu;
    // Some scores are equal.
    Buffer<float> scores{answers(), [this](int64_t) { return scale * std::round(8.0f * random.normal()) / 8.0f; }};
    Buffer<int32_t> ranks{answers(), [this](int64_t) { return static_cast<int32_t>(random.below(different_ranks)); }};
};

struct Found {
    explicit Found(int64_t answers) : grad(answers), loss(1), stats(3) {}
    Buffer<float> grad, loss, stats;
};

Found run(const Batch& batch, int threads = 1) {
    Found out(batch.answers());
    Buffer<double> scratch(ranking_sums * (batch.groups + 1));
    cpu().ranking_loss(batch.scores.data(), batch.cu.data(), batch.ranks.data(), batch.groups, out.grad.data(),
                       out.loss.data(), out.stats.data(), scratch.data(), threads);
    return out;
}

template <typename Number>
struct Plain {
    std::vector<Number> grad;
    Number loss = 0;
    double correct = 0, pairs = 0, counted = 0;
};

template <typename Number>
Number softplus(Number x) {
    return (x > 0 ? x : Number(0)) + std::log1p(std::exp(-std::abs(x)));
}

template <typename Number>
Plain<Number> plain(const Batch& batch) {
    Plain<Number> out;
    out.grad.assign(static_cast<size_t>(batch.answers()), Number(0));
    std::vector<double> pairs(static_cast<size_t>(batch.groups));
    for (int64_t g = 0; g < batch.groups; ++g) {
        Number loss = 0;
        for (int64_t i = batch.cu[g]; i < batch.cu[g + 1]; ++i) {
            for (int64_t j = batch.cu[g]; j < batch.cu[g + 1]; ++j) {
                if (batch.ranks[i] >= batch.ranks[j]) continue;  // i is better
                const Number margin = Number(batch.scores[i]) - batch.scores[j];
                const Number pull = 1 / (1 + std::exp(margin));
                loss += softplus(-margin);
                out.grad[i] -= pull;
                out.grad[j] += pull;
                out.correct += margin > 0 ? 1 : margin == 0 ? 0.5 : 0;
                ++pairs[g];
            }
        }
        out.pairs += pairs[g];
        out.counted += pairs[g] > 0;
        if (pairs[g] > 0) out.loss += loss / Number(pairs[g]);
    }
    if (out.counted > 0) out.loss /= Number(out.counted);
    for (int64_t g = 0; g < batch.groups; ++g)
        for (int64_t i = batch.cu[g]; i < batch.cu[g + 1]; ++i)
            if (pairs[g] > 0) out.grad[i] /= Number(pairs[g] * out.counted);
    return out;
}

void check(const Batch& batch) {
    const Found found = run(batch);
    const auto peer = plain<float>(batch);
    const auto truth = plain<double>(batch);
    CHECK_AS_GOOD(found.grad, peer.grad, truth.grad, 1e-7);
    CHECK_NEAR(found.loss[0], truth.loss, 2 * std::abs(peer.loss - truth.loss) + 1e-6 * truth.loss);
    CHECK_NEAR(found.stats[0], truth.pairs > 0 ? truth.correct / truth.pairs : 0.0, 1e-6);
    CHECK_EQUAL(found.stats[1], truth.pairs);
    CHECK_EQUAL(found.stats[2], truth.counted);
}

}  // namespace

TEST(ranking_loss_of_one_group) {
    for (const int64_t size : odd_sizes()) {
        if (size > 127) continue;  // pairs grow with the square
        for (const int64_t different_ranks : {1, 2, 5, 1000}) {
            Note note("answers = ", size, ", ranks below ", different_ranks);
            check(Batch({size}, different_ranks));
        }
    }
    check(Batch({1023}, 1000));
}

TEST(ranking_loss_of_many_groups) {
    check(Batch({}, 5));
    check(Batch({0, 0}, 5));
    check(Batch({1, 0, 4, 9, 17, 2, 0, 33}, 6));
    check(Batch(std::vector<int64_t>(1000, 4), 4));
}

TEST(ranking_loss_of_scores_far_apart) { check(Batch({4, 9, 17, 33}, 6, 300.0f)); }

TEST(ranking_loss_gives_the_same_bits_on_any_number_of_threads) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < 400; ++i) sizes.push_back(i % 13);
    const Batch batch(sizes, 7);
    CHECK(batch.answers() >= 2048);  // below, one thread does it all
    const Found alone = run(batch, 1);
    for (const int threads : {2, 3}) {
        Note note("threads = ", threads);
        const Found found = run(batch, threads);
        CHECK_SAME_BITS(found.grad, alone.grad);
        CHECK_SAME_BITS(found.loss, alone.loss);
        CHECK_SAME_BITS(found.stats, alone.stats);
    }
}
