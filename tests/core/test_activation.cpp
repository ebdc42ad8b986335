// activation against its definition: every element on its own, in double.
#include <limits>

#include "cpu/dispatch.h"
#include "dtypes.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

constexpr Activation kinds[] = {Activation::gelu, Activation::gelu_new, Activation::quick_gelu, Activation::relu,
                                Activation::silu};

// The function and its slope at a point, each with the size of the terms that it is the sum of; steepness is how much
// a relative error of what an exponential is taken of changes that exponential, at most.
struct Point {
    double value, slope, slope_size, steepness;
};

Point sigmoid_unit(double x, double z, double z_slope) {
    const double s = 1 / (1 + std::exp(-z)), complement = 1 / (1 + std::exp(z));
    const double second = x * z_slope * s * complement;
    return {x * s, s + second, s + std::abs(second), std::abs(z)};
}

Point at(Activation kind, double x) {
    switch (kind) {
        case Activation::none:
            break;
        case Activation::gelu: {
            const double cdf = std::erfc(-x / std::sqrt(2.0)) / 2;
            const double second = x * std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0));
            return {x * cdf, cdf + second, cdf + std::abs(second), x * x / 2};
        }
        case Activation::gelu_new: {
            const double linear = 2 * std::sqrt(2 / std::acos(-1.0)), cubic = 0.044715 * linear;
            return sigmoid_unit(x, linear * x + cubic * x * x * x, linear + 3 * cubic * x * x);
        }
        case Activation::quick_gelu:
            return sigmoid_unit(x, 1.702 * x, 1.702);
        case Activation::relu:
            return {std::max(x, 0.0), x > 0 ? 1.0 : 0.0, 1, 0};
        case Activation::silu:
            return sigmoid_unit(x, x, 1);
    }
    return {};
}

// Allowed for `x`, of terms of this size: 12 roundings of float32, as many as the longest chain here has, an
// exponential's argument rounded three times, and the dtype's own rounding. An exponential below the normal range is 0.
template <typename T>
double allowed(double size, double steepness, double x, double factor) {
    const double own = is_bf16<T> ? rounding_of<T> * std::abs(x) : 0;
    return float_rounding * (12 + 3 * steepness) * size + own + 128 * (1 + factor) * least_normal;
}

template <typename T>
struct Problem {
    Problem(Activation kind, bool gated, int64_t rows, int64_t size)
        : kind(kind),
          gated(gated),
          rows(rows),
          size(size),
          x(rows * size * (1 + gated), [this](int64_t i) { return rounded_to<T>(draw(i)); }),
          grad_out(normals<T>(rows * size, random)) {}

    float draw(int64_t i) {
        constexpr float corners[] = {0.0f, -0.0f, 1e-30f, -1e-30f, 13.0f, -13.0f, 40.0f, -40.0f, 100.0f, -100.0f};
        return i % 7 == 3 ? corners[random.below(10)] : 3 * random.normal();
    }
    int64_t place_of(int64_t row, int64_t i) const { return row * size * (1 + gated) + i; }

    Activation kind;
    bool gated;
    int64_t rows, size;
    Random random{5};
    Buffer<T> x, grad_out;
};

template <typename T>
struct Found {
    explicit Found(const Problem<T>& p) : out(p.rows * p.size), grad(p.x.size()) {}
    Buffer<T> out, grad;
};

template <typename T>
Found<T> run(const Problem<T>& p, int threads = 1) {
    Found<T> found(p);
    cpu().activation({nullptr, p.x.data(), found.out.data(), dtype_of<T>, p.kind, p.gated, p.rows, p.size}, threads);
    if (p.grad_out.size() > 0)  // a null grad_out asks for the forward
        cpu().activation(
            {p.grad_out.data(), p.x.data(), found.grad.data(), dtype_of<T>, p.kind, p.gated, p.rows, p.size}, threads);
    return found;
}

template <typename T>
void check_same_bits(const Found<T>& found, const Found<T>& expected) {
    CHECK_SAME_BITS(found.out, expected.out);
    CHECK_SAME_BITS(found.grad, expected.grad);
}

