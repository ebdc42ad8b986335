// rotary against its definition: a plain loop over channel pairs, sine and cosine in double of the angle in float32.
#include "cpu/dispatch.h"
#include "dtypes.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

// q and k are heads of one array [tokens][q_heads + k_heads][head_size + gap]; what lies in the gaps must not be read.
struct Problem {
    int64_t tokens, q_heads, k_heads, half, rest;  // head_size = 2 half + rest
    bool inverse = false;
    int64_t gap = 3;
    float position_scale = 1.0f;
    bool tokens_alike = false;

    int64_t head_size() const { return 2 * half + rest; }
    int64_t heads() const { return q_heads + k_heads; }
    int64_t stride() const { return head_size() + gap; }
    std::string name() const {
        return text("tokens = ", tokens, ", heads = ", q_heads, "+", k_heads, ", half = ", half, ", rest = ", rest,
                    ", inverse = ", inverse, ", position_scale = ", position_scale);
    }
};

template <typename T>
struct Batch {
    explicit Batch(const Problem& p)
        : problem(p),
          x(p.tokens * p.heads() > 0 ? p.tokens * p.heads() * p.stride() - p.gap : 0),
          positions(p.tokens,
                    [&](int64_t) {
                        return static_cast<int64_t>(p.position_scale * static_cast<float>(places.below(100000)));
                    }),
          inv_freq(p.half,
                   [&](int64_t i) { return std::pow(10000.0f, -static_cast<float>(i) / static_cast<float>(p.half)); }) {
        for (int64_t t = 0; t < p.tokens; ++t) {
            const bool fresh = t == 0 || !p.tokens_alike;
            if (!fresh) positions[t] = positions[0];
            for (int64_t h = 0; h < p.heads(); ++h)
                for (int64_t d = 0; d < p.head_size(); ++d)
                    x[place_of(t, h, d)] = fresh ? rounded_to<T>(random.normal()) : x[place_of(0, h, d)];
        }
    }
    int64_t place_of(int64_t t, int64_t h, int64_t d) const { return (t * problem.heads() + h) * problem.stride() + d; }

    Problem problem;
    Random random{7}, places{8};
    Buffer<T> x;
    Buffer<int64_t> positions;
    Buffer<float> inv_freq;
};

template <typename T>
struct Found {
    explicit Found(const Problem& p)
        : q(p.tokens * p.q_heads * p.head_size()), k(p.tokens * p.k_heads * p.head_size()) {}
    Buffer<T> q, k;
};

template <typename T>
Found<T> run(const Batch<T>& b, int threads = 1) {
    const Problem& p = b.problem;
    Found<T> found(p);
    const int64_t token = p.heads() * p.stride();
    const T* const k = b.x.size() > 0 ? b.x.data() + p.q_heads * p.stride() : nullptr;
    cpu().rotary(
        {b.x.data(), found.q.data(), p.q_heads, token, p.stride()}, {k, found.k.data(), p.k_heads, token, p.stride()},
        {b.positions.data(), b.inv_freq.data(), p.tokens, p.head_size(), p.half, p.inverse}, dtype_of<T>, threads);
    return found;
}

template <typename T>
void check_same_bits(const Found<T>& found, const Found<T>& expected) {
    CHECK_SAME_BITS(found.q, expected.q);
    CHECK_SAME_BITS(found.k, expected.k);
}

// Sine and cosine are rounded once (to 0.51 units), so are the two products and their sum, and then what is stored.
template <typename T>
void check_turned(T found, double a, double by_a, double b, double by_b) {
    const double expected = a * by_a + b * by_b, size = std::abs(a * by_a) + std::abs(b * by_b);
    const double own = is_bf16<T> ? rounding_of<T> * std::abs(expected) : 0;
    CHECK_NEAR(number(found), expected, 3.1 * float_rounding * size + own + least_normal);
}

