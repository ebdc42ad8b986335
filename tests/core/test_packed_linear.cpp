// pack_weight against the layout that kernels.h gives it, bit for bit, and packed_linear against three plain loops.
#include <map>

#include "cpu/dispatch.h"
#include "dtypes.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Panels begin on a cache line, which pages give and the heap does not promise.
template <typename T>
Buffer<T> on_pages(int64_t size) {
    const Place chosen = place();
    if (chosen == Place::heap || chosen == Place::heap_plus_1) set_place(Place::page_end);
    Buffer<T> out(size);
    set_place(chosen);
    return out;
}

// [out, in], with a gap between rows that must not be read.
template <typename T>
struct Weight {
    Weight(int64_t out, int64_t in, int64_t gap)
        : out(out), in(in), stride(in + gap), data(out > 0 ? (out - 1) * stride + in : 0) {
        for (int64_t n = 0; n < out; ++n)
            for (int64_t k = 0; k < in; ++k) data[n * stride + k] = rounded_to<T>(random.normal());
    }
    int64_t out, in, stride;
    Random random{2};
    Buffer<T> data;
};

// Elements of the panels: k is filled up to whole pairs where they hold bfloat16.
template <typename P>
int64_t depth_of(int64_t in) {
    return is_bf16<P> ? round_up(in, 2) : in;
}

template <typename P, typename T>
Buffer<P> pack(const Weight<T>& w, int threads = 1) {
    Buffer<P> panels = on_pages<P>(round_up(w.out, panel_columns) * depth_of<P>(w.in));
    Buffer<uint64_t> fingerprints(round_up(w.out, panel_columns) / panel_columns, [](int64_t) { return 0; });
    for (int again = 0; again < 2; ++again)
        CHECK(cpu().pack_weight(w.data.data(), dtype_of<T>, w.stride, w.out, w.in, panels.data(), dtype_of<P>,
                                fingerprints.data(), threads));
    return panels;
}

template <typename P, typename T>
void check_layout(int64_t out, int64_t in, int64_t gap) {
    Note note(dtype_name<T>, " to ", dtype_name<P>, ", weight [", out, ", ", in, "], gap = ", gap);
    constexpr int64_t pair = is_bf16<P> ? 2 : 1;
    const Weight<T> w(out, in, gap);
    const int64_t depth = depth_of<P>(in);
    const Buffer<P> expected(round_up(out, panel_columns) * depth, [&](int64_t i) {
        const int64_t unit = i / (panel_columns * pair), units = depth / pair;
        const int64_t n = unit / units * panel_columns + i / pair % panel_columns, k = unit % units * pair + i % pair;
        return rounded_to<P>(n < out && k < in ? to_float(w.data[n * w.stride + k]) : 0.0f);
    });
    const Buffer<P> found = pack<P>(w);
    CHECK_SAME_BITS(found, expected);
    CHECK_SAME_BITS(pack<P>(w, 3), found);
}

// --- the product ---

struct Problem {
    int64_t rows, in, out;
    Activation activation = Activation::none;
    int bias = 1;  // 0: none, 1: of x's dtype, 2: float32

    std::string name() const {
        return text("rows = ", rows, ", in = ", in, ", out = ", out, ", activation = ", static_cast<int>(activation),
                    ", bias = ", bias);
    }
};

// T: of x and y, P: of the panels.
template <typename T, typename P>
struct Batch {
    explicit Batch(const Problem& p) : problem(p), weight(p.out, p.in, 0), panels(pack<P>(weight)) {}

    Problem problem;
    Random random{9};
    Weight<P> weight;
    Buffer<P> panels;
    Buffer<T> x = normals<T>(problem.rows * problem.in, random);
    Buffer<T> bias = normals<T>(problem.bias == 1 ? problem.out : 0, random);
    Buffer<float> wide_bias = normals<float>(problem.bias == 2 ? problem.out : 0, random);
};

template <typename T, typename P>
Buffer<T> run(const Batch<T, P>& b, int threads = 1) {
    const Problem& p = b.problem;
    const bool as_is = std::is_same<T, P>::value && p.in == depth_of<P>(p.in);
    const Buffer<P> units(as_is ? 0 : p.rows * depth_of<P>(p.in));
    const void* const bias = p.bias == 0   ? nullptr
                             : p.bias == 1 ? static_cast<const void*>(b.bias.data())
                                           : b.wide_bias.data();
    Buffer<T> y(p.rows * p.out);
    cpu().packed_linear({b.x.data(), dtype_of<T>, as_is ? nullptr : units.data(), b.panels.data(), dtype_of<P>, bias,
                         p.bias == 2 ? DType::float32 : dtype_of<T>, y.data(), dtype_of<T>},
                        {p.rows, p.in, p.out}, p.activation, threads);
    return y;
}

template <typename Number>
Number activated(Activation activation, Number y) {
    switch (activation) {
        case Activation::gelu:
            return y * std::erfc(-y / std::sqrt(Number(2))) / 2;
        case Activation::gelu_new:
            return y / 2 * (1 + std::tanh(Number(0.7978845608028654) * (y + Number(0.044715) * y * y * y)));
        case Activation::relu:
            return std::max(y, Number(0));
        case Activation::silu:
            return y / (1 + std::exp(-y));
        default:
            return y;
    }
}

