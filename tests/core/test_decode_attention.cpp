// decode_attention against its definition: plain loops over every row, head and token that it sees.
#include <limits>
#include <map>

#include "cpu/dispatch.h"
#include "dtypes.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

constexpr int64_t everything = std::numeric_limits<int64_t>::max();  // a window that hides nothing
constexpr float infinity = std::numeric_limits<float>::infinity();

struct Problem {
    std::vector<int64_t> lengths;  // one a row
    int64_t heads = 1, kv_heads = 1, dim = 1, page_size = 16;
    int64_t window = everything;
    int64_t gap = 3;  // between heads and rows of q

    int64_t rows() const { return static_cast<int64_t>(lengths.size()); }
    int64_t pages_of(int64_t length) const { return (length + page_size - 1) / page_size; }
    int64_t max_pages() const {  // one more than any row has
        int64_t most = 0;
        for (const int64_t length : lengths) most = std::max(most, pages_of(length));
        return most + 1;
    }
    int64_t pages() const {  // one that belongs to no row
        int64_t all = 1;
        for (const int64_t length : lengths) all += pages_of(length);
        return all;
    }
    float scale() const { return 1.0f / std::sqrt(static_cast<float>(dim)); }
    std::string name() const {
        std::string out = text("heads = ", heads, "/", kv_heads, ", dim = ", dim, ", page_size = ", page_size);
        if (window != everything) out += text(", window = ", window);
        out += ", lengths =";
        for (const int64_t length : lengths) out += text(" ", length);
        return out;
    }
};

// What no row may read is NaN, as fresh memory is: gaps in q, slots past the end of a row, a page of nobody. In the
// page table it is a page that does not exist.
template <typename T>
struct Batch {
    explicit Batch(const Problem& p)
        : problem(p),
          q(p.rows() > 0 ? p.rows() * row() - 2 * p.gap : 0),
          k(p.pages() * p.page_size * p.kv_heads * p.dim),
          v(k.size()),
          table(p.rows() * p.max_pages()),
          lengths(p.rows(), [&](int64_t b) { return static_cast<int32_t>(p.lengths[static_cast<size_t>(b)]); }) {
        std::vector<int32_t> free;
        for (int32_t page = 0; page < p.pages(); ++page) free.push_back(page);
        for (int64_t b = 0; b < p.rows(); ++b) {
            for (int64_t page = 0; page < p.pages_of(lengths[b]); ++page) {
                const int64_t taken = random.below(static_cast<int64_t>(free.size()));
                table[b * p.max_pages() + page] = free[static_cast<size_t>(taken)];
                free.erase(free.begin() + taken);
            }
            for (int64_t h = 0; h < p.heads; ++h)
                for (int64_t d = 0; d < p.dim; ++d) q[query(b, h) + d] = rounded_to<T>(random.normal());
            for (int64_t t = 0; t < lengths[b]; ++t) {
                for (int64_t h = 0; h < p.kv_heads; ++h) {
                    for (int64_t d = 0; d < p.dim; ++d) {
                        k[place_of(b, t, h) + d] = rounded_to<T>(random.normal());
                        v[place_of(b, t, h) + d] = rounded_to<T>(random.normal());
                    }
                }
            }
        }
    }
    int64_t row() const { return problem.heads * (problem.dim + problem.gap) + problem.gap; }
    int64_t query(int64_t b, int64_t h) const { return b * row() + h * (problem.dim + problem.gap); }
    int64_t place_of(int64_t b, int64_t t, int64_t kv_head) const {
        const Problem& p = problem;
        const int64_t page = table[b * p.max_pages() + t / p.page_size];
        return ((page * p.page_size + t % p.page_size) * p.kv_heads + kv_head) * p.dim;
    }

    Problem problem;
    Random random{13};
    Buffer<T> q, k, v;
    Buffer<int32_t> table, lengths;
};

template <typename T>
Buffer<T> run(const Batch<T>& b, int threads = 1) {
    const Problem& p = b.problem;
    Buffer<T> out(p.rows() * p.heads * p.dim);
    const DecodeShape shape = {p.rows(),      p.heads, p.kv_heads,    p.dim,    p.page_size,
                               p.max_pages(), b.row(), p.dim + p.gap, p.window, p.scale()};
    CHECK(cpu().decode_attention(b.q.data(), b.k.data(), b.v.data(), b.table.data(), b.lengths.data(), out.data(),
                                 shape, dtype_of<T>, threads));
    return out;
}

// A row that sees nothing is 0.
template <typename Number, typename T>
std::vector<Number> plain(const Batch<T>& b) {
    const Problem& p = b.problem;
    const auto of = [](T x) { return static_cast<Number>(to_float(x)); };
    std::vector<Number> out;
    for (int64_t row = 0; row < p.rows(); ++row) {
        const int64_t length = b.lengths[row], first = p.window < length ? length - p.window : 0;
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t kv_head = h / (p.heads / p.kv_heads);
            std::vector<Number> scores;
            for (int64_t t = first; t < length; ++t) {
                Number sum = 0;
                for (int64_t d = 0; d < p.dim; ++d)
                    sum += of(b.q[b.query(row, h) + d]) * of(b.k[b.place_of(row, t, kv_head) + d]);
                scores.push_back(sum * static_cast<Number>(p.scale()));
            }
            Number top = -std::numeric_limits<Number>::max(), total = 0;
            for (const Number score : scores) top = std::max(top, score);
            for (const Number score : scores) total += std::exp(score - top);
            for (int64_t d = 0; d < p.dim; ++d) {
                Number sum = 0;
                for (int64_t t = first; t < length; ++t)
                    sum += std::exp(scores[static_cast<size_t>(t - first)] - top) *
                           of(b.v[b.place_of(row, t, kv_head) + d]);
                out.push_back(kept_as<T>(length > first ? sum / total : 0));
            }
        }
    }
    return out;
}