template <typename T>
void check(Activation kind, bool gated, int64_t rows, int64_t size) {
    Note note(dtype_name<T>, ", kind ", static_cast<int>(kind), ", gated = ", gated, ", rows = ", rows,
              ", size = ", size);
    const Problem<T> p(kind, gated, rows, size);
    const Found<T> found = run(p);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < size; ++i) {
            const int64_t from = p.place_of(row, i), to = row * size + i;
            const double x = number(p.x[from]), up = gated ? number(p.x[from + size]) : 1;
            const double grad = number(p.grad_out[to]), most = std::abs(grad) + std::abs(up) + std::abs(grad * up);
            const Point f = at(kind, x);
            const auto near = [&](T each, double expected, double size_of_terms) {
                CHECK_NEAR(number(each), expected,
                           allowed<T>(size_of_terms, f.steepness, expected, std::abs(x) * most + most));
            };
            near(found.out[to], f.value * up, std::abs(f.value * up));
            near(found.grad[from], grad * up * f.slope, std::abs(grad * up) * f.slope_size);
            if (gated) near(found.grad[from + size], grad * f.value, std::abs(grad * f.value));
        }
    }
}

template <typename T>
void check_threads(int64_t rows, int64_t size) {
    Note note(dtype_name<T>, ", rows = ", rows, ", size = ", size);
    CHECK(rows * size >= 16384);  // below, one thread does it all
    const Problem<T> p(Activation::gelu, true, rows, size);
    const Found<T> alone = run(p);
    check_same_bits(run(p, 3), alone);
}

// NaN in one element is NaN in what belongs to it, and nowhere else.
template <typename T>
void check_nan(Activation kind) {
    const int64_t size = 2 * width() + 3;
    Note note(dtype_name<T>, ", kind ", static_cast<int>(kind));
    Problem<T> p(kind, false, 1, size);
    const Found<T> clean = run(p);
    for (int64_t bad = 0; bad < size; ++bad) {
        const T before = p.x[bad];
        p.x[bad] = rounded_to<T>(0.0f);
        std::memset(&p.x[bad], 0xFF, sizeof(T));
        Found<T> found = run(p);
        CHECK(std::isnan(number(found.out[bad])));
        if (kind != Activation::relu) CHECK(std::isnan(number(found.grad[bad])));
        found.out[bad] = clean.out[bad];
        found.grad[bad] = clean.grad[bad];
        check_same_bits(found, clean);
        p.x[bad] = before;
    }
}

// Large arrays are written past the caches: every row as it is alone.
template <typename T>
void check_large(bool gated) {
    Note note(dtype_name<T>, ", gated = ", gated);
    const int64_t size = 1 << 14, rows = (int64_t{16} << 20) / size / static_cast<int64_t>(sizeof(T));
    const Problem<T> row(Activation::silu, gated, 1, size);
    const Found<T> expected = run(row);
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
    const auto repeated = [&](const Buffer<T>& one) {
        return Buffer<T>(rows * one.size(), [&one](int64_t i) { return one[i % one.size()]; });
    };
    const Buffer<T> x = repeated(row.x), grad_out = repeated(row.grad_out);
    Buffer<T> out(rows * size), grad(x.size());
    cpu().activation({nullptr, x.data(), out.data(), dtype_of<T>, row.kind, gated, rows, size}, 3);
    cpu().activation({grad_out.data(), x.data(), grad.data(), dtype_of<T>, row.kind, gated, rows, size}, 3);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t width_of_x = size * (1 + gated);
        CHECK(std::memcmp(out.data() + i * size, expected.out.data(), static_cast<size_t>(bytes)) == 0);
        CHECK(std::memcmp(grad.data() + i * width_of_x, expected.grad.data(),
                          static_cast<size_t>(bytes) * (1 + gated)) == 0);
    }
}

}  // namespace

TEST(activation_of_any_size) {
    for (const int64_t size : odd_sizes()) {
        for (const Activation kind : kinds) {
            for (const bool gated : {false, true}) {
                check<float>(kind, gated, 3, size);
                check<bf16>(kind, gated, 3, size);
            }
        }
    }
}

TEST(activation_of_any_number_of_rows) {
    for (const int64_t rows : {0, 1, 2, 37}) {
        check<float>(Activation::gelu_new, true, rows, 5);
        check<bf16>(Activation::silu, false, rows, 19);
    }
}

// A row is shared out in chunks of 4096 elements.
TEST(activation_gives_the_same_bits_on_any_number_of_threads) {
    for (const auto& [rows, size] : {std::pair<int64_t, int64_t>{3, 8195}, {1, 20001}, {17, 1023}}) {
        check_threads<float>(rows, size);
        check_threads<bf16>(rows, size);
    }
}

TEST(activation_keeps_nan_in_its_element) {
    for (const Activation kind : kinds) {
        check_nan<float>(kind);
        check_nan<bf16>(kind);
    }
}

TEST(activation_of_a_large_array) {
    if (place() != Place::page_end) return;
    check_large<float>(true);
    check_large<bf16>(false);
}
