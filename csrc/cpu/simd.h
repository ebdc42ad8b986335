// Vectors of the instruction set this file is compiled for, in the compiler's own vector types: one source for SSE2,
// AVX2, AVX-512 and NEON. Everything lives in namespace pyrlhf::PYRLHF_ISA.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#    include <immintrin.h>
#endif

#include "core/dtype.h"
#include "core/exp.h"
#include "core/rotary.h"

namespace pyrlhf {
namespace PYRLHF_ISA {

#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
constexpr int W = 16;  // floats a vector
#elif defined(PYRLHF_ISA_avx2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef float vf_half __attribute__((vector_size(2 * W)));
typedef double vd __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

#define PYRLHF_INLINE static inline __attribute__((always_inline))

PYRLHF_INLINE vf broadcast(float x) { return x - vf{}; }
PYRLHF_INLINE vi broadcast(int32_t x) { return x - vi{}; }

PYRLHF_INLINE vf load(const float* p) {
    vf out;
    memcpy(&out, p, sizeof(out));
    return out;
}
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
constexpr __mmask16 all_lanes = 0xFFFF;  // GCC 12 warns of its own unmasked intrinsics
#endif
PYRLHF_INLINE vf from_bf16(vh raw) {
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    return (vf)((vu)_mm512_maskz_cvtepu16_epi32(all_lanes, (__m256i)raw) << 16);
#elif defined(PYRLHF_ISA_avx2)
    return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)raw) << 16);
#else
    return (vf)(__builtin_convertvector(raw, vi) << 16);
#endif
}
PYRLHF_INLINE vf load(const bf16* p) {
    vh raw;
    memcpy(&raw, p, sizeof(raw));
    return from_bf16(raw);
}
// The first n < W elements; the rest is `fill`.
template <typename T>
PYRLHF_INLINE vf load_first(const T* p, int n, float fill) {
    vf out = broadcast(fill);
    for (int j = 0; j < n; ++j) out[j] = to_float(p[j]);
    return out;
}
PYRLHF_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof(x)); }
PYRLHF_INLINE void store_first(float* p, vf x, int n) {
    for (int j = 0; j < n; ++j) p[j] = x[j];
}

// NaN in x stays.
PYRLHF_INLINE vf clamp(vf x, vf low, vf high) { return x < low ? low : (x > high ? high : x); }
PYRLHF_INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }
PYRLHF_INLINE bool any(vi mask) {
    int64_t words[W / 2], out = 0;
    memcpy(words, &mask, sizeof(words));
    for (int64_t word : words) out |= word;
    return out != 0;
}

PYRLHF_INLINE double sum(vf x) {
    double out = 0;
    for (int j = 0; j < W; ++j) out += static_cast<double>(x[j]);
    return out;
}
// Running sums in double, W / 2 lanes: float sums are folded in before their own rounding shows.
PYRLHF_INLINE void add_to(vd& total, vf x) {
    vf_half halves[2];
    memcpy(halves, &x, sizeof(x));
    total += __builtin_convertvector(halves[0], vd) + __builtin_convertvector(halves[1], vd);
}
PYRLHF_INLINE double sum(vd x) {
    double out = 0;
    for (int j = 0; j < W / 2; ++j) out += x[j];
    return out;
}
PYRLHF_INLINE int64_t sum(vi x) {
    int64_t out = 0;
    for (int j = 0; j < W; ++j) out += x[j];
    return out;
}
// {x[K], x[K+1], ..., fill...}: the elements move K places towards 0.
template <int K, int... J>
PYRLHF_INLINE vf shift_down_by(vf x, vf fill, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(x, fill, (J + K)...);
#else
    return __builtin_shuffle(x, fill, vi{(J + K)...});  // GCC before 12 has only this one
#endif
}
template <int K>
PYRLHF_INLINE vf shift_down(vf x, vf fill) {
    return shift_down_by<K>(x, fill, std::make_integer_sequence<int, W>{});
}

