// linear_logprob and linear_logprob_backward against their definition: all logits, in plain loops.
#include <map>

#include "cpu/dispatch.h"
#include "dtypes.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

struct Problem {
    int64_t rows, dim, vocab;
    bool bias = true;
    float temperature = 0.7f;
    int64_t every = 1;  // one row in this many has an upstream gradient

    int64_t row_count() const { return (rows + every - 1) / every; }
    std::string name() const {
        return text("rows = ", rows, ", dim = ", dim, ", vocab = ", vocab, ", bias = ", bias,
                    ", temperature = ", temperature, ", every = ", every);
    }
};

template <typename T>
struct Batch {
    explicit Batch(const Problem& p) : problem(p) {}
    LinearLogprobInputs inputs() const {
        return {hidden.data(),  weight.data(), problem.bias ? bias.data() : nullptr,
                targets.data(), dtype_of<T>,   problem.rows,
                problem.dim,    problem.vocab, problem.temperature};
    }

    Problem problem;
    Random random{17};
    Buffer<T> hidden{problem.rows * problem.dim,
                     [this](int64_t) { return rounded_to<T>(random.uniform(-1.7f, 1.7f)); }};
    Buffer<T> weight =
        normals<T>(problem.vocab * problem.dim, random, 1.5f / std::sqrt(static_cast<float>(problem.dim)));
    Buffer<T> bias = normals<T>(problem.bias ? problem.vocab : 0, random);
    Buffer<int64_t> targets{problem.rows, [this](int64_t) { return random.below(problem.vocab); }};
    Buffer<int64_t> rows{problem.row_count(), [this](int64_t i) { return i * problem.every; }};
    Buffer<float> by_logprob = normals<float>(problem.rows, random);
    Buffer<float> by_entropy = normals<float>(problem.rows, random, 0.3f);
};

// Everything that the kernels write. Rows of hidden's gradient that are not among `rows` stay NaN.
template <typename T>
struct Found {
    explicit Found(const Problem& p)
        : logprob(p.rows),
          entropy(p.rows),
          lse(p.rows),
          hidden(p.rows * p.dim),
          weight(p.vocab * p.dim),
          bias(p.bias ? p.vocab : 0) {}
    Buffer<float> logprob, entropy, lse;
    Buffer<T> hidden, weight, bias;
};

// Which gradients are wanted.
struct Wanted {
    bool hidden = true, weight = true, bias = true;
};

Buffer<double> scratch_for(DType dtype, const Problem& p, bool backwards) {
    const int64_t rows = backwards ? p.row_count() : p.rows;
    const int64_t bytes = cpu().linear_logprob_scratch(dtype, rows, p.dim, p.vocab, backwards);
    CHECK(bytes % static_cast<int64_t>(sizeof(double)) == 0);
    return Buffer<double>(bytes / static_cast<int64_t>(sizeof(double)));
}

template <typename T>
void forward(const Batch<T>& b, Found<T>& found, int threads) {
    const Buffer<double> scratch = scratch_for(dtype_of<T>, b.problem, false);
    cpu().linear_logprob(b.inputs(), found.logprob.data(), found.entropy.data(), found.lse.data(), scratch.data(),
                         threads);
}

template <typename T>
void backward(const Batch<T>& b, Found<T>& found, int threads, const Wanted& wanted = {}) {
    const Problem& p = b.problem;
    const Buffer<double> scratch = scratch_for(dtype_of<T>, p, true);
    const Buffer<float> sums(is_bf16<T> && wanted.hidden ? found.hidden.size() : 0);
    const LinearLogprobGradients grads = {b.rows.data(),
                                          p.row_count(),
                                          b.by_logprob.data(),
                                          b.by_entropy.data(),
                                          found.entropy.data(),
                                          found.lse.data(),
                                          sums.data(),
                                          wanted.hidden ? found.hidden.data() : nullptr,
                                          wanted.weight ? found.weight.data() : nullptr,
                                          wanted.bias && p.bias ? found.bias.data() : nullptr};
    cpu().linear_logprob_backward(b.inputs(), grads, scratch.data(), threads);
}

template <typename T>
Found<T> run(const Batch<T>& b, int threads = 1) {
    Found<T> found(b.problem);
    forward(b, found, threads);
    backward(b, found, threads);
    return found;
}

template <typename T>
void check_same_bits(const Found<T>& found, const Found<T>& expected) {
    CHECK_SAME_BITS(found.logprob, expected.logprob);
    CHECK_SAME_BITS(found.entropy, expected.entropy);
    CHECK_SAME_BITS(found.lse, expected.lse);
    CHECK_SAME_BITS(found.hidden, expected.hidden);
    CHECK_SAME_BITS(found.weight, expected.weight);
    CHECK_SAME_BITS(found.bias, expected.bias);
}

// --- the definition ---

template <typename Number>
struct Results {
    std::vector<Number> logprob, entropy, lse, hidden, weight, bias;
    double largest = 1;  // of the logits
};

