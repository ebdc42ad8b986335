// attention and attention_backward against their definition: plain loops over every query and the keys that it sees.
#include <limits>
#include <map>
#include <utility>

#include "buffer.h"
#include "check.h"
#include "cpu/dispatch.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

constexpr int64_t everything = std::numeric_limits<int64_t>::max();  // a window that hides nothing

using Range = std::pair<int32_t, int32_t>;

struct Problem {
    std::vector<int64_t> lengths;
    int64_t heads = 1, kv_heads = 1, dim = 1;
    bool causal = true;
    int64_t window = everything;
    std::vector<Range> prefixes = {};  // one a sequence, or none at all
    float scale = 0.5f;

    int64_t tokens() const { return running_sums(lengths).back(); }
    std::string name() const {
        std::string out =
            text("heads = ", heads, "/", kv_heads, ", dim = ", dim, ", causal = ", causal, ", scale = ", scale);
        if (window != everything) out += text(", window = ", window);
        out += ", lengths =";
        for (const int64_t length : lengths) out += text(" ", length);
        for (const auto& [start, end] : prefixes) out += text(" [", start, ", ", end, ")");
        return out;
    }
};

// How q, k and v lie in memory. What lies between their elements must not be read: it is NaN, as fresh memory is.
enum class Layout { contiguous, one_buffer, heads_first, with_gaps };
constexpr Layout layouts[] = {Layout::contiguous, Layout::one_buffer, Layout::heads_first, Layout::with_gaps};

template <typename T>
struct View {
    T* data;
    int64_t token, head;
    T& at(int64_t t, int64_t h, int64_t d) const { return data[t * token + h * head + d]; }
};

float as(float x, float) { return x; }
bf16 as(float x, bf16) { return to_bf16(x); }

template <typename T>
struct Batch {
    Batch(const Problem& p, Layout layout = Layout::contiguous)
        : problem(p),
          cu(running_sums(p.lengths)),
          prefix(static_cast<int64_t>(2 * p.prefixes.size())),
          grad_out(p.tokens() * p.heads * p.dim) {
        const int64_t tokens = p.tokens(), dim = p.dim, all = p.heads + 2 * p.kv_heads;
        if (layout == Layout::one_buffer) memory.emplace_back(tokens * all * dim);
        int64_t before = 0;  // heads
        for (View<T>* each : {&q, &k, &v}) {
            const int64_t heads = each == &q ? p.heads : p.kv_heads, row = heads * (dim + 3) + 5;
            switch (layout) {
                case Layout::contiguous:
                    memory.emplace_back(tokens * heads * dim);
                    *each = {memory.back().data(), heads * dim, dim};
                    break;
                case Layout::one_buffer:
                    *each = {memory[0].data() + before * dim, all * dim, dim};
                    break;
                case Layout::heads_first:
                    memory.emplace_back(tokens * heads * dim);
                    *each = {memory.back().data(), dim, tokens * dim};
                    break;
                case Layout::with_gaps:
                    memory.emplace_back(tokens > 0 ? (tokens - 1) * row + (heads - 1) * (dim + 3) + dim : 0);
                    *each = {memory.back().data(), row, dim + 3};
                    break;
            }
            before += heads;
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t h = 0; h < heads; ++h)
                    for (int64_t d = 0; d < dim; ++d) each->at(t, h, d) = as(random.normal(), T{});
        }
        for (int64_t i = 0; i < grad_out.size(); ++i) grad_out[i] = as(random.normal(), T{});
        for (size_t s = 0; s < p.prefixes.size(); ++s) {
            prefix[static_cast<int64_t>(2 * s)] = p.prefixes[s].first;
            prefix[static_cast<int64_t>(2 * s + 1)] = p.prefixes[s].second;
        }
    }

    const int32_t* prefixes() const { return problem.prefixes.empty() ? nullptr : prefix.data(); }

    Problem problem;
    Random random{11};
    Buffer<int32_t> cu, prefix;
    Buffer<T> grad_out;
    std::vector<Buffer<T>> memory;
    View<T> q, k, v;
};