PYRLHF_INLINE vi lane_numbers() {
    vi out = {};
    for (int j = 0; j < W; ++j) out[j] = j;
    return out;
}

// Lane l becomes x[l ^ S].
template <int S, int... J>
PYRLHF_INLINE vf swap_lanes_by(vf x, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(x, x, (J ^ S)...);
#else
    return __builtin_shuffle(x, vi{(J ^ S)...});
#endif
}
template <int S>
PYRLHF_INLINE vf swap_lanes(vf x) {
    return swap_lanes_by<S>(x, std::make_integer_sequence<int, W>{});
}

// In every lane, the largest and the sum of the lanes of its segment of D.
template <int D>
PYRLHF_INLINE vf largest_of_segment(vf x) {
    if constexpr (D > 1) {
        x = largest_of_segment<D / 2>(x);
        const vf other = swap_lanes<D / 2>(x);
        x = other > x ? other : x;
    }
    return x;
}
template <int D>
PYRLHF_INLINE vf sum_of_segment(vf x) {
    if constexpr (D > 1) {
        x = sum_of_segment<D / 2>(x);
        x += swap_lanes<D / 2>(x);
    }
    return x;
}
PYRLHF_INLINE float largest(vf x) { return largest_of_segment<W>(x)[0]; }

// Nearest integer, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
PYRLHF_INLINE vf round_small(vf x) { return (x + 12582912.0f) - 12582912.0f; }

// e^x within 2 ulp; 0 and infinity beyond the float range, NaN stays NaN. `rest` becomes e^x - 1 - x, free of
// cancellation. x = n ln 2 + r, |r| <= ln 2 / 2: e^r by core/exp.h, 2^n applied in two factors so that it never
// overflows alone.
PYRLHF_INLINE vf exp_and_rest(vf x, vf& rest) {
    const vf bounded = x < -104.0f ? broadcast(-104.0f) : (x > 89.0f ? broadcast(89.0f) : x);
    const vf n = round_small(bounded * per_ln2);
    const vf r = (bounded - n * ln2_high) - n * ln2_low;
    const vf tail = exp_tail(r);  // e^r - 1 - r
    const vi exponent = __builtin_convertvector(n, vi);
    const vi half = exponent >> 1;
    const vf result = ((tail + r) + 1.0f) * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
    rest = exponent == 0 ? tail : (result - 1.0f) - x;
    return result;
}
PYRLHF_INLINE vf exp(vf x) {
    vf rest;
    return exp_and_rest(x, rest);
}

// log(1 + u) for u in [0, 1], to relative precision: 2 atanh(u / (2 + u)), whose argument is at most 1/3.
PYRLHF_INLINE vf log1p_unit(vf u) {
    const vf s = u / (u + 2.0f);
    const vf q = s * s;
    vf p = broadcast(1.0f / 17);
    p = p * q + 1.0f / 15;
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}

// 2^x for x <= 0 (or a little above): within 2.3 ulp down to x = -126, 2.04 where multiplications and additions fuse.
// Below that, where 2^x is no normal number any more, AVX-512 gives the subnormal numbers and then 0, others 0 from
// -126.5 on. 0 for -infinity, NaN stays NaN. x = n + r, |r| <= 1/2; 2^r by a polynomial fitted to relative error.
PYRLHF_INLINE vf exp2_fraction(vf r) {
    vf p = broadcast(1.32647273e-3f);
    p = p * r + 9.67151299e-3f;
    p = p * r + 5.55073358e-2f;
    p = p * r + 2.40222424e-1f;
    p = p * r + 6.93147004e-1f;
    return p * r + 1.0f;
}
PYRLHF_INLINE vf exp2_small(vf x) {
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    // For -infinity x - n is NaN, and scalef of NaN by -infinity is 0.
    const __m512 n = _mm512_maskz_roundscale_ps(all_lanes, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vf)_mm512_maskz_scalef_ps(all_lanes, (__m512)exp2_fraction(x - (vf)n), n);
#else
    // Adding the magic number, 1.5 * 2^23 + 127, leaves n with the exponent's bias in the low bits.
    const vf bounded = x < -127.0f ? broadcast(-127.0f) : x;
    const vf shifted = bounded + 12583039.0f;
    return exp2_fraction(bounded - (shifted - 12583039.0f)) * (vf)((vi)shifted << 23);
#endif
}

