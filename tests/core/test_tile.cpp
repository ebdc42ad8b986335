// The building blocks of the kernels' inner loops (csrc/cpu/tile.h and simd.h) on every instruction set: products have
// the bits of one chain of additions an element, rounding is to nearest even, 2^x is as exact as it says.
#include <limits>

#include "buffer.h"
#include "check.h"
#include "cpu/dispatch.h"
#include "isa/building_blocks.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float quiet_nan = __builtin_nanf("");
constexpr float largest = std::numeric_limits<float>::max();
constexpr float least_normal = std::numeric_limits<float>::min();

const BuildingBlocks& blocks() {
#if defined(__x86_64__)
    if (isa() == "avx2") return avx2::building_blocks;
    if (isa() == "avx512") return avx512::building_blocks;
    if (isa() == "avx512_bf16") return avx512_bf16::building_blocks;
#endif
    return generic::building_blocks;
}

uint32_t bits_of(float x) {
    uint32_t out;
    std::memcpy(&out, &x, sizeof(out));
    return out;
}
float from_bits(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
}

// --- products ---

// Whether the compiler made one instruction of a * b + c: then the product, here 1 + 2^-11 + 2^-24, is not rounded.
bool fused() {
    const int64_t w = blocks().width;
    const Buffer<float> left(2, [](int64_t k) { return k == 0 ? -1.0f - 0x1p-11f : 1.0f + 0x1p-12f; });
    const Buffer<float> right(2 * w, [w](int64_t i) { return i < w ? 1.0f : 1.0f + 0x1p-12f; });
    Buffer<float> sums(w);
    blocks().multiply(into_replace, sums.data(), left.data(), right.data(), 1, 1, 2, {2, 1, w, w}, nullptr);
    CHECK(sums[0] == 0.0f || sums[0] == 0x1p-24f);
    return sums[0] != 0.0f;
}

float add_product(float sum, float a, float b, bool fused) { return fused ? std::fma(a, b, sum) : a * b + sum; }
// Products of bfloat16 are exact; odd comes first. No number here is so small that it would be flushed to zero.
float add_product(float sum, uint32_t a, uint32_t b, bool) {
    sum = from_bits(a & 0xFFFF0000u) * from_bits(b & 0xFFFF0000u) + sum;
    return from_bits(a << 16) * from_bits(b << 16) + sum;
}

void draw(Random& random, float& to) { to = random.normal(); }
void draw(Random& random, uint32_t& to) {
    const uint32_t even = to_bf16(random.normal()).bits;
    to = even | uint32_t{to_bf16(random.normal()).bits} << 16;
}

void run(int into, float* c, const float* a, const float* b, int64_t rows, int64_t vectors, int64_t depth,
         const TileStrides& at, const float* factors) {
    blocks().multiply(into, c, a, b, rows, vectors, depth, at, factors);
}
void run(int into, float* c, const uint32_t* a, const uint32_t* b, int64_t rows, int64_t vectors, int64_t depth,
         const TileStrides& at, const float* factors) {
    blocks().multiply_pairs(into, c, a, b, rows, vectors, depth, at, factors);
}

// One past the last of `rows` rows of `columns` elements.
int64_t extent(int64_t rows, int64_t row, int64_t columns, int64_t column) {
    return rows > 0 && columns > 0 ? (rows - 1) * row + (columns - 1) * column + 1 : 0;
}

// Where A lies along k (or else along the rows of C), and what lies between rows: it must not be read or written.
struct Layout {
    bool a_along_k;
    int64_t gap;
};

template <typename Unit>
void check_product(int into, int64_t rows, int64_t vectors, int64_t depth, const Layout& layout, bool is_fused) {
    Note note("rows = ", rows, ", vectors = ", vectors, ", depth = ", depth, ", into = ", into,
              ", A along k = ", layout.a_along_k, ", gap = ", layout.gap);
    const int64_t columns = vectors * width(), gap = layout.gap;
    const int64_t a_row = layout.a_along_k ? depth + gap : 1, a_k = layout.a_along_k ? 1 : rows + gap;
    const TileStrides at = {a_row, a_k, columns + gap, columns + 2 * gap};
    Random random(static_cast<uint64_t>(rows * 100 + vectors));
    Buffer<Unit> a(extent(rows, at.a_row, depth, at.a_k)), b(extent(depth, at.b_row, columns, 1));
    for (int64_t k = 0; k < depth; ++k) {
        for (int64_t m = 0; m < rows; ++m) draw(random, a[m * at.a_row + k * at.a_k]);
        for (int64_t n = 0; n < columns; ++n) draw(random, b[k * at.b_row + n]);
    }
    Buffer<float> c(extent(rows, at.c_row, columns, 1)), expected(c.size());
    const Buffer<float> factors(columns, [&random](int64_t) { return random.uniform(0.0f, 1.0f); });
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = 0; n < columns; ++n) {
            const int64_t i = m * at.c_row + n;
            if (into != into_replace) c[i] = random.normal();
            float sum = 0.0f;
            for (int64_t k = 0; k < depth; ++k)
                sum = add_product(sum, a[m * at.a_row + k * at.a_k], b[k * at.b_row + n], is_fused);
            if (into == into_add) sum = c[i] + sum;
            if (into == into_scale_and_add) sum = add_product(sum, c[i], factors[n], is_fused);
            expected[i] = sum;
        }
    }
    run(into, c.data(), a.data(), b.data(), rows, vectors, depth, at,
        into == into_scale_and_add ? factors.data() : nullptr);
    CHECK_SAME_BITS(c, expected);
}

