// The inner loop of every matrix product here: a tile of C, M rows by N vectors, stays in registers while k runs.
//
//   C[m][n] += sum over k, in order from 0, of A[m][k] * B[k][n]
//
// A is read one unit at a time and broadcast; B is read along n, whole vectors. A unit is what one 32-bit lane holds: a
// float, or a `pair`, two bfloat16 that are neighbours in k. Pairs multiply by vdpbf16ps where there is AVX512_BF16,
// and by two multiply-adds in float32 elsewhere; sums are float32 always. Each element's sum is one chain of additions
// in the order of k, so its bits depend on neither the tile that it falls in nor the number of rows and columns. The
// sum meets what C held once, at its end: a C that many products are added to is rounded once a product, not once a k.
#pragma once

#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {

// Two bfloat16, k even in the low half.
struct pair {
    uint32_t bits;
};

constexpr int tile_rows = 4;
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
constexpr int tile_vectors = 4;  // 16 of 32 registers hold C
#else
constexpr int tile_vectors = 2;  // 8 of 16
#endif

// Pairs of two rows that are neighbours in k, rounded to bfloat16.
#if defined(PYRLHF_ISA_avx512_bf16)
PYRLHF_INLINE vi to_pairs(vf even, vf odd) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);  // even's 16, then odd's
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vi)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)both);
}
#else
PYRLHF_INLINE vi to_pairs(vf even, vf odd) {
    return __builtin_convertvector(to_bf16(even), vi) | __builtin_convertvector(to_bf16(odd), vi) << 16;
}
#endif

// What a lane of a vector of units is held in.
PYRLHF_INLINE vf broadcast_unit(const float* a) { return broadcast(*a); }
PYRLHF_INLINE vi broadcast_unit(const pair* a) {
    int32_t bits;
    memcpy(&bits, a, sizeof(bits));
    return broadcast(bits);
}
PYRLHF_INLINE vf load_units(const float* b) { return load(b); }
PYRLHF_INLINE vi load_units(const pair* b) {
    vi out;
    memcpy(&out, b, sizeof(out));
    return out;
}
PYRLHF_INLINE void store_units(void* p, vi units) { memcpy(p, &units, sizeof(units)); }
PYRLHF_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
#if defined(PYRLHF_ISA_avx512_bf16)
PYRLHF_INLINE vf multiply_add(vi a, vi b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
#else
PYRLHF_INLINE vf multiply_add(vi a, vi b, vf c) {
    const vf odd = (vf)(a & -65536) * (vf)(b & -65536) + c;
    return (vf)(a << 16) * (vf)(b << 16) + odd;
}
#endif

// Where C comes from and goes to; k-th unit of A's row m: a + m * a_row + k * a_k; k-th row of B: b + k * b_row.
struct Strides {
    int64_t a_row, a_k, b_row, c_row;
};

template <int M, int N, typename Unit>
PYRLHF_INLINE void multiply_tile(vf (&c)[M][N], const Unit* a, const Unit* b, int64_t depth, const Strides& at) {
    for (int64_t k = 0; k < depth; ++k) {
        decltype(load_units(b)) column[N];
        for (int n = 0; n < N; ++n) column[n] = load_units(b + k * at.b_row + n * W);
        for (int m = 0; m < M; ++m) {
            const auto x = broadcast_unit(a + m * at.a_row + k * at.a_k);
            for (int n = 0; n < N; ++n) c[m][n] = multiply_add(x, column[n], c[m][n]);
        }
    }
}

// How a product meets what C holds: it replaces it, is added to it as a whole (a chain of additions of its own), or is
// added to C times one factor a column.
enum class Into { replace, add, scale_and_add };

// The factors from a column on; null stays null where there are none.
template <Into into>
PYRLHF_INLINE const float* factors_from(const float* factors, int64_t column) {
    return into == Into::scale_and_add ? factors + column : nullptr;
}

template <int M, int N, Into into, typename Unit>
PYRLHF_INLINE void one_tile(float* c, const Unit* a, const Unit* b, int64_t depth, const Strides& at,
                            const float* factors) {
    vf sums[M][N] = {};
    multiply_tile(sums, a, b, depth, at);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            float* const to = c + m * at.c_row + n * W;
            if (into == Into::add) sums[m][n] = load(to) + sums[m][n];
            if (into == Into::scale_and_add) sums[m][n] = load(to) * load(factors + n * W) + sums[m][n];
            store(to, sums[m][n]);
        }
}

template <int N, Into into, typename Unit>
PYRLHF_INLINE void tile_column(float* c, const Unit* a, const Unit* b, int64_t rows, int64_t depth, const Strides& at,
                               const float* factors) {
    const int64_t whole = rows - rows % tile_rows;
    for (int64_t m = 0; m < whole; m += tile_rows)
        one_tile<tile_rows, N, into>(c + m * at.c_row, a + m * at.a_row, b, depth, at, factors);
    for (int64_t m = whole; m < rows; ++m)
        one_tile<1, N, into>(c + m * at.c_row, a + m * at.a_row, b, depth, at, factors);
}

// C, `rows` by `vectors` * W, all in memory; factors, [vectors * W], only for Into::scale_and_add.
template <Into into, typename Unit>
static void multiply(float* c, const Unit* a, const Unit* b, int64_t rows, int64_t vectors, int64_t depth,
                     const Strides& at, const float* factors = nullptr) {
    const int64_t n = vectors - vectors % tile_vectors;
    for (int64_t i = 0; i < n; i += tile_vectors)
        tile_column<tile_vectors, into>(c + i * W, a, b + i * W, rows, depth, at, factors_from<into>(factors, i * W));
    const float* const last = factors_from<into>(factors, n * W);
    if (vectors - n == 1) tile_column<1, into>(c + n * W, a, b + n * W, rows, depth, at, last);
    if (vectors - n == 2) tile_column<2, into>(c + n * W, a, b + n * W, rows, depth, at, last);
    if (vectors - n == 3) tile_column<3, into>(c + n * W, a, b + n * W, rows, depth, at, last);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
