// gae against its definition: one plain loop over each sequence, from its last step to its first.
#include "buffer.h"
#include "check.h"
#include "cpu/dispatch.h"

using namespace core_tests;
using pyrlhf::cpu;

namespace {

constexpr float quiet_nan = __builtin_nanf("");

struct Batch {
    explicit Batch(const std::vector<int64_t>& lengths)
        : sequences(static_cast<int64_t>(lengths.size())), cu(running_sums(lengths)) {}
    int64_t total() const { return cu[sequences]; }

    int64_t sequences;
    Random random{0};
    Buffer<int32_t> cu;
    Buffer<float> rewards{total(), [this](int64_t) { return random.normal(); }};
    Buffer<float> values{total(), [this](int64_t) { return random.normal(); }};
    Buffer<float> bootstrap{sequences, [this](int64_t) { return random.normal(); }};
};

struct Found {
    explicit Found(int64_t total) : advantages(total), returns(total) {}
    Buffer<float> advantages, returns;
};

Found run(const Batch& batch, float gamma, float lam, bool bootstrapped, int threads = 1) {
    Found out(batch.total());
    cpu().gae(batch.rewards.data(), batch.values.data(), batch.cu.data(),
              bootstrapped ? batch.bootstrap.data() : nullptr, out.advantages.data(), out.returns.data(),
              batch.sequences, gamma, lam, threads);
    return out;
}

template <typename Number>
std::vector<Number> plain_advantages(const Batch& batch, float gamma, float lam, bool bootstrapped) {
    std::vector<Number> out(static_cast<size_t>(batch.total()));
    for (int64_t s = 0; s < batch.sequences; ++s) {
        Number next = bootstrapped ? batch.bootstrap[s] : 0.0f, carry = 0;
        for (int64_t t = batch.cu[s + 1] - 1; t >= batch.cu[s]; --t) {
            carry = batch.rewards[t] + Number(gamma) * next - batch.values[t] + Number(gamma) * Number(lam) * carry;
            next = batch.values[t];
            out[t] = carry;
        }
    }
    return out;
}

template <typename Number>
std::vector<Number> plus(std::vector<Number> x, const Buffer<float>& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[static_cast<int64_t>(i)];
    return x;
}

void check(const std::vector<int64_t>& lengths) {
    const Batch batch(lengths);
    const float settings[][2] = {{1.0f, 0.95f}, {0.99f, 1.0f}, {1.0f, 1.0f}, {0.9f, 0.0f}, {0.0f, 0.5f}};
    for (const auto& [gamma, lam] : settings) {
        for (const bool bootstrapped : {false, true}) {
            Note note("gamma = ", gamma, ", lam = ", lam, ", bootstrapped = ", bootstrapped);
            const Found found = run(batch, gamma, lam, bootstrapped);
            const auto peer = plain_advantages<float>(batch, gamma, lam, bootstrapped);
            const auto truth = plain_advantages<double>(batch, gamma, lam, bootstrapped);
            CHECK_AS_GOOD(found.advantages, peer, truth, 1e-6);
            CHECK_AS_GOOD(found.returns, plus(peer, batch.values), plus(truth, batch.values), 1e-6);
        }
    }
}

const std::vector<int64_t> mixed = {37, 0, 1024, 5, 16, 2000, 1, 0, 17};

}  // namespace

TEST(gae_of_one_sequence) {
    for (const int64_t length : odd_sizes()) {
        Note note("length = ", length);
        check({length});
    }
}

TEST(gae_of_many_sequences) {
    check({});
    check({0, 0});
    check({5, 0, 1, 300, 17, 16, 0, 33, 1023});
    check(std::vector<int64_t>(1000, 3));
    check(odd_sizes());
}

TEST(gae_gives_the_same_bits_on_any_number_of_threads) {
    std::vector<int64_t> lengths;
    for (int i = 0; i < 6; ++i) lengths.insert(lengths.end(), mixed.begin(), mixed.end());
    const Batch batch(lengths);
    CHECK(batch.total() >= 16384);  // below, one thread does it all
    const Found alone = run(batch, 0.99f, 0.95f, true, 1);
    for (const int threads : {2, 3}) {
        Note note("threads = ", threads);
        const Found found = run(batch, 0.99f, 0.95f, true, threads);
        CHECK_SAME_BITS(found.advantages, alone.advantages);
        CHECK_SAME_BITS(found.returns, alone.returns);
    }
}

// NaN goes from a token to those before it in its sequence, and nowhere else.
TEST(gae_keeps_sequences_apart) {
    for (const int64_t length : odd_sizes()) {
        if (length < 2) continue;
        Note note("length = ", length);
        Batch batch({length, length, length});
        const int64_t bad = length + length / 2;
        batch.rewards[bad] = quiet_nan;
        const Found found = run(batch, 1.0f, 0.95f, false);
        for (int64_t t = 0; t < batch.total(); ++t)
            CHECK_EQUAL(std::isnan(found.advantages[t]), t >= length && t <= bad);
    }
}
