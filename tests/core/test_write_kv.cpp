// write_kv: every row of k and v is found, bit for bit, in the slot it was sent to, and nothing else is written.
#include "cpu/dispatch.h"
#include "dtypes.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

struct Problem {
    int64_t tokens, heads, dim, slots, gap = 0;  // elements of 2 bytes
};

void check(const Problem& p, int threads = 1) {
    Note note("tokens = ", p.tokens, ", heads = ", p.heads, ", dim = ", p.dim, ", gap = ", p.gap,
              ", threads = ", threads);
    using Element = uint16_t;
    constexpr int64_t bytes = sizeof(Element);
    Random random(4);
    // k and v with strides of their own; what lies in the gaps, as fresh memory, never reaches the cache.
    const int64_t head = p.dim + p.gap, k_token = p.heads * head + p.gap, v_head = p.tokens * head;
    const auto number = [&](int64_t) { return static_cast<Element>(random.below(0x6B00)); };
    const Buffer<Element> k(p.tokens * p.heads > 0 ? p.tokens * k_token - 2 * p.gap : 0, number);
    const Buffer<Element> v(p.tokens * p.heads > 0 ? p.heads * v_head - p.gap : 0, number);
    std::vector<int64_t> free(static_cast<size_t>(p.slots));
    for (size_t i = 0; i < free.size(); ++i) free[i] = static_cast<int64_t>(i);
    Buffer<int64_t> slots(p.tokens);
    const int64_t row = p.heads * p.dim;
    Buffer<Element> k_cache(p.slots * row), v_cache(p.slots * row), k_expected(p.slots * row),
        v_expected(p.slots * row);
    for (int64_t t = 0; t < p.tokens; ++t) {
        const int64_t taken = random.below(static_cast<int64_t>(free.size()));
        slots[t] = free[static_cast<size_t>(taken)];
        free.erase(free.begin() + taken);
        for (int64_t h = 0; h < p.heads; ++h) {
            for (int64_t d = 0; d < p.dim; ++d) {
                k_expected[slots[t] * row + h * p.dim + d] = k[t * k_token + h * head + d];
                v_expected[slots[t] * row + h * p.dim + d] = v[h * v_head + t * head + d];
            }
        }
    }
    cpu().write_kv(k.data(), v.data(), k_cache.data(), v_cache.data(), slots.data(),
                   {p.tokens, p.heads, p.dim * bytes, k_token * bytes, head * bytes, head * bytes, v_head * bytes},
                   threads);
    for (const auto& [found, expected] :
         {std::pair<const Buffer<Element>*, const Buffer<Element>*>{&k_cache, &k_expected}, {&v_cache, &v_expected}})
        CHECK(found->size() == 0 ||
              std::memcmp(found->data(), expected->data(), static_cast<size_t>(found->size() * bytes)) == 0);
}

}  // namespace

TEST(write_kv_of_any_size) {
    for (const int64_t dim : odd_sizes())
        for (const int64_t gap : {0, 3}) check({5, 3, dim, 11, gap});
    check({0, 2, 4, 3});
    check({1, 1, 1, 1});
    check({37, 1, 3, 37});
}

TEST(write_kv_on_any_number_of_threads) {
    for (const int threads : {1, 2, 3}) check({301, 4, 67, 400, 1}, threads);  // more than 128 KiB
}