// Transposing: zip(a, b) = a0 b0 a1 b1 ..., its first and its second half.
template <bool high, int... J>
PYRLHF_INLINE vi zip_by(vi a, vi b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (J / 2 + (J % 2 ? W : 0) + (high ? W / 2 : 0))...);
#else
    return __builtin_shuffle(a, b, vi{(J / 2 + (J % 2 ? W : 0) + (high ? W / 2 : 0))...});
#endif
}
PYRLHF_INLINE vi zip_low(vi a, vi b) { return zip_by<false>(a, b, std::make_integer_sequence<int, W>{}); }
PYRLHF_INLINE vi zip_high(vi a, vi b) { return zip_by<true>(a, b, std::make_integer_sequence<int, W>{}); }

// W rows of W 32-bit lanes, in place: log2(W) rounds that each zip the first half of the rows with the second.
PYRLHF_INLINE void transpose(vi (&rows)[W]) {
    vi other[W];
    for (int round = 1; round < W; round *= 2) {
        for (int i = 0; i < W / 2; ++i) {
            other[2 * i] = zip_low(rows[i], rows[i + W / 2]);
            other[2 * i + 1] = zip_high(rows[i], rows[i + W / 2]);
        }
        for (int i = 0; i < W; ++i) rows[i] = other[i];
    }
}
// to[c * to_row + r] = from[r * from_row + c] for 32-bit elements; rows and columns are multiples of W.
template <typename Unit>
PYRLHF_INLINE void transpose(const Unit* from, int64_t from_row, int64_t rows, int64_t columns, Unit* to,
                             int64_t to_row) {
    static_assert(sizeof(Unit) == 4, "32-bit lanes");
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            vi block[W];
            for (int j = 0; j < W; ++j) memcpy(&block[j], from + (r + j) * from_row + c, sizeof(vi));
            transpose(block);
            for (int j = 0; j < W; ++j) memcpy(to + (c + j) * to_row + r, &block[j], sizeof(vi));
        }
}

// Lane l of the result is the sum of row l % D over the segment of D lanes in which l lies. row(i) gives the i-th of
// the D rows. Each round adds neighbours S lanes apart, of one row in the lanes where l & S is 0, of another elsewhere.
template <int S, int... J>
PYRLHF_INLINE vf add_neighbours(vf a, vf b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (J & S ? J + W : J)...) +
           __builtin_shufflevector(a, b, (J & S ? (J ^ S) + W : J ^ S)...);
#else
    return __builtin_shuffle(a, b, vi{(J & S ? J + W : J)...}) +
           __builtin_shuffle(a, b, vi{(J & S ? (J ^ S) + W : J ^ S)...});
#endif
}
template <int D, typename Row>
PYRLHF_INLINE vf sum_segments(Row row, int first = 0) {
    if constexpr (D == 1)
        return row(first);
    else
        return add_neighbours<D / 2>(sum_segments<D / 2>(row, first), sum_segments<D / 2>(row, first + D / 2),
                                     std::make_integer_sequence<int, W>{});
}

// In every lane, the sum of the lanes at its place in all segments of D.
template <int D>
PYRLHF_INLINE vf sum_across_segments(vf x) {
    if constexpr (D < W) {
        x = sum_across_segments<2 * D>(x);
        x += swap_lanes<D>(x);
    }
    return x;
}