template <typename Number, typename T, typename P>
std::vector<Number> plain(const Batch<T, P>& b) {
    const Problem& p = b.problem;
    std::vector<Number> x, weight, y;
    for (int64_t i = 0; i < b.x.size(); ++i)
        x.push_back(static_cast<Number>(to_float(rounded_to<P>(to_float(b.x[i])))));
    for (int64_t i = 0; i < p.out * p.in; ++i) weight.push_back(static_cast<Number>(to_float(b.weight.data[i])));
    for (int64_t m = 0; m < p.rows; ++m) {
        for (int64_t n = 0; n < p.out; ++n) {
            Number sum = 0;
            for (int64_t k = 0; k < p.in; ++k)
                sum += x[static_cast<size_t>(m * p.in + k)] * weight[static_cast<size_t>(n * p.in + k)];
            if (p.bias == 1) sum += static_cast<Number>(to_float(b.bias[n]));
            if (p.bias == 2) sum += static_cast<Number>(b.wide_bias[n]);
            y.push_back(kept_as<T>(activated(p.activation, sum)));
        }
    }
    return y;
}

struct Expected {
    std::vector<float> peer;
    std::vector<double> truth;
};

// The definition takes longer than the kernel, and is the same for every instruction set and place.
template <typename T, typename P>
const Expected& expected_of(const Batch<T, P>& b) {
    static std::map<std::string, Expected> known;
    const auto [at, fresh] = known.try_emplace(b.problem.name());
    if (fresh) at->second = {plain<float>(b), plain<double>(b)};
    return at->second;
}

template <typename T, typename P>
void check_as(const Problem& p) {
    Note note(dtype_name<T>, " with panels of ", dtype_name<P>, ", ", p.name());
    const Batch<T, P> b(p);
    const auto& [peer, truth] = expected_of(b);
    CHECK_AS_GOOD(run(b), peer, truth, few_roundings(truth));
}

void check(const Problem& p) {
    check_as<float, float>(p);
    check_as<float, bf16>(p);
    check_as<bf16, float>(p);
    check_as<bf16, bf16>(p);
}

template <typename T, typename P>
void check_threads(const Problem& p) {
    Note note(dtype_name<T>, " with panels of ", dtype_name<P>, ", ", p.name());
    CHECK(round_up(p.out, panel_columns) / panel_columns * (p.in / 2) * (p.rows + 8) >= 65536);  // below, one thread
    const Batch<T, P> b(p);
    const Buffer<T> alone = run(b);
    CHECK_SAME_BITS(run(b, 3), alone);
}

// Every row among others has the bits that it has alone.
template <typename T, typename P>
void check_rows(const Problem& p) {
    Note note(dtype_name<T>, " with panels of ", dtype_name<P>, ", ", p.name());
    const Batch<T, P> together(p);
    const Buffer<T> found = run(together);
    Problem one = p;
    one.rows = 1;
    Batch<T, P> alone(one);
    std::copy(together.bias.data(), together.bias.data() + together.bias.size(), alone.bias.data());
    for (int64_t m = 0; m < p.rows; ++m) {
        Note note("row = ", m);
        std::copy(together.x.data() + m * p.in, together.x.data() + (m + 1) * p.in, alone.x.data());
        CHECK_SAME_BITS(run(alone), Buffer<T>(p.out, [&](int64_t n) { return found[m * p.out + n]; }));
    }
}

}  // namespace

TEST(pack_weight_lays_out_panels) {
    for (const auto& [out, in] : {std::pair<int64_t, int64_t>{1, 1},
                                  {3, 2},
                                  {63, 5},
                                  {64, 16},
                                  {65, 31},
                                  {130, 33},
                                  {7, 127},
                                  {0, 4},
                                  {4, 0},
                                  {257, 257}}) {
        for (const int64_t gap : {0, 3}) {
            check_layout<float, float>(out, in, gap);
            check_layout<bf16, float>(out, in, gap);
            check_layout<float, bf16>(out, in, gap);
            check_layout<bf16, bf16>(out, in, gap);
        }
    }
}

// Rows go in blocks of 64, four at a time, inputs in blocks of 32 units, outputs in panels of 64.
TEST(packed_linear_of_any_shape) {
    for (const int64_t rows : {0, 1, 2, 3, 4, 5, 7}) check({rows, 33, 70});
    for (const int64_t in : odd_sizes()) check({3, in, 5});
    for (const int64_t out : {1, 2, 15, 16, 17, 63, 64, 65, 127, 130}) check({2, 7, out});
    for (const int64_t rows : {63, 64, 65, 130}) check({rows, 65, 67});
    check({2, 5, 0});
}

TEST(packed_linear_with_any_bias_and_activation) {
    for (const Activation activation :
         {Activation::none, Activation::gelu, Activation::gelu_new, Activation::relu, Activation::silu})
        for (const int bias : {0, 1, 2}) check({3, 19, 77, activation, bias});
}

TEST(packed_linear_gives_the_same_bits_on_any_number_of_threads) {
    const Problem problem = {67, 257, 517};
    check_threads<float, float>(problem);
    check_threads<float, bf16>(problem);
    check_threads<bf16, float>(problem);
    check_threads<bf16, bf16>(problem);
}

TEST(packed_linear_keeps_rows_apart) {
    const Problem problem = {71, 131, 70, Activation::silu};
    check_rows<float, float>(problem);
    check_rows<float, bf16>(problem);
    check_rows<bf16, float>(problem);
    check_rows<bf16, bf16>(problem);
}