struct Expected {
    std::vector<float> peer;
    std::vector<double> truth;
};

// The definition takes longer than the kernel, and is the same for every instruction set and place.
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
    const auto& [peer, truth] = expected_of(b);
    CHECK_AS_GOOD(run(b), peer, truth, few_roundings(truth));
}

void check(const Problem& p) {
    check_as<float>(p);
    check_as<bf16>(p);
}

template <typename T>
void check_threads(const Problem& p) {
    Note note(dtype_name<T>, ", ", p.name());
    const Batch<T> b(p);
    const Buffer<T> alone = run(b);
    CHECK_SAME_BITS(run(b, 3), alone);
    CHECK_SAME_BITS(run(b, 16), alone);  // the key heads of a chunk are shared out where there are few chunks
}

// A row among others has the bits that it has alone, wherever its pages lie.
template <typename T>
void check_rows(const Problem& p) {
    Note note(dtype_name<T>, ", ", p.name());
    const Batch<T> together(p);
    const Buffer<T> found = run(together);
    for (int64_t row = 0; row < p.rows(); ++row) {
        Note note("row = ", row);
        Problem one = p;
        one.lengths = {p.lengths[static_cast<size_t>(row)]};
        Batch<T> alone(one);
        const auto copy = [&](const Buffer<T>& from, int64_t at, Buffer<T>& to, int64_t place) {
            std::copy(from.data() + at, from.data() + at + p.dim, to.data() + place);
        };
        for (int64_t h = 0; h < p.heads; ++h) copy(together.q, together.query(row, h), alone.q, alone.query(0, h));
        for (int64_t t = 0; t < one.lengths[0]; ++t) {
            for (int64_t h = 0; h < p.kv_heads; ++h) {
                copy(together.k, together.place_of(row, t, h), alone.k, alone.place_of(0, t, h));
                copy(together.v, together.place_of(row, t, h), alone.v, alone.place_of(0, t, h));
            }
        }
        const int64_t size = p.heads * p.dim;
        CHECK_SAME_BITS(run(alone), Buffer<T>(size, [&](int64_t i) { return found[row * size + i]; }));
    }
}

}  // namespace

TEST(decode_attention_of_ragged_rows) {
    check({{}, 2, 1, 5});
    check({{0, 0}, 2, 1, 5});
    check({{1, 0, 63, 64, 65, 127, 200}, 2, 1, 16});
    check({{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}, 1, 1, 3});
}

TEST(decode_attention_with_any_head_size) {
    for (const int64_t dim : {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 127, 128, 129, 255, 256})
        check({{35, 1, 66}, 2, 1, dim});
}

TEST(decode_attention_with_grouped_queries) {
    for (const int64_t group : {1, 2, 3, 4, 5, 8, 9}) check({{5, 70}, 3 * group, 3, 9});
}

TEST(decode_attention_with_any_page_size) {
    for (const int64_t page_size : {1, 2, 3, 16, 64, 65, 100}) check({{130, 7, 64}, 2, 2, 6, page_size});
}

TEST(decode_attention_through_a_window) {
    for (const int64_t window : {0, 1, 2, 63, 64, 65, 511, 513}) check({{600, 64, 1, 0}, 2, 1, 4, 16, window});
}

// The tokens of a row go in chunks of 512.
TEST(decode_attention_of_long_rows) {
    check({{511, 512, 513}, 2, 1, 8});
    check({{1500, 3}, 2, 2, 5, 7});
    check({{1500, 1100}, 1, 1, 5, 64, 700});
}

TEST(decode_attention_gives_the_same_bits_on_any_number_of_threads) {
    for (const Problem& problem : {Problem{{700, 0, 1030, 65}, 6, 3, 33}, Problem{{513}, 8, 4, 64, 16, 400}}) {
        check_threads<float>(problem);
        check_threads<bf16>(problem);
    }
}

TEST(decode_attention_keeps_rows_apart) {
    const Problem problem = {{0, 1, 65, 520, 64}, 5, 1, 19, 5};
    check_rows<float>(problem);
    check_rows<bf16>(problem);
}

// A score of -infinity is a probability of 0 for that token and changes no other.
TEST(decode_attention_to_a_score_of_minus_infinity) {
    const Problem p = {{70}, 1, 1, 2 * width() + 1};
    Batch<float> b(p);
    for (int64_t d = 0; d < p.dim; ++d) b.q[b.query(0, 0) + d] = std::abs(b.q[b.query(0, 0) + d]) + 0.1f;
    for (const int64_t token : {0, 33, 66})
        for (int64_t d = 0; d < p.dim; ++d) b.k[b.place_of(0, token, 0) + d] = -infinity;
    const std::vector<double> truth = plain<double>(b);
    CHECK_AS_GOOD(run(b), plain<float>(b), truth, few_roundings(truth));
}