// More rows and vectors than two tiles have, and fewer than one.
template <typename Unit>
void check_products() {
    const bool is_fused = fused();
    for (int64_t rows = 1; rows <= 9; ++rows)
        for (int64_t vectors = 1; vectors <= 9; ++vectors)
            for (const int into : {into_replace, into_add, into_scale_and_add})
                for (const Layout& layout : {Layout{true, 0}, Layout{false, 0}, Layout{true, 3}, Layout{false, 3}})
                    check_product<Unit>(into, rows, vectors, 2 * ((rows + vectors) % 4) + 1, layout, is_fused);
    for (const int64_t depth : {0, 2, 64, 129}) {
        check_product<Unit>(into_replace, 5, 3, depth, {true, 1}, is_fused);
        check_product<Unit>(into_scale_and_add, 3, 5, depth, {false, 1}, is_fused);
    }
    check_product<Unit>(into_add, 0, 3, 5, {true, 0}, is_fused);
    check_product<Unit>(into_add, 3, 0, 5, {true, 0}, is_fused);
}

// --- rounding to bfloat16 ---

// What the 65536 upper halves of a float are rounded with: exact, just off a tie, a tie, the largest.
constexpr uint32_t lower_halves[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};

// avx512_bf16 takes numbers below the normal range for 0, with their sign.
bool rounds_to(uint16_t found, float x, bool flushes) {
    if (std::isnan(x)) return std::isnan(to_float(bf16{found}));
    const uint16_t nearest = to_bf16(x).bits, zero = nearest & 0x8000;
    return found == nearest || (flushes && std::abs(x) < least_normal && found == zero);
}

void check_rounded(uint16_t found, float x, bool flushes) {
    if (rounds_to(found, x, flushes)) return;
    fail(__FILE__, __LINE__, text("found ", to_float(bf16{found}), " for ", x, ", bits ", bits_of(x)));
}

// --- 2^x ---

// The function a vector at a time; what is too little for a vector is filled with NaN.
std::vector<float> exp2_small(const std::vector<float>& x) {
    const int64_t w = width(), n = static_cast<int64_t>(x.size());
    Buffer<float> from((n + w - 1) / w * w), to(from.size());
    std::copy(x.begin(), x.end(), from.data());
    for (int64_t i = 0; i < from.size(); i += w) blocks().exp2_small(from.data() + i, to.data() + i);
    return std::vector<float>(to.data(), to.data() + n);
}

double units_in_the_last_place(double found, double exact) {
    return std::abs(found - exact) / std::ldexp(1.0, std::ilogb(exact) - 23);
}

Buffer<uint32_t> counted(int64_t n) {
    return Buffer<uint32_t>(n, [](int64_t i) { return 0x80000001u + static_cast<uint32_t>(i); });
}

}  // namespace

TEST(the_table_is_that_of_the_instruction_set_in_use) {
    CHECK_EQUAL(blocks().width, width());
    CHECK(blocks().tile_rows >= 1 && 2 * blocks().tile_rows < 9);
    CHECK(blocks().tile_vectors >= 1 && 2 * blocks().tile_vectors < 9);
}

TEST(a_product_of_floats_is_one_chain_of_additions) { check_products<float>(); }
TEST(a_product_of_pairs_is_one_chain_of_additions) { check_products<uint32_t>(); }

TEST(store_rounded_is_to_nearest_even) {
    const bool flushes = isa() == "avx512_bf16";
    for (const uint32_t lower : lower_halves) {
        const Buffer<float> from(65536,
                                 [lower](int64_t i) { return from_bits(static_cast<uint32_t>(i) << 16 | lower); });
        Buffer<bf16> to(from.size());
        for (int64_t i = 0; i < from.size(); i += width()) blocks().store_rounded(from.data() + i, to.data() + i);
        for (int64_t i = 0; i < to.size(); ++i) check_rounded(to[i].bits, from[i], flushes);
    }
}

TEST(to_pairs_is_to_nearest_even_with_even_in_the_low_half) {
    const bool flushes = isa() == "avx512_bf16";
    for (const uint32_t lower : lower_halves) {
        const Buffer<float> even(65536,
                                 [lower](int64_t i) { return from_bits(static_cast<uint32_t>(i) << 16 | lower); });
        const Buffer<float> odd(even.size(), [&even](int64_t i) { return 0.3f * even[65535 - i]; });
        Buffer<uint32_t> to(even.size());
        for (int64_t i = 0; i < even.size(); i += width())
            blocks().to_pairs(even.data() + i, odd.data() + i, to.data() + i);
        for (int64_t i = 0; i < to.size(); ++i) {
            check_rounded(static_cast<uint16_t>(to[i] & 0xFFFF), even[i], flushes);
            check_rounded(static_cast<uint16_t>(to[i] >> 16), odd[i], flushes);
        }
    }
}