// Everything that the kernels write.
template <typename T>
struct Found {
    explicit Found(const Problem& p)
        : out(p.tokens() * p.heads * p.dim),
          lse(p.heads * p.tokens()),
          grad_q(out.size()),
          grad_k(p.tokens() * p.kv_heads * p.dim),
          grad_v(grad_k.size()) {}
    Buffer<T> out;
    Buffer<float> lse;
    Buffer<T> grad_q, grad_k, grad_v;
};

template <typename T>
AttentionShape shape_of(const Batch<T>& b) {
    const Problem& p = b.problem;
    const int64_t sequences = static_cast<int64_t>(p.lengths.size());
    return {p.tokens(), sequences, p.heads,   p.kv_heads, p.dim,    b.q.token, b.q.head,
            b.k.token,  b.k.head,  b.v.token, b.v.head,   p.window, p.scale,   p.causal};
}

template <typename T>
bool forward(const Batch<T>& b, Found<T>& found, int threads) {
    const DType dtype = sizeof(T) == sizeof(bf16) ? DType::bfloat16 : DType::float32;
    return cpu().attention(b.q.data, b.k.data, b.v.data, b.cu.data(), b.prefixes(), found.out.data(), found.lse.data(),
                           shape_of(b), dtype, threads);
}

template <typename T>
bool backward(const Batch<T>& b, Found<T>& found, int threads) {
    const DType dtype = sizeof(T) == sizeof(bf16) ? DType::bfloat16 : DType::float32;
    const AttentionGrads grads = {b.grad_out.data(),   found.out.data(),    found.lse.data(),
                                  found.grad_q.data(), found.grad_k.data(), found.grad_v.data()};
    return cpu().attention_backward(grads, b.q.data, b.k.data, b.v.data, b.cu.data(), b.prefixes(), shape_of(b), dtype,
                                    threads);
}

template <typename T>
Found<T> run(const Batch<T>& batch, int threads = 1) {
    Found<T> found(batch.problem);
    CHECK(forward(batch, found, threads));
    CHECK(backward(batch, found, threads));
    return found;
}

template <typename T>
void check_same_bits(const Found<T>& found, const Found<T>& expected) {
    CHECK_SAME_BITS(found.out, expected.out);
    CHECK_SAME_BITS(found.lse, expected.lse);
    CHECK_SAME_BITS(found.grad_q, expected.grad_q);
    CHECK_SAME_BITS(found.grad_k, expected.grad_k);
    CHECK_SAME_BITS(found.grad_v, expected.grad_v);
}

// --- the definition ---

template <typename Number>
struct Results {
    std::vector<Number> out, lse, grad_q, grad_k, grad_v;
};

// The packed rows that query `i` of sequence s sees.
std::vector<int64_t> seen_by(const Problem& p, const std::vector<int32_t>& cu, size_t s, int64_t i) {
    std::vector<int64_t> rows;
    if (!p.prefixes.empty())
        for (int64_t row = p.prefixes[s].first; row < p.prefixes[s].second; ++row) rows.push_back(row);
    for (int64_t j = 0; j < p.lengths[s]; ++j)
        if (!p.causal || (j <= i && i - j < p.window)) rows.push_back(cu[s] + j);
    return rows;
}

// The elements of a view, [tokens][heads][dim].
template <typename Number, typename T>
std::vector<Number> numbers(const View<T>& view, int64_t tokens, int64_t heads, int64_t dim) {
    std::vector<Number> out;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t d = 0; d < dim; ++d) out.push_back(static_cast<Number>(to_float(view.at(t, h, d))));
    return out;
}

template <typename Number>
Number dot(const Number* a, const Number* b, int64_t n) {
    Number out = 0;
    for (int64_t d = 0; d < n; ++d) out += a[d] * b[d];
    return out;
}

template <typename Number>
Number dot_from_the_end(const Number* a, const Number* b, int64_t n) {
    Number out = 0;
    for (int64_t d = n - 1; d >= 0; --d) out += a[d] * b[d];
    return out;
}