// In every lane, lane `of` of its segment of D.
template <int D>
PYRLHF_INLINE vf spread(vf x, int of) {
    const vi from = (lane_numbers() & -D) + of;
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    return (vf)_mm512_maskz_permutexvar_ps(all_lanes, (__m512i)from, (__m512)x);
#elif defined(PYRLHF_ISA_avx2)
    return (vf)_mm256_permutevar8x32_ps((__m256)x, (__m256i)from);
#else
    vf out;
    for (int j = 0; j < W; ++j) out[j] = x[from[j]];
    return out;
#endif
}

// --- For element-wise and row-wise kernels: rows of any length, bf16 out, stores past the caches, functions ---

typedef int64_t vl __attribute__((vector_size(4 * W)));

// How much of a vector is in use: all of it, or the first n < W lanes.
struct Whole {};
struct Part {
    int n;
};

// f(first element, Whole{} or Part{n}) for the vectors that n elements fill. A lambda given here is PYRLHF_LAMBDA: the
// compiler might call it for every vector otherwise.
#define PYRLHF_LAMBDA __attribute__((always_inline))
template <typename F>
PYRLHF_INLINE void for_vectors(int64_t n, F f) {
    int64_t j = 0;
    for (; j + W <= n; j += W) f(j, Whole{});
    if (j < n) f(j, Part{static_cast<int>(n - j)});
}

// Lanes that are not in use become 0.
PYRLHF_INLINE vf used(vf x, Whole) { return x; }
PYRLHF_INLINE vf used(vf x, Part part) { return (vf)((vi)x & (lane_numbers() < part.n)); }

#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
PYRLHF_INLINE __mmask16 mask_of(Part part) { return static_cast<__mmask16>((1u << part.n) - 1); }
#endif

// Lanes that are not in use read 0; their memory is not touched.
PYRLHF_INLINE vf load(const float* p, Whole) { return load(p); }
PYRLHF_INLINE vf load(const bf16* p, Whole) { return load(p); }
PYRLHF_INLINE vf load(const float* p, Part part) {
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    return (vf)_mm512_maskz_loadu_ps(mask_of(part), p);
#elif defined(PYRLHF_ISA_avx2)
    return (vf)_mm256_maskload_ps(p, (__m256i)(lane_numbers() < part.n));
#else
    vf out = {};
    memcpy(&out, p, sizeof(float) * static_cast<size_t>(part.n));
    return out;
#endif
}
PYRLHF_INLINE vf load(const bf16* p, Part part) {
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    const vh raw = (vh)_mm256_maskz_loadu_epi16(mask_of(part), p);
#else
    vh raw = {};
    memcpy(&raw, p, sizeof(bf16) * static_cast<size_t>(part.n));
#endif
    return from_bf16(raw);
}

// The nearest bf16, ties to even; NaN stays NaN. (AVX512_BF16's own conversion turns what is below 2^-126 into 0.)
PYRLHF_INLINE vh to_bf16(vf x) {
#if defined(PYRLHF_ISA_avx512_bf16)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    const vu bits = (vu)x;
    const vu above = x == x ? bits + 0x7FFFu + ((bits >> 16) & 1u) : bits | 0x00400000u;
#    if defined(PYRLHF_ISA_avx512)
    return (vh)_mm512_maskz_cvtepi32_epi16(all_lanes, (__m512i)(above >> 16));
#    else
    return __builtin_convertvector(above >> 16, vh);
#    endif
#endif
}
// x as an array of T holds it.
template <typename T>
PYRLHF_INLINE vf rounded(vf x) {
    if constexpr (sizeof(T) == sizeof(bf16)) return from_bf16(to_bf16(x));
    return x;
}

