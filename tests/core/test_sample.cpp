// sample against its definition in double: the filters by sorting, the draw by the running sum of probabilities.
#include <algorithm>
#include <limits>
#include <numeric>

#include "buffer.h"
#include "check.h"
#include "core/philox.h"
#include "cpu/dispatch.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float no_min_p = -infinity;
constexpr uint64_t seed = 5;

// seed, 1 / temperature (0: argmax), top_k, top_p, log(min_p)
const SampleOptions settings[] = {
    {seed, 1.0f, 0, 1.0, no_min_p}, {seed, 1 / 0.3f, 0, 1.0, no_min_p}, {seed, 0.2f, 0, 1.0, no_min_p},
    {seed, 0.0f, 0, 1.0, no_min_p}, {seed, 1.0f, 1, 1.0, no_min_p},     {seed, 1.0f, 7, 1.0, no_min_p},
    {seed, 1.0f, 0, 0.9, no_min_p}, {seed, 1.0f, 0, 1e-9, no_min_p},    {seed, 1.0f, 0, 1.0, -2.9957f},
    {seed, 1.0f, 0, 1.0, 0.0f},     {seed, 1 / 1.3f, 40, 0.8, -3.9f},
};

float as_logit(float x, float) { return x; }
bf16 as_logit(float x, bf16) { return to_bf16(x); }

// Rows `gap` elements apart from each other; what lies between them is NaN and must not be looked at.
template <typename T>
struct Batch {
    Batch(int64_t rows, int64_t vocab, int64_t gap = 0)
        : rows(rows), vocab(vocab), stride(vocab + gap), logits(rows > 0 ? (rows - 1) * stride + vocab : 0) {
        for (int64_t b = 0; b < rows; ++b)
            for (int64_t i = 0; i < vocab; ++i) row(b)[i] = as_logit(3.0f * random.normal(), T{});
    }
    T* row(int64_t b) { return logits.data() + b * stride; }
    float logit(int64_t b, int64_t i) const { return to_float(logits[b * stride + i]); }

    int64_t rows, vocab, stride;
    Random random{7};
    Buffer<T> logits;
    Buffer<int64_t> ids{rows, [this](int64_t) { return random.below(int64_t{1} << 62) - (int64_t{1} << 61); }};
    Buffer<int64_t> positions{rows, [this](int64_t) { return random.below(int64_t{1} << 40); }};
};

struct Found {
    explicit Found(int64_t rows) : tokens(rows), logprobs(rows) {}
    int64_t bad = 0;
    Buffer<int64_t> tokens;
    Buffer<float> logprobs;
};

template <typename T>
Found run(const Batch<T>& batch, const SampleOptions& options, int threads = 1) {
    Found out(batch.rows);
    const DType dtype = sizeof(T) == sizeof(bf16) ? DType::bfloat16 : DType::float32;
    out.bad = cpu().sample(batch.logits.data(), dtype, batch.ids.data(), batch.positions.data(), options, batch.rows,
                           batch.vocab, batch.stride, out.tokens.data(), out.logprobs.data(), threads);
    return out;
}

// One row's distribution after temperature and filters.
struct Truth {
    std::vector<double> z, probability;
    std::vector<char> kept;
    double log_mass = 0;
};

template <typename T>
Truth distribution(const Batch<T>& batch, int64_t b, const SampleOptions& options) {
    const size_t vocab = static_cast<size_t>(batch.vocab);
    Truth out;
    std::vector<int64_t> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return batch.logit(b, i) > batch.logit(b, j); });
    const double inverse = options.inverse_temperature == 0 ? 1.0 : options.inverse_temperature;
    for (size_t i = 0; i < vocab; ++i)
        out.z.push_back((static_cast<double>(batch.logit(b, static_cast<int64_t>(i))) - batch.logit(b, order[0])) *
                        inverse);
    if (options.inverse_temperature > 0) {
        if (options.top_k > 0 && options.top_k < batch.vocab) order.resize(static_cast<size_t>(options.top_k));
        double all = 0, running = 0;
        for (const int64_t i : order) all += std::exp(out.z[i]);
        size_t count = 0;
        while (count < order.size() && (count == 0 || running < options.top_p * all))
            running += std::exp(out.z[order[count++]]);
        if (options.top_p < 1.0) order.resize(count);
    }
    const bool by_min_p = options.inverse_temperature > 0;
    out.kept.assign(vocab, 0);
    double mass = 0;
    for (const int64_t i : order) {
        out.kept[i] = !by_min_p || out.z[i] >= options.log_min_p;
        if (out.kept[i]) mass += std::exp(out.z[i]);
    }
    for (size_t i = 0; i < vocab; ++i) out.probability.push_back(out.kept[i] ? std::exp(out.z[i]) / mass : 0.0);
    out.log_mass = std::log(mass);
    return out;
}