// softmax(scale q k) v and its gradients, in Number. Where T is bfloat16 and `rounded`, probabilities, the gradients of
// scores and all results are rounded to it. As everywhere, the backward makes the probabilities again from the
// logarithm of their sum, and what it subtracts from grad_out v was added up in another order.
template <typename Number, typename T>
Results<Number> plain(const Batch<T>& batch, bool rounded) {
    const Problem& p = batch.problem;
    const int64_t tokens = p.tokens(), dim = p.dim;
    const Number scale = static_cast<Number>(p.scale);
    const auto round = [&](Number x) {
        return rounded ? static_cast<Number>(to_float(as(static_cast<float>(x), T{}))) : x;
    };
    const std::vector<Number> q = numbers<Number>(batch.q, tokens, p.heads, dim);
    const std::vector<Number> k = numbers<Number>(batch.k, tokens, p.kv_heads, dim);
    const std::vector<Number> v = numbers<Number>(batch.v, tokens, p.kv_heads, dim);
    const View<T> of_grad = {batch.grad_out.data(), p.heads * dim, dim};
    const std::vector<Number> grad_out = numbers<Number>(of_grad, tokens, p.heads, dim);
    Results<Number> r;
    r.lse.resize(static_cast<size_t>(p.heads * tokens));
    for (std::vector<Number>* each : {&r.out, &r.grad_q}) each->resize(q.size());
    for (std::vector<Number>* each : {&r.grad_k, &r.grad_v}) each->resize(k.size());

    // One query that sees these rows.
    const auto attend = [&](int64_t t, int64_t h, const std::vector<int64_t>& rows) {
        const int64_t own = (t * p.heads + h) * dim, group = p.heads / p.kv_heads;
        const auto place_of = [&](int64_t row) { return (row * p.kv_heads + h / group) * dim; };
        std::vector<Number> scores;
        for (const int64_t row : rows) scores.push_back(dot(&q[own], &k[place_of(row)], dim) * scale);
        const Number top = *std::max_element(scores.begin(), scores.end());
        Number total = 0;
        for (const Number score : scores) total += std::exp(score - top);
        const Number lse = r.lse[h * tokens + t] = top + std::log(total);
        Number* const out = &r.out[own];
        for (size_t j = 0; j < rows.size(); ++j) {
            const Number weight = round(std::exp(scores[j] - top) / total);
            for (int64_t d = 0; d < dim; ++d) out[d] += weight * v[place_of(rows[j]) + d];
        }
        for (int64_t d = 0; d < dim; ++d) out[d] = round(out[d]);
        const Number* const grad = &grad_out[own];
        const Number delta = dot_from_the_end(grad, static_cast<const Number*>(out), dim);
        for (size_t j = 0; j < rows.size(); ++j) {
            const int64_t at = place_of(rows[j]);
            const Number weight = std::exp(scores[j] - lse);
            const Number grad_score = round(weight * (dot(grad, &v[at], dim) - delta));
            for (int64_t d = 0; d < dim; ++d) {
                r.grad_q[own + d] += grad_score * k[at + d] * scale;
                r.grad_k[at + d] += grad_score * q[own + d] * scale;
                r.grad_v[at + d] += round(weight) * grad[d];
            }
        }
    };
    const std::vector<int32_t> cu = running_sums(p.lengths);
    for (size_t s = 0; s < p.lengths.size(); ++s) {
        for (int64_t i = 0; i < p.lengths[s]; ++i) {
            const std::vector<int64_t> rows = seen_by(p, cu, s, i);
            for (int64_t h = 0; h < p.heads; ++h) attend(cu[s] + i, h, rows);
        }
    }
    for (std::vector<Number>* each : {&r.grad_q, &r.grad_k, &r.grad_v})
        for (Number& x : *each) x = round(x);
    return r;
}

struct Expected {
    Results<float> peer;
    Results<double> truth;
};

// The definition takes longer than the kernels, and is the same for every instruction set and place.
template <typename T>
const Expected& expected_of(const Batch<T>& batch) {
    static std::map<std::string, Expected> known;
    const auto [at, fresh] = known.try_emplace(batch.problem.name());
    if (fresh) at->second = {plain<float>(batch, true), plain<double>(batch, false)};
    return at->second;
}