PYRLHF_INLINE void store(float* p, vf x, Whole) { store(p, x); }
PYRLHF_INLINE void store(float* p, vf x, Part part) {
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    _mm512_mask_storeu_ps(p, mask_of(part), (__m512)x);
#elif defined(PYRLHF_ISA_avx2)
    _mm256_maskstore_ps(p, (__m256i)(lane_numbers() < part.n), (__m256)x);
#else
    memcpy(p, &x, sizeof(float) * static_cast<size_t>(part.n));
#endif
}
PYRLHF_INLINE void store(bf16* p, vf x, Whole) {
    const vh bits = to_bf16(x);
    memcpy(p, &bits, sizeof(bits));
}
PYRLHF_INLINE void store(bf16* p, vf x, Part part) {
    const vh bits = to_bf16(x);
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    _mm256_mask_storeu_epi16(p, mask_of(part), (__m256i)bits);
#else
    memcpy(p, &bits, sizeof(bf16) * static_cast<size_t>(part.n));
#endif
}

// Stores past the caches: a plain store reads the line that it overwrites, half as much again as a copy moves. For
// large arrays only, which their reader would not find in the caches anyway; p is aligned to the vector.
PYRLHF_INLINE void stream(float* p, vf x) {
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(PYRLHF_ISA_avx2)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__x86_64__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}
PYRLHF_INLINE void stream(bf16* p, vf x) {
    const vh bits = to_bf16(x);
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
#elif defined(PYRLHF_ISA_avx2)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)bits);
#elif defined(__x86_64__)
    _mm_stream_si64(reinterpret_cast<long long*>(p), (long long)bits);
#else
    memcpy(p, &bits, sizeof(bits));
#endif
}
// Every thread calls this after its last stream.
PYRLHF_INLINE void end_of_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}
// Whether an array [rows, size] of T is streamed: it is large, and its rows hold whole, aligned vectors.
constexpr int64_t stream_bytes = int64_t{16} << 20;
template <typename T>
PYRLHF_INLINE bool streams(const void* array, int64_t rows, int64_t size) {
    return rows * size * static_cast<int64_t>(sizeof(T)) >= stream_bytes && (rows == 1 || size % W == 0) &&
           reinterpret_cast<uintptr_t>(array) % (W * sizeof(T)) == 0;
}
template <typename T>
PYRLHF_INLINE void write(T* p, vf x, Whole whole, bool streamed) {
    if (streamed)
        stream(p, x);
    else
        store(p, x, whole);
}
template <typename T>
PYRLHF_INLINE void write(T* p, vf x, Part part, bool) {
    store(p, x, part);
}

// The sum of the lanes in float, by halves.
PYRLHF_INLINE float sum_lanes(vf x) {
    const vf zero = {};
    if constexpr (W > 8) x += shift_down<W / 2>(x, zero);
    if constexpr (W > 4) x += shift_down<4>(x, zero);
    x += shift_down<2>(x, zero);
    x += shift_down<1>(x, zero);
    return x[0];
}

PYRLHF_INLINE vf minus_absolute(vf x) { return (vf)((vu)x | 0x80000000u); }

// The larger of x and low; NaN stays.
PYRLHF_INLINE vf at_least(vf x, float low) {
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    return (vf)_mm512_maskz_max_ps(all_lanes, (__m512)broadcast(low), (__m512)x);
#elif defined(PYRLHF_ISA_avx2)
    return (vf)_mm256_max_ps((__m256)broadcast(low), (__m256)x);
#else
    return x < low ? broadcast(low) : x;
#endif
}