TEST(exp2_small_is_within_2_3_ulp) {
    std::vector<float> x;
    for (int64_t i = 0; i <= 127 * 512; ++i) x.push_back(1.0f - static_cast<float>(i) / 512);
    Random random(3);
    for (int i = 0; i < 20000; ++i) x.push_back(random.uniform(-126.0f, 1.0f));
    for (int i = 0; i < 20000; ++i) x.push_back(-std::exp2(random.uniform(-140.0f, 6.9f)));
    const std::vector<float> found = exp2_small(x);
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        const double error = units_in_the_last_place(found[i], std::exp2(static_cast<double>(x[i])));
        if (!(error <= worst)) worst = error, at = i;
    }
    Note note("x = ", x[at], ", 2^x = ", found[at]);
    CHECK_NEAR(worst, 0, 2.3);
}

TEST(exp2_small_of_an_integer_is_exact) {
    std::vector<float> x;
    for (int n = 0; n <= 126; ++n) x.push_back(static_cast<float>(-n));
    x.push_back(-0.0f);
    const std::vector<float> found = exp2_small(x);
    for (size_t i = 0; i < x.size(); ++i) CHECK_EQUAL(found[i], std::exp2(x[i]));
}

// Between -126 and -150 an instruction set may give a number below the normal range, or 0; beyond, there is only 0.
TEST(exp2_small_ends_in_0) {
    std::vector<float> between, beyond = {-150.0f, -151.0f, -1000.0f, -12583039.0f, -1e10f, -largest, -infinity};
    for (float x = -126.0f; x > -150.0f; x -= 0.0625f) between.push_back(std::nextafter(x, -infinity));
    for (const float x : exp2_small(between)) CHECK(x >= 0.0f && x <= least_normal);
    for (const float x : exp2_small(beyond)) CHECK_EQUAL(bits_of(x), 0u);
}

TEST(exp2_small_keeps_nan_in_its_lane) {
    const int64_t w = width();
    for (int64_t lane = 0; lane < w; ++lane) {
        for (const float bad : {quiet_nan, -quiet_nan, from_bits(0x7F800001u)}) {
            std::vector<float> x(static_cast<size_t>(w), -1.0f);
            x[static_cast<size_t>(lane)] = bad;
            const std::vector<float> found = exp2_small(x);
            for (int64_t j = 0; j < w; ++j)
                CHECK(j == lane ? std::isnan(found[static_cast<size_t>(j)]) : found[static_cast<size_t>(j)] == 0.5f);
        }
    }
}

TEST(zip_takes_lanes_in_turn) {
    const int64_t w = width();
    const Buffer<uint32_t> a = counted(w), b(w, [](int64_t i) { return 1000u + static_cast<uint32_t>(i); });
    Buffer<uint32_t> found(2 * w);
    blocks().zip(a.data(), b.data(), found.data());
    CHECK_SAME_BITS(found, Buffer<uint32_t>(2 * w, [&](int64_t i) { return i % 2 ? b[i / 2] : a[i / 2]; }));
}

TEST(transpose_of_a_square) {
    const int64_t w = width();
    const Buffer<uint32_t> from = counted(w * w);
    Buffer<uint32_t> found(w * w);
    blocks().transpose_square(from.data(), found.data());
    CHECK_SAME_BITS(found, Buffer<uint32_t>(w * w, [&](int64_t i) { return from[i % w * w + i / w]; }));
}

TEST(transpose_of_rows_that_lie_apart) {
    const int64_t w = width();
    for (const int64_t rows : {int64_t{0}, w, 2 * w, 3 * w}) {
        for (const int64_t columns : {int64_t{0}, w, 3 * w}) {
            for (const int64_t gap : {0, 5}) {
                Note note("rows = ", rows, ", columns = ", columns, ", gap = ", gap);
                const int64_t row = columns + gap, to_row = rows + 2 * gap;
                const Buffer<uint32_t> from = counted(extent(rows, row, columns, 1));
                const Buffer<float> floats(from.size(), [&from](int64_t i) { return from_bits(from[i]); });
                Buffer<uint32_t> found(extent(columns, to_row, rows, 1)), expected(found.size());
                Buffer<float> found_floats(found.size()), expected_floats(found.size());
                for (int64_t r = 0; r < rows; ++r) {
                    for (int64_t c = 0; c < columns; ++c) {
                        expected[c * to_row + r] = from[r * row + c];
                        expected_floats[c * to_row + r] = floats[r * row + c];
                    }
                }
                blocks().transpose_pairs(from.data(), row, rows, columns, found.data(), to_row);
                blocks().transpose(floats.data(), row, rows, columns, found_floats.data(), to_row);
                CHECK_SAME_BITS(found, expected);
                CHECK_SAME_BITS(found_floats, expected_floats);
            }
        }
    }
}