template <typename T>
void check_as(const Problem& problem, Layout layout, int threads) {
    Note note(sizeof(T) == sizeof(bf16) ? "bfloat16, " : "float32, ", problem.name());
    const Batch<T> batch(problem, layout);
    const Found<T> found = run(batch, threads);
    const auto& [peer, truth] = expected_of(batch);
    CHECK_AS_GOOD(found.out, peer.out, truth.out, 1e-6);
    CHECK_AS_GOOD(found.lse, peer.lse, truth.lse, 1e-6);
    CHECK_AS_GOOD(found.grad_q, peer.grad_q, truth.grad_q, 1e-6);
    CHECK_AS_GOOD(found.grad_k, peer.grad_k, truth.grad_k, 1e-6);
    CHECK_AS_GOOD(found.grad_v, peer.grad_v, truth.grad_v, 1e-6);
}

void check(const Problem& problem, Layout layout = Layout::with_gaps, int threads = 1) {
    check_as<float>(problem, layout, threads);
    check_as<bf16>(problem, layout, threads);
}

const std::vector<int64_t> ragged = {0, 1, 63, 64, 65, 127, 128, 129, 300, 0};

}  // namespace

TEST(attention_of_nothing) {
    check({{}, 2, 1, 5});
    check({{0, 0}, 2, 1, 5});
    check({{0, 0}, 2, 1, 5, true, everything, {{0, 0}, {0, 0}}});
}

TEST(attention_of_ragged_sequences) {
    check({ragged, 2, 1, 16, true});
    check({ragged, 1, 1, 5, false});
    check({std::vector<int64_t>(1000, 2), 1, 1, 3, true});
}

TEST(attention_with_any_head_size) {
    for (const int64_t dim : {1, 3, 4, 16, 33, 64, 80, 128, 256}) {
        const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
        check({{66, 0, 1, 7}, 2, 1, dim, true, everything, {}, scale});
        check({{1, 1, 1, 1, 1, 1, 1, 1}, 2, 1, dim, true, everything, {}, scale});
    }
}

TEST(attention_with_grouped_queries) {
    for (const int64_t group : {1, 2, 5})
        for (const bool causal : {false, true}) check({{1, 129, 65}, 3 * group, 3, 8, causal});
}

TEST(attention_through_a_window) {
    for (const int64_t window : {1, 2, 64, 65, 1000}) check({{300, 129, 1, 0, 64}, 2, 2, 4, true, window});
}

TEST(attention_with_any_scale) {
    for (const float scale : {0.0f, -0.0f, -1.3f, 2.5f, 1e-3f})
        for (const bool causal : {false, true}) check({{200, 3}, 4, 2, 6, causal, everything, {}, scale});
    check({{200, 3}, 4, 2, 6, true, 40, {}, 0.0f});
    check({{200, 3}, 4, 2, 6, true, 40, {}, -2.0f});
}

TEST(attention_to_a_prefix) {
    const struct {
        std::vector<int64_t> lengths;
        std::vector<Range> prefixes;
    } cases[] = {
        {{130, 5, 0, 64, 65}, {{0, 0}, {0, 130}, {0, 130}, {0, 130}, {0, 130}}},        // answers to one prompt
        {{5, 70, 64, 130}, {{139, 269}, {139, 269}, {139, 269}, {0, 0}}},               // before it
        {{70, 20, 9, 66}, {{3, 3}, {10, 50}, {64, 70}, {69, 70}}},                      // a part of it; an empty range
        {{30, 0, 65, 40, 0, 7}, {{0, 0}, {0, 0}, {0, 0}, {20, 95}, {1, 2}, {0, 135}}},  // several sequences
        {{40, 33, 20, 50, 7}, {{93, 100}, {0, 0}, {0, 40}, {0, 0}, {75, 90}}},          // chains, others between them
        {{9, 70}, {{9, 79}, {0, 9}}},                                                   // each sees the other
        {{3, 3, 3, 3}, {{11, 12}, {0, 0}, {0, 0}, {3, 6}}},
    };
    for (const auto& [lengths, prefixes] : cases)
        for (const bool causal : {true, false}) check({lengths, 2, 1, 5, causal, everything, prefixes});
}

// Gradients of keys are added up in chunks of 2048 rows of queries, at most 8 of them.
TEST(attention_of_a_long_sequence) {
    if (place() != Place::page_end) return;
    check({{1100, 30}, 2, 1, 3});
    check({{3000, 7}, 4, 1, 2, true, 70});
    check({{600, 700, 10}, 2, 1, 3, true, everything, {{0, 0}, {500, 600}, {0, 1}}});
}

