// rms_norm and layer_norm against their definition: plain loops over the rows.
#include "cpu/dispatch.h"
#include "dtypes.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

struct Problem {
    bool centered;  // layer_norm
    int64_t rows, size;
    bool residual = true, grad_sum = true;
    float mean = 0.0f;
    bool rows_alike = false;

    std::string name() const {
        return text(centered ? "layer_norm" : "rms_norm", ", rows = ", rows, ", size = ", size,
                    ", residual = ", residual, ", grad_sum = ", grad_sum, ", mean = ", mean);
    }
};

constexpr float eps = 1e-5f;

// T: of the rows, P: of the parameters.
template <typename T, typename P>
struct Batch {
    explicit Batch(const Problem& p) : problem(p) {}
    Buffer<T> drawn(bool there, float mean = 0.0f) {
        const int64_t elements = there ? problem.rows * problem.size : 0;
        return repeated_normals<T>(elements, problem.rows_alike ? problem.size : std::max<int64_t>(elements, 1), random,
                                   1.0f, mean);
    }

    Problem problem;
    Random random{3};
    Buffer<T> x = drawn(true, problem.mean);
    Buffer<T> residual = drawn(problem.residual);
    Buffer<T> grad_out = drawn(true);
    Buffer<T> grad_sum = drawn(problem.grad_sum);
    Buffer<P> weight = normals<P>(problem.size, random, 0.3f, 1.0f);
    Buffer<P> bias = normals<P>(problem.centered ? problem.size : 0, random);
};

template <typename T, typename P>
struct Found {
    explicit Found(const Problem& p)
        : out(p.rows * p.size),
          sum(p.residual ? out.size() : 0),
          grad_x(out.size()),
          mean(p.centered ? p.rows : 0),
          rstd(p.rows),
          grad_weight(p.size),
          grad_bias(p.centered ? p.size : 0) {}
    Buffer<T> out, sum, grad_x;
    Buffer<float> mean, rstd;
    Buffer<P> grad_weight, grad_bias;
};

template <typename T>
const T* if_any(const Buffer<T>& x) {
    return x.size() > 0 ? x.data() : nullptr;
}

template <typename T, typename P>
Found<T, P> run(const Batch<T, P>& b, int threads = 1) {
    const Problem& p = b.problem;
    Found<T, P> found(p);
    T* const sum = p.residual ? found.sum.data() : nullptr;
    const Buffer<float> scratch(threads * p.size);
    const NormForward forward = {b.x.data(),
                                 if_any(b.residual),
                                 b.weight.data(),
                                 b.bias.data(),
                                 found.out.data(),
                                 sum,
                                 found.mean.data(),
                                 found.rstd.data(),
                                 scratch.data(),
                                 dtype_of<T>,
                                 dtype_of<P>,
                                 p.rows,
                                 p.size,
                                 p.rows,
                                 0,
                                 eps};
    (p.centered ? cpu().layer_norm : cpu().rms_norm)(forward, threads);
    const Buffer<float> blocks((p.rows + norm_block - 1) / norm_block * (p.centered ? 2 : 1) * p.size);
    const NormBackward backward = {b.grad_out.data(),
                                   if_any(b.grad_sum),
                                   p.residual ? found.sum.data() : b.x.data(),
                                   b.weight.data(),
                                   found.mean.data(),
                                   found.rstd.data(),
                                   found.grad_x.data(),
                                   found.grad_weight.data(),
                                   p.centered ? found.grad_bias.data() : nullptr,
                                   blocks.data(),
                                   dtype_of<T>,
                                   dtype_of<P>,
                                   p.rows,
                                   p.size};
    (p.centered ? cpu().layer_norm_backward : cpu().rms_norm_backward)(backward, threads);
    return found;
}

template <typename T, typename P>
void check_same_bits(const Found<T, P>& found, const Found<T, P>& expected) {
    CHECK_SAME_BITS(found.out, expected.out);
    CHECK_SAME_BITS(found.sum, expected.sum);
    CHECK_SAME_BITS(found.grad_x, expected.grad_x);
    CHECK_SAME_BITS(found.mean, expected.mean);
    CHECK_SAME_BITS(found.rstd, expected.rstd);
    CHECK_SAME_BITS(found.grad_weight, expected.grad_weight);
    CHECK_SAME_BITS(found.grad_bias, expected.grad_bias);
}

// --- the definition ---

template <typename Number>
struct Results {
    std::vector<Number> out, grad_x, mean, rstd, grad_weight, grad_bias;
};