// In Number. Where that is float, gradients are rounded to T, and so is the gradient of the logits before the two
// products; the backward makes the probabilities again from lse, as everywhere.
template <typename Number, typename T>
Results<Number> plain(const Batch<T>& b) {
    const Problem& p = b.problem;
    const auto of = [](const Buffer<T>& x) {
        std::vector<Number> out;
        for (int64_t i = 0; i < x.size(); ++i) out.push_back(static_cast<Number>(to_float(x[i])));
        return out;
    };
    const std::vector<Number> hidden = of(b.hidden), weight = of(b.weight), bias = of(b.bias);
    const Number temperature = static_cast<Number>(p.temperature);
    const size_t dim = static_cast<size_t>(p.dim), vocab = static_cast<size_t>(p.vocab);
    Results<Number> r;
    r.hidden.resize(hidden.size());
    r.weight.resize(weight.size());
    r.bias.resize(bias.size());
    std::vector<Number> z(vocab);
    for (int64_t row = 0; row < p.rows; ++row) {
        const Number* const h = hidden.data() + row * p.dim;
        const auto target = static_cast<size_t>(b.targets[row]);
        Number top = -std::numeric_limits<Number>::max(), total = 0, weighted = 0;
        for (size_t c = 0; c < vocab; ++c) {
            Number sum = 0;
            for (size_t d = 0; d < dim; ++d) sum += h[d] * weight[c * dim + d];
            z[c] = (p.bias ? sum + bias[c] : sum) / temperature;
            top = std::max(top, z[c]);
            r.largest = std::max(r.largest, static_cast<double>(std::abs(z[c])));
        }
        for (const Number each : z) total += std::exp(each - top);
        for (const Number each : z) weighted += std::exp(each - top) * (each - top);
        r.logprob.push_back(z[target] - top - std::log(total));
        r.entropy.push_back(std::log(total) - weighted / total);
        r.lse.push_back(top + std::log(total));
        if (row % p.every != 0) continue;
        const Number by_logprob = static_cast<Number>(b.by_logprob[row]) / temperature;
        const Number by_entropy = static_cast<Number>(b.by_entropy[row]) / temperature;
        for (size_t c = 0; c < vocab; ++c) {
            const Number log_p = z[c] - r.lse.back();
            Number dz = -std::exp(log_p) * (by_logprob + by_entropy * (log_p + r.entropy.back()));
            if (c == target) dz += by_logprob;
            if (p.bias) r.bias[c] += dz;
            dz = kept_as<T>(dz);
            for (size_t d = 0; d < dim; ++d) {
                r.hidden[static_cast<size_t>(row) * dim + d] += dz * weight[c * dim + d];
                r.weight[c * dim + d] += dz * h[d];
            }
        }
    }
    for (std::vector<Number>* each : {&r.hidden, &r.weight, &r.bias})
        for (Number& x : *each) x = kept_as<T>(x);
    return r;
}

struct Expected {
    Results<float> peer;
    Results<double> truth;
};

// The definition takes longer than the kernels, and is the same for every instruction set and place.
template <typename T>
const Expected& expected_of(const Batch<T>& b) {
    static std::map<std::string, Expected> known;
    const auto [at, fresh] = known.try_emplace(b.problem.name());
    if (fresh) at->second = {plain<float>(b), plain<double>(b)};
    return at->second;
}

template <typename T>
void check_as(const Problem& p) {
    Note note(dtype_name<T>, ", ", p.name());
    const Batch<T> b(p);
    Found<T> found = run(b);
    for (int64_t row = 0; row < p.rows; ++row) {
        for (int64_t d = 0; row % p.every != 0 && d < p.dim; ++d) {
            T& unwanted = found.hidden[row * p.dim + d];
            CHECK(std::isnan(number(unwanted)));
            unwanted = rounded_to<T>(0.0f);
        }
    }
    const auto& [peer, truth] = expected_of(b);
    // A logit is off by roundings of itself, a probability relatively by as much, and so its gradients.
    const double few = 8 * float_rounding * truth.largest;
    CHECK_AS_GOOD(found.logprob, peer.logprob, truth.logprob, few);
    CHECK_AS_GOOD(found.entropy, peer.entropy, truth.entropy, few);
    CHECK_AS_GOOD(found.lse, peer.lse, truth.lse, few);
    CHECK_AS_GOOD(found.hidden, peer.hidden, truth.hidden, few_roundings(truth.hidden) * truth.largest);
    CHECK_AS_GOOD(found.weight, peer.weight, truth.weight, few_roundings(truth.weight) * truth.largest);
    CHECK_AS_GOOD(found.bias, peer.bias, truth.bias, few_roundings(truth.bias) * truth.largest);
}

void check(const Problem& p) {
    check_as<float>(p);
    check_as<bf16>(p);
}

