// ppo_loss against its definition: one plain loop over the tokens.
#include <limits>

#include "buffer.h"
#include "check.h"
#include "cpu/dispatch.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

struct Batch {
    explicit Batch(int64_t n) : n(n) {}
    float weight() { return random.below(4) == 0 ? 0.0f : random.uniform(0.0f, 2.0f) / static_cast<float>(n); }
    float near(float x) { return x + 0.2f * random.normal(); }

    int64_t n;
    Random random{1};
    Buffer<float> logprobs{n, [this](int64_t) { return -3.0f + random.normal(); }};
    Buffer<float> old_logprobs{n, [this](int64_t i) { return near(logprobs[i]); }};
    Buffer<float> advantages{n, [this](int64_t) { return random.normal(); }};
    Buffer<float> values{n, [this](int64_t) { return random.normal(); }};
    Buffer<float> old_values{n, [this](int64_t i) { return near(values[i]); }};
    Buffer<float> returns{n, [this](int64_t) { return random.normal(); }};
    Buffer<float> weights{n, [this](int64_t) { return weight(); }};
};

constexpr int losses = 2 + 5;  // policy, value, then the statistics

struct Found {
    explicit Found(int64_t n) : grad_logprobs(n), grad_values(n), policy(1), value(1), stats(5) {}
    Buffer<float> grad_logprobs, grad_values, policy, value, stats;

    std::vector<double> all() const { return {policy[0], value[0], stats[0], stats[1], stats[2], stats[3], stats[4]}; }
};

Found run(const Batch& b, const PpoOptions& options, bool weighted, int threads = 1) {
    Found out(b.n);
    Buffer<double> scratch(ppo_sums * (b.n / ppo_block + 1));
    const PpoArrays in = {b.logprobs.data(),
                          b.old_logprobs.data(),
                          b.advantages.data(),
                          b.values.data(),
                          b.old_values.data(),
                          b.returns.data(),
                          weighted ? b.weights.data() : nullptr};
    cpu().ppo_loss(in, options, b.n, out.grad_logprobs.data(), out.grad_values.data(), out.policy.data(),
                   out.value.data(), out.stats.data(), scratch.data(), threads);
    return out;
}

template <typename Number>
struct Plain {
    std::vector<Number> grad_logprobs, grad_values;
    double sums[losses] = {};
    double sizes[losses] = {};  // the same sums without signs: what rounding is proportional to

    void count(int which, double term) {
        sums[which] += term;
        sizes[which] += std::abs(term);
    }
};

template <typename Number>
Plain<Number> plain(const Batch& b, const PpoOptions& options, bool weighted) {
    Plain<Number> out;
    for (int64_t i = 0; i < b.n; ++i) {
        const Number w = weighted ? b.weights[i] : options.weight, a = b.advantages[i];
        const Number log_ratio = Number(b.logprobs[i]) - b.old_logprobs[i], ratio = std::exp(log_ratio);
        const Number low = 1.0f - options.clip, high = 1.0f + options.clip;
        Number policy = -a * ratio;
        const Number bounded = -a * (ratio < low ? low : ratio > high ? high : ratio);
        bool clipped = bounded > policy;
        if (clipped) policy = bounded;
        if (a < 0 && policy > -options.dual_clip * a) {
            policy = -options.dual_clip * a;
            clipped = true;
        }
        const Number v = b.values[i], old = b.old_values[i], target = b.returns[i];
        const Number lowest = old - options.value_clip, highest = old + options.value_clip;
        const Number error = v - target, near = (v < lowest ? lowest : v > highest ? highest : v) - target;
        const bool value_clipped = near * near > error * error;

        out.grad_logprobs.push_back(clipped ? 0 : w * -a * ratio);
        out.grad_values.push_back(value_clipped ? 0 : w * error);
        out.count(0, w * policy);
        out.count(1, 0.5 * w * (value_clipped ? near * near : error * error));
        out.count(2, w * (std::expm1(log_ratio) - log_ratio));
        out.count(3, clipped ? w : 0);
        out.count(4, value_clipped ? w : 0);
        out.count(5, w * ratio);
        if (w != 0 && ratio > out.sums[6]) out.sums[6] = out.sizes[6] = ratio;
    }
    return out;
}

void check(int64_t n) {
    const Batch batch(n);
    const float weight = 1.0f / static_cast<float>(n > 0 ? n : 1);
    const PpoOptions settings[] = {
        {0.2f, 0.2f, infinity, weight}, {0.2f, infinity, infinity, weight}, {0.1f, 0.3f, 1.2f, weight}};
    for (const PpoOptions& options : settings) {
        for (const bool weighted : {false, true}) {
            Note note("n = ", n, ", clip = ", options.clip, ", value_clip = ", options.value_clip,
                      ", dual_clip = ", options.dual_clip, ", weighted = ", weighted);
            const Found found = run(batch, options, weighted);
            const auto peer = plain<float>(batch, options, weighted);
            const auto truth = plain<double>(batch, options, weighted);
            CHECK_AS_GOOD(found.grad_logprobs, peer.grad_logprobs, truth.grad_logprobs, 1e-7 * weight);
            CHECK_AS_GOOD(found.grad_values, peer.grad_values, truth.grad_values, 1e-7 * weight);
            const std::vector<double> sums = found.all();
            for (int k = 0; k < losses; ++k) {
                Note which("number ", k);
                CHECK_NEAR(sums[k], truth.sums[k], 1e-6 * truth.sizes[k]);
            }
        }
    }
}

}  // namespace

TEST(ppo_loss_of_odd_sizes) {
    for (const int64_t n : odd_sizes()) check(n);
}

TEST(ppo_loss_around_its_blocks) {
    for (const int64_t n : {ppo_block - 1, ppo_block, ppo_block + 1, 3 * ppo_block + 17}) check(n);
}

TEST(ppo_loss_gives_the_same_bits_on_any_number_of_threads) {
    const Batch batch(5 * ppo_block + 13);  // below 4 blocks, one thread does it all
    const PpoOptions options = {0.2f, 0.2f, 3.0f, 1e-4f};
    const Found alone = run(batch, options, true, 1);
    for (const int threads : {2, 3}) {
        Note note("threads = ", threads);
        const Found found = run(batch, options, true, threads);
        CHECK_SAME_BITS(found.grad_logprobs, alone.grad_logprobs);
        CHECK_SAME_BITS(found.grad_values, alone.grad_values);
        CHECK_SAME_BITS(found.all(), alone.all());
    }
}

// A ratio that overflows is infinite in the sums, and NaN in one token shows in every sum it belongs to.
TEST(ppo_loss_hides_neither_infinity_nor_nan) {
    for (const int64_t n : odd_sizes()) {
        if (n == 0) continue;
        for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
            Note note("n = ", n, ", at = ", at);
            Batch batch(n);
            const PpoOptions options = {0.2f, 0.2f, infinity, 1.0f};
            batch.logprobs[at] = batch.old_logprobs[at] + 200.0f;
            CHECK_EQUAL(run(batch, options, false).stats[4], infinity);
            batch.logprobs[at] = std::numeric_limits<float>::quiet_NaN();
            const Found found = run(batch, options, false);
            CHECK(std::isnan(found.policy[0]));
            CHECK(std::isnan(found.stats[0]));
            CHECK(std::isnan(found.stats[4]));
            CHECK(std::isfinite(found.value[0]));
            for (int64_t i = 0; i < n; ++i) CHECK_EQUAL(std::isnan(found.grad_logprobs[i]), i == at);
        }
    }
}