template <typename T>
void check_as(const Problem& p) {
    Note note(dtype_name<T>, ", ", p.name());
    const Batch<T> b(p);
    const Found<T> found = run(b);
    for (int64_t t = 0; t < p.tokens; ++t) {
        for (int64_t h = 0; h < p.heads(); ++h) {
            const bool of_q = h < p.q_heads;
            const int64_t head = of_q ? t * p.q_heads + h : t * p.k_heads + h - p.q_heads;
            const T* const out = (of_q ? found.q : found.k).data() + head * p.head_size();
            const T* const x = b.x.data() + b.place_of(t, h, 0);
            for (int64_t i = 0; i < p.half; ++i) {
                const float angle = static_cast<float>(b.positions[t]) * b.inv_freq[i];
                const double sine = std::sin(static_cast<double>(angle)) * (p.inverse ? -1 : 1);
                const double cosine = std::cos(static_cast<double>(angle));
                const double first = number(x[i]), second = number(x[p.half + i]);
                check_turned(out[i], first, cosine, second, -sine);
                check_turned(out[p.half + i], second, cosine, first, sine);
            }
            for (int64_t i = 2 * p.half; i < p.head_size(); ++i) CHECK(std::memcmp(&out[i], &x[i], sizeof(T)) == 0);
        }
    }
}

void check(const Problem& problem) {
    check_as<float>(problem);
    check_as<bf16>(problem);
}

template <typename T>
void check_threads(const Problem& p) {
    Note note(dtype_name<T>, ", ", p.name());
    CHECK(p.tokens * p.heads() * p.head_size() >= 16384);  // below, one thread does it all
    const Batch<T> b(p);
    const Found<T> alone = run(b);
    check_same_bits(run(b, 3), alone);
}

// Large arrays are written past the caches: every token as it is alone.
template <typename T>
void check_large() {
    Note note(dtype_name<T>);
    const int64_t size = 256, tokens = (int64_t{16} << 20) / size / 4 / static_cast<int64_t>(sizeof(T));
    const Found<T> expected = run(Batch<T>({1, 4, 1, size / 2, 0, false, 0}));
    const Batch<T> many({tokens, 4, 1, size / 2, 0, false, 0, 1.0f, true});
    const Found<T> found = run(many, 3);
    const auto same = [&](const Buffer<T>& all, const Buffer<T>& row) {
        for (int64_t t = 0; t < tokens; ++t)
            CHECK(std::memcmp(all.data() + t * row.size(), row.data(), static_cast<size_t>(row.size()) * sizeof(T)) ==
                  0);
    };
    same(found.q, expected.q);
    same(found.k, expected.k);
}

}  // namespace

// 128 pairs are turned at a time.
TEST(rotary_of_any_head_size) {
    for (int64_t half : odd_sizes()) {
        if (half == 1023) half = 257;
        for (const int64_t rest : {0, 5}) check({3, 2, 1, half, rest, half % 2 == 0});
    }
    check({2, 1, 1, 128, 1});
    check({2, 1, 1, 129, 0});
}

TEST(rotary_of_any_number_of_tokens_and_heads) {
    check({0, 2, 1, 8, 0});
    check({1, 1, 1, 1, 0});
    check({37, 5, 3, 6, 1, true});
    check({4, 0, 2, 5, 0});
    check({4, 2, 0, 5, 0});
}

// Beyond 2^31 the angle is too large for the quick way.
TEST(rotary_of_large_positions) {
    for (const float scale : {-1.0f, 1000.0f, 1e6f, 1e12f}) check({9, 2, 1, 2 * width() + 1, 0, false, 1, scale});
}

TEST(rotary_gives_the_same_bits_on_any_number_of_threads) {
    check_threads<float>({301, 3, 2, 16, 3});
    check_threads<bf16>({301, 3, 2, 16, 3});
}

TEST(rotary_of_a_large_array) {
    if (place() != Place::page_end) return;
    check_large<float>();
    check_large<bf16>();
}
