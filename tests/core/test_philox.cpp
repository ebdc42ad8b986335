// Philox4x32-10: Random123's known answers, the textbook's rounds, and how a key and a counter become 62 bits.
#include "check.h"
#include "core/philox.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

struct Answer {
    Philox counter;
    uint32_t key[2];
    Philox result;
};

constexpr Answer known[] = {
    {{{0, 0, 0, 0}}, {0, 0}, {{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}}},
    {{{0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF}},
     {0xFFFFFFFF, 0xFFFFFFFF},
     {{0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}}},
    {{{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}},
     {0xA4093822, 0x299F31D0},
     {{0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}}},
};

}  // namespace

TEST(philox_gives_the_published_answers) {
    for (const Answer& each : known) {
        const Philox found = philox4x32(each.counter, each.key[0], each.key[1]);
        for (int i = 0; i < 4; ++i) CHECK_EQUAL(found.word[i], each.result.word[i]);
    }
}

TEST(keyed_bits_are_the_first_two_words_without_their_lowest_bit) {
    Random random(1);
    for (int i = 0; i < 1000; ++i) {
        uint32_t w[6];
        for (uint32_t& word : w) word = static_cast<uint32_t>(random.below(int64_t{1} << 32));
        const Philox drawn = philox4x32({{w[2], w[3], w[4], w[5]}}, w[0], w[1]);
        const uint64_t bits =
            keyed_bits62(w[0] + (uint64_t{w[1]} << 32), w[2] + (uint64_t{w[3]} << 32), w[4] + (uint64_t{w[5]} << 32));
        CHECK_EQUAL(bits >> 62, 0u);
        CHECK_EQUAL(bits >> 31, drawn.word[0] / 2);
        CHECK_EQUAL(bits % (uint64_t{1} << 31), drawn.word[1] / 2);
    }
}

// One bit of key or counter changes half the bits of the draw: 31 of 62, here within 6 standard deviations of the mean.
TEST(every_input_bit_reaches_the_draw) {
    const int bits = 64, draws = 64;
    for (int input = 0; input < 3; ++input) {
        for (int bit = 0; bit < bits; ++bit) {
            Note note("input ", input, ", bit ", bit);
            Random random(2);
            int changed = 0;
            for (int i = 0; i < draws; ++i) {
                uint64_t x[3];
                for (uint64_t& each : x) each = static_cast<uint64_t>(random.below(int64_t{1} << 62));
                const uint64_t before = keyed_bits62(x[0], x[1], x[2]);
                x[input] ^= uint64_t{1} << bit;
                changed += __builtin_popcountll(before ^ keyed_bits62(x[0], x[1], x[2]));
            }
            CHECK_NEAR(changed, 31.0 * draws, 6 * std::sqrt(62.0 * draws / 4));
        }
    }
}
