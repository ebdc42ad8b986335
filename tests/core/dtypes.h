// The dtypes that kernels take, as types: float for float32, bf16 for bfloat16.
#pragma once

#include <type_traits>

#include "buffer.h"
#include "check.h"

namespace core_tests {

template <typename T>
constexpr bool is_bf16 = std::is_same<T, pyrlhf::bf16>::value;

template <typename T>
constexpr pyrlhf::DType dtype_of = is_bf16<T> ? pyrlhf::DType::bfloat16 : pyrlhf::DType::float32;

template <typename T>
constexpr const char* dtype_name = is_bf16<T> ? "bfloat16" : "float32";

// Half a unit in the last place of 1: how much rounding to T changes a number at most, relative to it.
constexpr double float_rounding = 0x1p-24;
template <typename T>
constexpr double rounding_of = is_bf16<T> ? 0x1p-8 : 0x1p-24;

// avx512_bf16 rounds what is below the normal range to 0 (csrc/cpu/simd.h).
constexpr double least_normal = 0x1p-126;

template <typename T>
T rounded_to(float x) {
    if constexpr (is_bf16<T>)
        return to_bf16(x);
    else
        return x;
}

// x as an array of T holds it, in a Number; unchanged where Number is double: the truth is not rounded.
template <typename T, typename Number>
Number kept_as(Number x) {
    if constexpr (std::is_same<Number, float>::value)
        return pyrlhf::to_float(rounded_to<T>(x));
    else
        return x;
}

template <typename T>
Buffer<T> normals(int64_t size, Random& random, float scale = 1.0f, float mean = 0.0f,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return Buffer<T>(size, [&](int64_t) { return rounded_to<T>(mean + scale * random.normal()); }, file, line);
}

// The same again after `period` elements: a large array is soon made.
template <typename T>
Buffer<T> repeated_normals(int64_t size, int64_t period, Random& random, float scale = 1.0f, float mean = 0.0f) {
    std::vector<T> drawn;
    for (int64_t i = 0; i < std::min(size, period); ++i) drawn.push_back(rounded_to<T>(mean + scale * random.normal()));
    Buffer<T> out(size);
    for (int64_t from = 0; from < size; from += period)
        std::copy(drawn.begin(), drawn.begin() + std::min(period, size - from), out.data() + from);
    return out;
}

template <typename T>
void make_nan(Buffer<T>& x) {
    if (x.size() > 0) std::memset(x.data(), 0xFF, static_cast<size_t>(x.size()) * sizeof(T));
}

// What a plain loop in float32 may be off by luck less than another of the same quality: a few roundings of the largest
// number that is there.
template <typename Numbers>
double few_roundings(const Numbers& truth) {
    double largest = 0;
    for (const auto& x : truth) largest = std::max(largest, std::abs(number(x)));
    return 8 * float_rounding * largest + least_normal;
}

}  // namespace core_tests
