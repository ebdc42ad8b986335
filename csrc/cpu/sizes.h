// Arithmetic on sizes, and what one 32-bit unit of a product (tile.h) holds of each element type.
#pragma once

#include "cpu/tile.h"

namespace pyrlhf {
namespace PYRLHF_ISA {

PYRLHF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PYRLHF_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
// How many pieces of `size` it takes to hold n, and how much they hold.
PYRLHF_INLINE int64_t divide_up(int64_t n, int64_t size) { return (n + size - 1) / size; }
PYRLHF_INLINE int64_t round_up(int64_t n, int64_t size) { return divide_up(n, size) * size; }

// float32 itself, bfloat16 in pairs of neighbours along the sum.
template <typename T>
struct UnitOf;
template <>
struct UnitOf<float> {
    using type = float;
};
template <>
struct UnitOf<bf16> {
    using type = pair;
};
template <typename T>
using Unit = typename UnitOf<T>::type;
template <typename T>
constexpr int64_t per_unit = sizeof(Unit<T>) / sizeof(T);
// Units that n elements fill, the last one perhaps in part.
template <typename T>
PYRLHF_INLINE int64_t units(int64_t n) {
    return divide_up(n, per_unit<T>);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
