// transpose against two plain loops: every element in its new place, and the sums of the columns.
#include "buffer.h"
#include "check.h"
#include "cpu/dispatch.h"

using namespace core_tests;
using pyrlhf::bf16;
using pyrlhf::cpu;
using pyrlhf::DType;

namespace {

template <typename T>
T element(float x);
template <>
float element<float>(float x) {
    return x;
}
template <>
bf16 element<bf16>(float x) {
    return to_bf16(x);
}

template <typename T>
constexpr DType dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;

// rows by columns, `gap` unread elements after each row but the last.
template <typename T>
struct Matrix {
    Matrix(int64_t rows, int64_t columns, int64_t gap) : rows(rows), columns(columns), stride(columns + gap) {}
    const T& at(int64_t i, int64_t j) const { return elements[i * stride + j]; }

    int64_t rows, columns, stride;
    Random random{0};
    Buffer<T> elements{rows > 0 ? (rows - 1) * stride + columns : 0,
                       [this](int64_t) { return element<T>(random.normal() + 1.0f); }};
};

template <typename T>
struct Found {
    Found(const Matrix<T>& m, int threads, bool summed = true) : out(m.rows * m.columns), sums(m.columns) {
        cpu().transpose(m.elements.data(), dtype<T>, m.rows, m.columns, m.stride, out.data(),
                        summed ? sums.data() : nullptr, threads);
    }
    Buffer<T> out;
    Buffer<float> sums;
};

template <typename T>
std::vector<T> plain_transpose(const Matrix<T>& m) {
    std::vector<T> out;
    for (int64_t j = 0; j < m.columns; ++j)
        for (int64_t i = 0; i < m.rows; ++i) out.push_back(m.at(i, j));
    return out;
}

// No number is added into more than 64 others before its column's sum is done: W in a tile, 128 / W tiles, the blocks.
template <typename T>
void check_sums(const Matrix<T>& m, const Buffer<float>& sums) {
    for (int64_t j = 0; j < m.columns; ++j) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < m.rows; ++i) {
            const double x = static_cast<double>(pyrlhf::to_float(m.at(i, j)));
            sum += x;
            size += std::abs(x);
        }
        CHECK_NEAR(static_cast<double>(sums[j]), sum, 64 * 0x1p-24 * size);
    }
}

template <typename T>
void check(int64_t rows, int64_t columns, int64_t gap) {
    Note note("rows = ", rows, ", columns = ", columns, ", gap = ", gap, ", bytes = ", sizeof(T));
    const Matrix<T> matrix(rows, columns, gap);
    const Found<T> found(matrix, 1);
    CHECK_SAME_BITS(found.out, plain_transpose(matrix));
    check_sums(matrix, found.sums);
    CHECK_SAME_BITS(Found<T>(matrix, 1, false).out, found.out);
}

TEST(transpose_of_odd_sizes) {
    for (const int64_t rows : odd_sizes())
        for (const int64_t columns : odd_sizes()) {
            if (rows * columns > 200'000) continue;
            check<float>(rows, columns, 0);
            check<bf16>(rows, columns, 0);
        }
}

TEST(transpose_of_a_part_of_wider_rows) {
    for (const int64_t gap : {1, 5, 64}) {
        check<float>(33, 70, gap);
        check<bf16>(70, 33, gap);
    }
}

template <typename T>
void check_threads() {
    const Matrix<T> matrix(515, 391, 0);
    const Found<T> first(matrix, 1);
    for (const int threads : {2, 3, 4}) {
        Note note("threads = ", threads);
        const Found<T> found(matrix, threads);
        CHECK_SAME_BITS(found.out, first.out);
        CHECK_SAME_BITS(found.sums, first.sums);
    }
}

TEST(transpose_has_the_same_bits_on_any_number_of_threads) {
    check_threads<float>();
    check_threads<bf16>();
}

}  // namespace