// Weights are cut off at 2^-40 and e^z is a float's, so a running sum may be this far from the true one.
constexpr double rounding = 1e-6;

template <typename T>
void check_row(const Batch<T>& batch, int64_t b, const SampleOptions& options, int64_t token, double logprob) {
    const Truth truth = distribution(batch, b, options);
    if (token < 0 || token >= batch.vocab) return fail(__FILE__, __LINE__, text("token ", token));
    CHECK(truth.kept[token]);
    CHECK_NEAR(logprob, truth.z[token] - truth.log_mass, rounding * (1 + std::abs(truth.z[token])));
    if (options.inverse_temperature == 0) {
        for (int64_t i = 0; i < batch.vocab; ++i)
            CHECK(batch.logit(b, i) < batch.logit(b, token) ||
                  (batch.logit(b, i) == batch.logit(b, token) && i >= token));
        return;
    }
    const double point = static_cast<double>(keyed_bits62(options.seed, static_cast<uint64_t>(batch.ids[b]),
                                                          static_cast<uint64_t>(batch.positions[b]))) *
                         0x1p-62;
    const double before = std::accumulate(truth.probability.begin(), truth.probability.begin() + token, 0.0);
    CHECK_NEAR(point, std::clamp(point, before, before + truth.probability[token]), rounding);
}

template <typename T>
void check(const Batch<T>& batch) {
    for (const SampleOptions& options : settings) {
        Note note("rows = ", batch.rows, ", vocab = ", batch.vocab, ", bytes = ", sizeof(T),
                  ", 1/temperature = ", options.inverse_temperature, ", top_k = ", options.top_k,
                  ", top_p = ", options.top_p, ", log_min_p = ", options.log_min_p);
        const Found found = run(batch, options);
        CHECK_EQUAL(found.bad, -1);
        for (int64_t b = 0; b < batch.rows; ++b) check_row(batch, b, options, found.tokens[b], found.logprobs[b]);
    }
}

template <typename T>
void check_vocabularies() {
    std::vector<int64_t> sizes = odd_sizes();
    sizes.insert(sizes.end(), {1024, 1025, 5003});
    for (const int64_t vocab : sizes)
        if (vocab > 0) check(Batch<T>(3, vocab, vocab % 5));
}

template <typename T>
void check_threads(const SampleOptions& options) {
    const Batch<T> batch(9, 1023, 3);  // enough for more than one thread
    const Found alone = run(batch, options, 1);
    for (const int threads : {2, 3}) {
        Note note("threads = ", threads);
        const Found found = run(batch, options, threads);
        CHECK_EQUAL(found.bad, -1);
        CHECK_SAME_BITS(found.tokens, alone.tokens);
        CHECK_SAME_BITS(found.logprobs, alone.logprobs);
    }
    const std::string here = isa();
    set_isa("generic");
    const Found plainest = run(batch, options, 1);
    set_isa(here);
    CHECK_SAME_BITS(alone.tokens, plainest.tokens);
    CHECK_SAME_BITS(alone.logprobs, plainest.logprobs);
}

}  // namespace

TEST(sample_from_float32) { check_vocabularies<float>(); }
TEST(sample_from_bfloat16) { check_vocabularies<bf16>(); }
TEST(sample_of_no_rows) { check(Batch<float>(0, 17)); }
TEST(sample_of_1000_rows) { check(Batch<float>(1000, 5)); }