// In Number; what is stored is rounded to its dtype where that is float. The sum of x and residual always is.
template <typename Number, typename T, typename P>
Results<Number> plain(const Batch<T, P>& b) {
    const Problem& p = b.problem;
    const Number n = static_cast<Number>(p.size);
    const auto of = [](const auto& x, int64_t i) { return static_cast<Number>(to_float(x[i])); };
    Results<Number> r;
    r.grad_weight.resize(static_cast<size_t>(p.size));
    r.grad_bias.resize(static_cast<size_t>(p.centered ? p.size : 0));
    for (int64_t row = 0; row < p.rows; ++row) {
        const int64_t from = row * p.size;
        std::vector<Number> x;
        Number total = 0, squares = 0;
        for (int64_t i = from; i < from + p.size; ++i) {
            const float sum = p.residual ? to_float(b.x[i]) + to_float(b.residual[i]) : to_float(b.x[i]);
            x.push_back(static_cast<Number>(to_float(rounded_to<T>(sum))));
            total += x.back();
        }
        const Number mean = p.centered ? total / n : 0;
        for (const Number each : x) squares += (each - mean) * (each - mean);
        const Number rstd = 1 / std::sqrt(squares / n + static_cast<Number>(eps));
        if (p.centered) r.mean.push_back(mean);
        r.rstd.push_back(rstd);
        Number by_mean = 0, by_slope = 0;
        for (int64_t i = 0; i < p.size; ++i) {
            const Number normal = (x[static_cast<size_t>(i)] - mean) * rstd, grad = of(b.grad_out, from + i);
            const Number bias = p.centered ? of(b.bias, i) : 0;
            r.out.push_back(kept_as<T>(normal * of(b.weight, i) + bias));
            r.grad_weight[static_cast<size_t>(i)] += grad * normal;
            if (p.centered) r.grad_bias[static_cast<size_t>(i)] += grad;
            if (p.centered) by_mean += grad * of(b.weight, i);
            by_slope += grad * of(b.weight, i) * normal;
        }
        for (int64_t i = 0; i < p.size; ++i) {
            const Number normal = (x[static_cast<size_t>(i)] - mean) * rstd;
            const Number grad = of(b.grad_out, from + i) * of(b.weight, i);
            const Number by_x = (grad - by_mean / n - normal * (by_slope / n)) * rstd;
            r.grad_x.push_back(kept_as<T>(p.grad_sum ? by_x + of(b.grad_sum, from + i) : by_x));
        }
    }
    for (std::vector<Number>* each : {&r.grad_weight, &r.grad_bias})
        for (Number& x : *each) x = kept_as<P>(x);
    return r;
}

template <typename T, typename P>
void check_as(const Problem& p) {
    Note note(dtype_name<T>, " with parameters of ", dtype_name<P>, ", ", p.name());
    const Batch<T, P> b(p);
    const Found<T, P> found = run(b);
    const Results<float> peer = plain<float>(b);
    const Results<double> truth = plain<double>(b);
    const auto near = [](const auto& each, const auto& by_peer, const auto& expected, double size) {
        CHECK_AS_GOOD(each, by_peer, expected, few_roundings(expected) + 8 * float_rounding * size);
    };
    // The gradient of x is a difference of numbers as large as rstd.
    double rstd = 0;
    for (const double each : truth.rstd) rstd = std::max(rstd, each);
    near(found.out, peer.out, truth.out, 1);
    near(found.rstd, peer.rstd, truth.rstd, 0);
    near(found.mean, peer.mean, truth.mean, 1);
    near(found.grad_x, peer.grad_x, truth.grad_x, rstd);
    near(found.grad_weight, peer.grad_weight, truth.grad_weight, 1);
    near(found.grad_bias, peer.grad_bias, truth.grad_bias, 1);
    for (int64_t i = 0; i < found.sum.size(); ++i) {
        const float sum = to_float(b.x[i]) + to_float(b.residual[i]);
        CHECK_EQUAL(number(found.sum[i]), number(rounded_to<T>(sum)));
    }
}

void check(const Problem& problem) {
    for (const bool centered : {false, true}) {
        Problem p = problem;
        p.centered = centered;
        check_as<float, float>(p);
        check_as<bf16, float>(p);
        check_as<bf16, bf16>(p);
    }
}

template <typename T, typename P>
void check_threads(const Problem& p) {
    Note note(dtype_name<T>, " with parameters of ", dtype_name<P>, ", ", p.name());
    CHECK(p.rows * p.size >= 32768);  // below, one thread does it all
    const Batch<T, P> b(p);
    const Found<T, P> alone = run(b);
    check_same_bits(run(b, 3), alone);
}

// Large arrays are written past the caches: every row as it is alone, but for the gradients of parameters.
template <typename T>
void check_large(bool centered) {
    Note note(dtype_name<T>, ", centered = ", centered);
    const int64_t size = 1 << 14, rows = (int64_t{16} << 20) / size / static_cast<int64_t>(sizeof(T));
    const Found<T, float> expected = run(Batch<T, float>({centered, 1, size}));
    const Found<T, float> found = run(Batch<T, float>({centered, rows, size, true, true, 0.0f, true}), 3);
    const auto same = [&](const Buffer<T>& all, const Buffer<T>& row) {
        for (int64_t i = 0; i < rows; ++i)
            CHECK(std::memcmp(all.data() + i * size, row.data(), static_cast<size_t>(size) * sizeof(T)) == 0);
    };
    same(found.out, expected.out);
    same(found.sum, expected.sum);
    same(found.grad_x, expected.grad_x);
}

}  // namespace

TEST(norms_of_any_size) {
    for (const int64_t size : odd_sizes())
        if (size > 0) check({false, 3, size});
    check({false, 2, 64 * width() + 5});  // sums are folded every 16 steps of 4 vectors
    check({false, 2, 129 * width() - 1});
}

// The parameters' gradients are summed in blocks of 32 rows.
TEST(norms_of_any_number_of_rows) {
    for (const int64_t rows : {0, 1, 2, 31, 32, 33, 97}) check({false, rows, 7});
}

TEST(norms_without_a_residual_or_a_gradient_of_the_sum) {
    for (const bool residual : {false, true})
        for (const bool grad_sum : {false, true}) check({false, 5, 2 * width() + 3, residual, grad_sum});
}

TEST(norms_of_rows_far_from_zero) {
    check({false, 5, 127, true, true, 100.0f});
    check({false, 5, 1023, false, true, -30.0f});
}

TEST(norms_give_the_same_bits_on_any_number_of_threads) {
    for (const bool centered : {false, true}) {
        check_threads<float, float>({centered, 131, 257});
        check_threads<bf16, float>({centered, 131, 257});
        check_threads<bf16, bf16>({centered, 33, 1023});
    }
}

TEST(norms_of_a_large_array) {
    if (place() != Place::page_end) return;
    check_large<float>(false);
    check_large<bf16>(true);
}
