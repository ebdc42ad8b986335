// What a decode step counts: slots and lengths against the page table read token by token, draws in their places.
#include "cpu/dispatch.h"
#include "dtypes.h"

using namespace core_tests;
using namespace pyrlhf;

TEST(token_places_follow_the_table) {
    for (const int64_t page_size : {1, 3, 4, 32}) {
        constexpr int64_t tokens = 13, max_pages = 5;
        Random random(5);
        const Buffer<int32_t> table(tokens * max_pages,
                                    [&](int64_t) { return static_cast<int32_t>(random.below(99)); });
        const Buffer<int64_t> positions(tokens, [&](int64_t) { return random.below(max_pages * page_size); });
        Buffer<int64_t> slots(tokens);
        Buffer<int32_t> seq_lens(tokens);
        Buffer<int64_t> following(tokens);
        cpu().token_places(table.data(), max_pages, positions.data(), tokens, page_size, slots.data(), seq_lens.data(),
                           following.data());
        for (int64_t t = 0; t < tokens; ++t) {
            int64_t page = 0, place = positions[t];
            for (; place >= page_size; place -= page_size) ++page;
            CHECK_EQUAL(slots[t], table[t * max_pages + page] * page_size + place);
            CHECK_EQUAL(seq_lens[t], static_cast<int32_t>(positions[t] + 1));
            CHECK_EQUAL(following[t], positions[t] + 1);
        }
    }
}

TEST(note_draws_raises_every_counter_and_writes_nothing_else) {
    constexpr int64_t rows = 7, width = 5, untouched = -77;
    Random random(6);
    const Buffer<int64_t> drawn(rows, [&](int64_t r) { return r == 3 ? -1 : random.below(100); });
    const Buffer<float> drawn_logprobs(rows, [&](int64_t) { return random.normal(); });
    Buffer<int64_t> last(rows), positions(rows, [](int64_t r) { return 10 * r; });
    Buffer<int64_t> columns(rows, [](int64_t r) { return r % width - 1; });
    Buffer<int64_t> places(rows, [&](int64_t r) { return (rows - 1 - r) * width + columns[r]; });
    Buffer<int64_t> tokens(rows * width, [](int64_t) { return untouched; });
    Buffer<float> logprobs(rows * width, [](int64_t) { return static_cast<float>(untouched); });
    const Buffer<int64_t> ends(2, [&](int64_t e) { return e == 0 ? 100 : drawn[5]; });
    const bool ended = cpu().note_draws(drawn.data(), drawn_logprobs.data(), rows,
                                        {last.data(), positions.data(), columns.data(), places.data()}, ends.data(), 2,
                                        tokens.data(), logprobs.data());
    CHECK_EQUAL(ended, true);
    int64_t written = 0;
    for (int64_t i = 0; i < rows * width; ++i) written += tokens[i] != untouched;
    CHECK_EQUAL(written, rows);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = (rows - 1 - r) * width + r % width;
        CHECK_EQUAL(last[r], drawn[r] < 0 ? 0 : drawn[r]);
        CHECK_EQUAL(positions[r], 10 * r + 1);
        CHECK_EQUAL(columns[r], r % width);
        CHECK_EQUAL(places[r], place);
        CHECK_EQUAL(tokens[place], drawn[r]);
        CHECK_EQUAL(logprobs[place], drawn_logprobs[r]);
    }
}

TEST(embed_looks_rows_up_and_writes_nothing_for_a_bad_id) {
    constexpr int64_t count = 6, width = 37, rows = 5;
    Random random(7);
    const Buffer<float> table(count * width, [&](int64_t) { return random.normal(); });
    const Buffer<float> added(rows * width, [&](int64_t) { return random.normal(); });
    for (const int64_t bad : {-1, 2, 6}) {
        const Buffer<int64_t> ids(rows, [&](int64_t r) { return r == 3 ? bad : (r * 5) % count; });
        Buffer<float> out(rows * width, [](int64_t) { return -77.0f; });
        const EmbedArrays arrays = {table.data(), ids.data(), added.data(), out.data(), DType::float32};
        CHECK_EQUAL(cpu().embed(arrays, rows, width, count, 2), int64_t{bad == 2 ? -1 : 3});
        for (int64_t i = 0; i < rows * width; ++i)
            CHECK_EQUAL(out[i], bad == 2 ? table[ids[i / width] * width + i % width] + added[i] : -77.0f);
    }
}