TEST(sample_among_equal_and_impossible_tokens) {
    for (const int64_t vocab : {1, 7, 127, 1021}) {
        Batch<float> batch(4, vocab);
        for (int64_t i = 0; i < vocab; ++i) {
            batch.row(0)[i] = -0.0f;                                // all equal, and equal to 0
            batch.row(1)[i] = i == vocab / 2 ? -1e30f : -infinity;  // one possible
            batch.row(2)[i] = i % 3 == 0 ? 3e38f : -3e38f;          // far apart
            batch.row(3)[i] = i % 2 == 0 ? 2.0f : i % 3 - 1.0f;     // many equal
        }
        if (vocab > 2) batch.row(0)[1] = 0.0f;
        check(batch);
    }
}

TEST(sample_gives_the_same_bits_on_any_number_of_threads_and_any_instruction_set) {
    for (const SampleOptions& options : settings) {
        check_threads<float>(options);
        check_threads<bf16>(options);
    }
}

template <typename T>
int64_t score(const Batch<T>& batch, const Buffer<int64_t>& tokens, float inverse, Buffer<float>& out, int threads) {
    const DType dtype = sizeof(T) == sizeof(bf16) ? DType::bfloat16 : DType::float32;
    return cpu().sampled_logprob(batch.logits.data(), dtype, tokens.data(), inverse, batch.rows, batch.vocab,
                                 batch.stride, out.data(), threads);
}

template <typename T>
void check_scores(int64_t vocab) {
    const Batch<T> batch(6, vocab, 3);
    for (const SampleOptions& options : settings) {
        if (options.top_k != 0 || options.top_p < 1.0 || options.log_min_p > no_min_p) continue;
        const Found found = run(batch, options);
        for (const int threads : {1, 3}) {
            Buffer<float> scores(batch.rows);
            CHECK_EQUAL(score(batch, found.tokens, options.inverse_temperature, scores, threads), -1);
            CHECK_SAME_BITS(scores, found.logprobs);
        }
    }
}

TEST(sampled_logprob_is_what_the_token_was_drawn_with) {
    for (const int64_t vocab : odd_sizes()) {
        if (vocab == 0) continue;
        Note note("vocab = ", vocab);
        check_scores<float>(vocab);
        check_scores<bf16>(vocab);
    }
    check_scores<float>(50257);
}

TEST(sampled_logprob_names_the_first_bad_row) {
    Batch<float> batch(4, 33);
    batch.row(1)[32] = std::numeric_limits<float>::quiet_NaN();
    batch.row(3)[0] = infinity;
    const Buffer<int64_t> tokens(4, [](int64_t b) { return b; });
    for (const int threads : {1, 2}) {
        Buffer<float> scores(4);
        CHECK_EQUAL(score(batch, tokens, 1.0f, scores, threads), 1);
        CHECK(std::isfinite(scores[0]) && std::isfinite(scores[2]));
        CHECK(std::isnan(scores[1]) && std::isnan(scores[3]));
    }
}

TEST(sample_names_the_first_bad_row_and_leaves_it_alone) {
    for (const int64_t vocab : odd_sizes()) {
        if (vocab == 0) continue;
        Batch<float> batch(5, vocab, 1);
        batch.row(2)[vocab - 1] = std::numeric_limits<float>::quiet_NaN();
        batch.row(3)[vocab / 2] = infinity;
        for (int64_t i = 0; i < vocab; ++i) batch.row(4)[i] = -infinity;
        for (const int threads : {1, 2}) {
            for (const SampleOptions& options : settings) {
                Note note("vocab = ", vocab, ", threads = ", threads);
                const Found found = run(batch, options, threads), untouched(5);
                CHECK_EQUAL(found.bad, 2);
                for (int64_t b = 0; b < 2; ++b) check_row(batch, b, options, found.tokens[b], found.logprobs[b]);
                for (int64_t b = 2; b < 5; ++b) {
                    CHECK_EQUAL(found.tokens[b], untouched.tokens[b]);
                    CHECK(std::isnan(found.logprobs[b]));
                }
            }
        }
    }
}

TEST(sample_finds_a_bad_row_anywhere) {
    for (int64_t bad = 0; bad < 5; ++bad) {
        Batch<bf16> batch(5, 17);
        batch.row(bad)[16] = {0x7FC0};  // NaN
        const Found found = run(batch, settings[0]);
        CHECK_EQUAL(found.bad, bad);
        for (int64_t b = 0; b < 5; ++b)
            if (b != bad) check_row(batch, b, settings[0], found.tokens[b], found.logprobs[b]);
    }
}