TEST(attention_gives_the_same_bits_wherever_q_k_and_v_lie) {
    const Problem problems[] = {{{66, 0, 3}, 4, 2, 5}, {{66, 0, 3}, 5, 1, 33, false}, {{66, 0, 3}, 3, 3, 64, true, 9}};
    for (const Problem& problem : problems) {
        Note note(problem.name());
        const Found<float> floats = run(Batch<float>(problem));
        const Found<bf16> halves = run(Batch<bf16>(problem));
        for (const Layout layout : layouts) {
            Note note("layout ", static_cast<int>(layout));
            check_same_bits(run(Batch<float>(problem, layout)), floats);
            check_same_bits(run(Batch<bf16>(problem, layout)), halves);
        }
    }
}

TEST(attention_gives_the_same_bits_on_any_number_of_threads) {
    if (place() != Place::heap) return;
    const Problem problems[] = {
        {{300, 0, 70, 129, 1, 64}, 4, 2, 16},
        {{1500, 20}, 2, 1, 8, true, 100},
        {{200, 60, 40, 90, 300}, 4, 2, 16, true, everything, {{0, 0}, {0, 200}, {0, 200}, {0, 0}, {250, 390}}},
    };
    for (const Problem& problem : problems) {
        Note note(problem.name());
        CHECK(problem.tokens() * problem.heads * problem.dim >= 16384);  // below, one thread does it all
        const Batch<float> floats(problem);
        const Batch<bf16> halves(problem);
        const Found<float> alone = run(floats, 1);
        const Found<bf16> halves_alone = run(halves, 1);
        for (const int threads : {2, 3}) {
            Note note("threads = ", threads);
            check_same_bits(run(floats, threads), alone);
            check_same_bits(run(halves, threads), halves_alone);
        }
    }
}

namespace {

template <typename T>
void make_nan(Buffer<T>& x) {
    std::memset(x.data(), 0xFF, static_cast<size_t>(x.size()) * sizeof(T));
}

// Copies the sequences and heads of `from` into `to`, from this row and these heads on.
template <typename T>
void put(const Batch<T>& from, Batch<T>& to, int64_t row, int64_t head, int64_t kv_head) {
    const Problem &p = from.problem, &all = to.problem;
    for (int64_t t = 0; t < p.tokens(); ++t) {
        for (int64_t d = 0; d < p.dim; ++d) {
            for (int64_t h = 0; h < p.heads; ++h) {
                to.q.at(row + t, head + h, d) = from.q.at(t, h, d);
                to.grad_out[((row + t) * all.heads + head + h) * p.dim + d] =
                    from.grad_out[(t * p.heads + h) * p.dim + d];
            }
            for (int64_t h = 0; h < p.kv_heads; ++h) {
                to.k.at(row + t, kv_head + h, d) = from.k.at(t, h, d);
                to.v.at(row + t, kv_head + h, d) = from.v.at(t, h, d);
            }
        }
    }
}

// What was found for those sequences and heads.
template <typename T>
Found<T> cut(const Found<T>& from, const Problem& all, const Problem& p, int64_t row, int64_t head, int64_t kv_head) {
    Found<T> out(p);
    for (int64_t t = 0; t < p.tokens(); ++t) {
        for (int64_t h = 0; h < p.heads; ++h) {
            out.lse[h * p.tokens() + t] = from.lse[(head + h) * all.tokens() + row + t];
            for (int64_t d = 0; d < p.dim; ++d) {
                const int64_t at = ((row + t) * all.heads + head + h) * p.dim + d, to = (t * p.heads + h) * p.dim + d;
                out.out[to] = from.out[at];
                out.grad_q[to] = from.grad_q[at];
            }
        }
        for (int64_t h = 0; h < p.kv_heads; ++h) {
            for (int64_t d = 0; d < p.dim; ++d) {
                const int64_t at = ((row + t) * all.kv_heads + kv_head + h) * p.dim + d;
                out.grad_k[(t * p.kv_heads + h) * p.dim + d] = from.grad_k[at];
                out.grad_v[(t * p.kv_heads + h) * p.dim + d] = from.grad_v[at];
            }
        }
    }
    return out;
}

// `own` among neighbours that are all NaN.
template <typename T>
void check_among(const Problem& own, const std::vector<int64_t>& before, const std::vector<int64_t>& after) {
    Problem all = own;
    all.lengths = before;
    all.lengths.insert(all.lengths.end(), own.lengths.begin(), own.lengths.end());
    all.lengths.insert(all.lengths.end(), after.begin(), after.end());
    const int32_t row = running_sums(before).back();
    if (!own.prefixes.empty()) {
        all.prefixes.assign(before.size(), {0, 0});
        for (const auto& [start, end] : own.prefixes) all.prefixes.emplace_back(start + row, end + row);
        all.prefixes.resize(all.lengths.size(), {0, 0});
    }
    Note note(sizeof(T) == sizeof(bf16) ? "bfloat16, " : "float32, ", all.name());
    const Batch<T> alone(own);
    Batch<T> packed(all);
    for (Buffer<T>& each : packed.memory) make_nan(each);
    make_nan(packed.grad_out);
    put(alone, packed, row, 0, 0);
    check_same_bits(cut(run(packed), all, own, row, 0, 0), run(alone));
}

// Many lengths and heads at once against each length and head alone.
template <typename T>
void check_one_by_one(const Problem& problem) {
    Note note(sizeof(T) == sizeof(bf16) ? "bfloat16, " : "float32, ", problem.name());
    Batch<T> packed(problem);
    std::vector<Batch<T>> parts;
    const std::vector<int32_t> cu = running_sums(problem.lengths);
    const auto each_part = [&](auto visit) {
        size_t number = 0;
        for (size_t s = 0; s < problem.lengths.size(); ++s)
            for (int64_t kv = 0; kv < problem.kv_heads; ++kv) visit(number++, cu[s], kv);
    };
    const int64_t group = problem.heads / problem.kv_heads;
    Problem one = problem;
    one.heads = group;
    one.kv_heads = 1;
    each_part([&](size_t number, int64_t row, int64_t kv) {
        one.lengths = {problem.lengths[number / static_cast<size_t>(problem.kv_heads)]};
        parts.emplace_back(one);
        put(parts.back(), packed, row, kv * group, kv);
    });
    const Found<T> together = run(packed, 1);
    each_part([&](size_t number, int64_t row, int64_t kv) {
        Note note("row = ", row, ", key head = ", kv);
        check_same_bits(cut(together, problem, parts[number].problem, row, kv * group, kv), run(parts[number]));
    });
}

}  // namespace