// e^x for x <= 0 within 1 ulp down to 2^-126, then 0 (AVX-512: the subnormal numbers first). NaN stays NaN.
PYRLHF_INLINE vf exp_of_negative(vf x) {
    const vf bounded = at_least(x, -104.0f), turns = bounded * per_ln2;
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    const vf n =
        (vf)_mm512_maskz_roundscale_ps(all_lanes, (__m512)turns, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vf n = round_small(turns);
#endif
    const vf r = (bounded - n * ln2_high) - n * ln2_low;
    vf p = broadcast(1.381454058e-3f);  // minimax, relative error 2^-28
    p = p * r + 8.368745446e-3f;
    p = p * r + 4.166838899e-2f;
    p = p * r + 1.666652113e-1f;
    p = p * r + 4.999999404e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    return (vf)_mm512_maskz_scalef_ps(all_lanes, (__m512)p, (__m512)n);
#else
    const vf zero = {}, scaled = (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
    return x < -87.3365f ? zero : scaled;
#endif
}

// 1 / (1 + e^-x) and 1 minus that, both to a few ulp however small they are.
PYRLHF_INLINE vf sigmoid(vf x, vf& complement) {
    const vf e = exp_of_negative(minus_absolute(x));
    const vf large = 1.0f / (1.0f + e), small = e * large;
    complement = x < 0.0f ? large : small;
    return x < 0.0f ? small : large;
}

// The normal distribution function Phi(x) to a few ulp in both tails, and e^(-x^2 / 2). With t = 1 / (1 + 0.3 |x|),
// Phi(-|x|) = e^(-x^2 / 2) t Q(t), Q minimax (relative error 2^-28) for |x| <= 16; beyond, a float is 0.
PYRLHF_INLINE vf normal_cdf(vf x, vf& density) {
    const vf t = 1.0f / (1.0f + 0.3f * absolute(x));
    density = exp_of_negative(-0.5f * x * x);
    vf q = broadcast(-2.062989026e-2f);
    q = q * t + 1.124717519e-1f;
    q = q * t - 2.283018976e-1f;
    q = q * t + 1.919071823e-1f;
    q = q * t - 7.953003049e-2f;
    q = q * t + 9.621670842e-2f;
    q = q * t + 7.836792618e-2f;
    q = q * t + 1.102403179e-1f;
    q = q * t + 1.195711941e-1f;
    q = q * t + 1.196867228e-1f;
    const vf tail = density * (q * t);
    return x < 0.0f ? tail : 1.0f - tail;
}

// For core/activation.h.
struct ActivationMath {
    PYRLHF_INLINE vf sigmoid(vf z, vf& complement) { return PYRLHF_ISA::sigmoid(z, complement); }
    PYRLHF_INLINE vf normal_cdf(vf x, vf& density) { return PYRLHF_ISA::normal_cdf(x, density); }
};

// Sine and cosine to 0.51 ulp of a float: x = n pi / 2 + r and both Taylor series are in double. pi / 2 in three parts,
// the first two of 22 bits, so that n times them is exact up to n = 2^31.
PYRLHF_INLINE void sincos(vd x, vd& sine, vd& cosine) {
    constexpr double to_integer = 0x1.8p52;  // added and taken away it leaves no bits for a fraction
    const vd n = (x * 0x1.45f306dc9c883p-1 + to_integer) - to_integer;
    const vd r = ((x - n * 0x1.921fbp+0) - n * 0x1.5110bp-22) - n * 0x1.18469898cc517p-44;
    vd a, b;
    sincos_series(r, a, b);
    const vl quarter = (vl)(n + to_integer);  // its low bits are n
    sine = (quarter & 1) != 0 ? b : a;
    cosine = (quarter & 1) != 0 ? a : b;
    sine = (vd)((vl)sine ^ ((quarter & 2) << 62));
    cosine = (vd)((vl)cosine ^ (((quarter + 1) & 2) << 62));
}
PYRLHF_INLINE void sincos(vf x, vf& sine, vf& cosine) {
    if (any(absolute(x) > 0x1p31f)) {
        for (int j = 0; j < W; ++j) {
            sine[j] = static_cast<float>(__builtin_sin(static_cast<double>(x[j])));
            cosine[j] = static_cast<float>(__builtin_cos(static_cast<double>(x[j])));
        }
        return;
    }
    vf_half halves[2], sines[2], cosines[2];
    memcpy(halves, &x, sizeof(x));
    for (int k = 0; k < 2; ++k) {
        vd s, c;
        sincos(__builtin_convertvector(halves[k], vd), s, c);
        sines[k] = __builtin_convertvector(s, vf_half);
        cosines[k] = __builtin_convertvector(c, vf_half);
    }
    memcpy(&sine, sines, sizeof(sine));
    memcpy(&cosine, cosines, sizeof(cosine));
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