template <typename T>
void check_threads(const Problem& p) {
    Note note(dtype_name<T>, ", ", p.name());
    CHECK(p.row_count() * p.dim * p.vocab >= 1 << 20);  // below, one thread does it all
    const Batch<T> b(p);
    check_same_bits(run(b, 3), run(b));
}

// A gradient alone has the bits that it has among the others, and where it is not wanted nothing is written.
template <typename T>
void check_wanted(const Problem& p, const Wanted& wanted) {
    Note note(dtype_name<T>, ", ", p.name(), ", wanted: hidden ", wanted.hidden, ", weight ", wanted.weight, ", bias ",
              wanted.bias);
    const Batch<T> b(p);
    Found<T> expected = run(b), found(p);
    forward(b, found, 1);
    backward(b, found, 1, wanted);
    if (!wanted.hidden) make_nan(expected.hidden);
    if (!wanted.weight) make_nan(expected.weight);
    if (!wanted.bias) make_nan(expected.bias);
    check_same_bits(found, expected);
}

// The rows from `first` on have the bits that they have alone.
template <typename T>
void check_rows(const Problem& p, int64_t first) {
    Note note(dtype_name<T>, ", ", p.name(), ", first = ", first);
    const Batch<T> together(p);
    Problem some = p;
    some.rows = p.rows - first;
    Batch<T> alone(some);
    const auto copy = [](const auto& from, int64_t at, auto& to) {
        std::copy(from.data() + at, from.data() + at + to.size(), to.data());
    };
    copy(together.hidden, first * p.dim, alone.hidden);
    copy(together.weight, 0, alone.weight);
    copy(together.bias, 0, alone.bias);
    copy(together.targets, first, alone.targets);
    copy(together.by_logprob, first, alone.by_logprob);
    copy(together.by_entropy, first, alone.by_entropy);
    const Found<T> found = run(together), expected = run(alone);
    const auto same = [](const auto& all, int64_t at, const auto& part) {
        using Element = std::remove_reference_t<decltype(*part.data())>;
        CHECK_SAME_BITS(Buffer<Element>(part.size(), [&](int64_t i) { return all[at + i]; }), part);
    };
    same(found.logprob, first, expected.logprob);
    same(found.entropy, first, expected.entropy);
    same(found.lse, first, expected.lse);
    same(found.hidden, first * p.dim, expected.hidden);
}

}  // namespace

// Rows go in panels of 64.
TEST(linear_logprob_of_any_number_of_rows) {
    check({0, 3, 5});
    for (const int64_t rows : {1, 2, 3, 15, 16, 17, 63, 64, 65, 130}) check({rows, 5, 19});
}

// Sums go in chains of 256 units, gradients in panels of 64 columns.
TEST(linear_logprob_of_any_dim) {
    for (const int64_t dim : {1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 127, 257, 515}) check({3, dim, 11});
}

// The vocabulary goes in tiles of 128, slabs of 1024 in the backward.
TEST(linear_logprob_of_any_vocabulary) {
    for (const int64_t vocab : {1, 2, 3, 15, 16, 17, 127, 128, 129, 255, 257, 1023, 1025, 2051}) check({5, 3, vocab});
    check({66, 33, 300});
}

TEST(linear_logprob_with_any_bias_and_temperature) {
    for (const bool bias : {false, true})
        for (const float temperature : {0.1f, 1.0f, 3.0f}) check({7, 16, 40, bias, temperature});
}

TEST(linear_logprob_of_some_rows_with_gradients) {
    for (const int64_t every : {2, 3, 70}) check({133, 6, 37, true, 1.0f, every});
}

TEST(linear_logprob_with_any_gradient_wanted) {
    const Problem p = {67, 21, 131};
    for (const Wanted& wanted : {Wanted{true, false, false}, Wanted{false, true, false}, Wanted{false, false, true},
                                 Wanted{false, false, false}, Wanted{true, true, false}}) {
        check_wanted<float>(p, wanted);
        check_wanted<bf16>(p, wanted);
    }
}

TEST(linear_logprob_gives_the_same_bits_on_any_number_of_threads) {
    for (const Problem& p : {Problem{197, 67, 301}, Problem{70, 33, 1100, false, 1.0f, 2}}) {
        check_threads<float>(p);
        check_threads<bf16>(p);
    }
}

TEST(linear_logprob_keeps_rows_apart) {
    for (const int64_t first : {1, 64, 69}) {
        check_rows<float>({71, 19, 140}, first);
        check_rows<bf16>({71, 19, 140}, first);
    }
}

// More rows than scratch memory holds at a time, in the backward and in the forward.
TEST(linear_logprob_in_several_chunks_of_rows) {
    if (place() != Place::page_end) return;
    check_as<float>({4000, 2, 1030});
    check_as<bf16>({7600, 2, 1030});
    if (isa() == isas_available().back()) check_rows<float>({1100, 8192, 2}, 1060);
}