TEST(attention_keeps_sequences_apart) {
    const Problem problems[] = {
        {{37}, 1, 1, 33},
        {{37}, 4, 2, 16, false},
        {{70}, 2, 1, 13, true, 5},
        {{20, 5, 66}, 2, 1, 13, true, everything, {{0, 0}, {0, 20}, {3, 20}}},
        {{5, 66, 70}, 2, 1, 4, false, everything, {{71, 141}, {0, 5}, {0, 0}}},
    };
    for (const Problem& problem : problems) {
        for (const auto& [before, after] :
             {std::pair<std::vector<int64_t>, std::vector<int64_t>>{{1}, {}}, {{3, 5, 0}, {64}}, {{130}, {1, 2}}}) {
            check_among<float>(problem, before, after);
            check_among<bf16>(problem, before, after);
        }
    }
}

// The gradients of keys and values are kept for 8 MiB of them a thread at a time: here several sequences and heads fit,
// then one of them alone is more than that.
TEST(attention_in_several_waves) {
    if (place() != Place::page_end || isa() != isas_available().back()) return;
    check_one_by_one<float>({{6000, 3000, 6000}, 3, 3, 16, true, 2});
    check_one_by_one<bf16>({{16384}, 2, 2, 20, true, 2});
}

#if !defined(__SANITIZE_ADDRESS__)  // which ends the program when malloc is asked for too much
TEST(attention_says_that_memory_ran_out) {
    const Batch<float> batch({{3, 4}, 2, 1, 256});
    Found<float> found(batch.problem);
    const int threads = std::numeric_limits<int>::max();  // each needs scratch memory of its own
    CHECK(!forward(batch, found, threads));
    CHECK(forward(batch, found, 1));
    CHECK(!backward(batch, found, threads));
    CHECK(backward(batch, found, 1));
}
#endif
