// A small harness for tests of csrc/ without Python. TEST registers a function; main.cpp calls every one of them once
// for each instruction set that this CPU has and each place that arrays can lie in (buffer.h). A check that fails says
// where, what was found and what was expected, and the test goes on. Write what varies inside a test into a Note.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace core_tests {

struct Test {
    const char *name, *file;
    int line;
    void (*run)();
    bool planted;  // wrong on purpose, and run only by --plant
};

std::vector<Test>& tests();
bool add(const Test& test);

void fail(const char* file, int line, const std::string& what);
void push_note(const std::string& text);
void pop_note();

template <typename... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    out.precision(9);
    (out << ... << parts);
    return out.str();
}

// Failures are reported with this text for as long as the Note lives: `Note note("n = ", n);`
class Note {
  public:
    template <typename... Parts>
    explicit Note(const Parts&... parts) {
        push_note(text(parts...));
    }
    ~Note() { pop_note(); }
    Note(const Note&) = delete;
    Note& operator=(const Note&) = delete;
};

int width();  // floats a vector of the instruction set in use
// What loops over vectors get wrong: nothing, less than a vector, whole vectors, one more or less, primes.
std::vector<int64_t> odd_sizes();

// {0, x[0], x[0] + x[1], ...}
inline std::vector<int32_t> running_sums(const std::vector<int64_t>& x) {
    std::vector<int32_t> out = {0};
    for (const int64_t each : x) out.push_back(out.back() + static_cast<int32_t>(each));
    return out;
}

// Deterministic numbers, the same on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
    float uniform(float low, float high) { return low + (high - low) * static_cast<float>(engine_() >> 40) * 0x1p-24f; }
    // A sum of uniform numbers: mean 0, variance 1, within 6.
    float normal() {
        float out = -6.0f;
        for (int i = 0; i < 12; ++i) out += uniform(0.0f, 1.0f);
        return out;
    }

  private:
    std::mt19937_64 engine_;
};

inline double number(double x) { return x; }
inline double number(pyrlhf::bf16 x) { return static_cast<double>(pyrlhf::to_float(x)); }

// Rounds to nearest, ties to even; not for NaN.
inline pyrlhf::bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

inline void check_near(const char* file, int line, double found, double expected, double tolerance) {
    if (found == expected || std::abs(found - expected) <= tolerance) return;  // the first for infinities; NaN fails
    fail(file, line, text("found ", found, ", expected ", expected, " within ", tolerance));
}

template <typename A, typename B>
void check_equal(const char* file, int line, const A& found, const B& expected) {
    if (!(found == expected)) fail(file, line, text("found ", found, ", expected ", expected));
}

template <typename A, typename B>
bool same_length(const char* file, int line, const A& found, const B& expected) {
    if (static_cast<int64_t>(found.size()) == static_cast<int64_t>(expected.size())) return true;
    fail(file, line, text("found ", found.size(), " elements, expected ", expected.size()));
    return false;
}

// The same bits in every element. The first that differs is shown.
template <typename A, typename B>
void check_same_bits(const char* file, int line, const A& found, const B& expected) {
    if (!same_length(file, line, found, expected)) return;
    for (int64_t i = 0; i < static_cast<int64_t>(found.size()); ++i) {
        const auto a = found[i];
        const decltype(a) b = expected[i];
        if (std::memcmp(&a, &b, sizeof(a)) == 0) continue;
        return fail(file, line, text("element ", i, ": found ", number(a), ", expected the bits of ", number(b)));
    }
}

// The rule for rounding: found errs at most twice as much as a plain loop in the same precision (peer), plus `tiny`.
template <typename A, typename B, typename C>
void check_as_good(const char* file, int line, const A& found, const B& peer, const C& truth, double tiny) {
    if (!same_length(file, line, found, truth) || !same_length(file, line, peer, truth)) return;
    double bound = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(truth.size()); ++i)
        bound = std::max(bound, std::abs(number(peer[i]) - number(truth[i])));
    bound = 2 * bound + tiny;
    for (int64_t i = 0; i < static_cast<int64_t>(truth.size()); ++i) {
        const double a = number(found[i]), b = number(truth[i]);
        if (a == b || std::abs(a - b) <= bound) continue;
        return fail(file, line, text("element ", i, ": found ", a, ", expected ", b, " within ", bound));
    }
}

}  // namespace core_tests

#define CORE_TESTS_ADD(name, planted)                                        \
    static void test_##name();                                               \
    [[maybe_unused]] static const bool added_##name =                        \
        core_tests::add({#name, __FILE__, __LINE__, &test_##name, planted}); \
    static void test_##name()
#define TEST(name) CORE_TESTS_ADD(name, false)
#define PLANT(name) CORE_TESTS_ADD(name, true)

#define CHECK(condition)                                                           \
    do {                                                                           \
        if (!(condition)) core_tests::fail(__FILE__, __LINE__, "not " #condition); \
    } while (false)
#define CHECK_EQUAL(found, expected) core_tests::check_equal(__FILE__, __LINE__, found, expected)
#define CHECK_NEAR(found, expected, tolerance) core_tests::check_near(__FILE__, __LINE__, found, expected, tolerance)
#define CHECK_SAME_BITS(found, expected) core_tests::check_same_bits(__FILE__, __LINE__, found, expected)
#define CHECK_AS_GOOD(found, peer, truth, tiny) core_tests::check_as_good(__FILE__, __LINE__, found, peer, truth, tiny)
