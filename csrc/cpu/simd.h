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
PYRLHF_INLINE vf load(const bf16* p) {
    vh raw;
    memcpy(&raw, p, sizeof(raw));
    return (vf)(__builtin_convertvector(raw, vi) << 16);
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
PYRLHF_INLINE float largest(vf x) {
    float out = x[0];
    for (int j = 1; j < W; ++j) out = x[j] > out ? x[j] : out;
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

// Nearest integer, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
PYRLHF_INLINE vf round_small(vf x) { return (x + 12582912.0f) - 12582912.0f; }

// e^x within 2 ulp; 0 and infinity beyond the float range, NaN stays NaN. `rest` becomes e^x - 1 - x, free of
// cancellation. x = n ln 2 + r, |r| <= ln 2 / 2: e^r by a degree-7 polynomial, 2^n applied in two factors so that it
// never overflows alone.
PYRLHF_INLINE vf exp_and_rest(vf x, vf& rest) {
    const vf bounded = x < -104.0f ? broadcast(-104.0f) : (x > 89.0f ? broadcast(89.0f) : x);
    const vf n = round_small(bounded * 1.44269504088896341f);
    const vf r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const vf tail = p * r * r;  // e^r - 1 - r
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

// --- Softmax and its gradient: a lean exp, float32 to the nearest bf16 -----------------------------------------------

// e^x within 2 ulp for x up to 88, 0 below -87, NaN stays NaN: what softmax needs, whose x are at most 0.
PYRLHF_INLINE vf exp_or_zero(vf x) {
    const vf bounded = x < -87.0f ? broadcast(-87.0f) : x;
    const vf n = round_small(bounded * 1.44269504088896341f);
    const vf r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const vf power = (p * r * r + r) + 1.0f;
    const vi scaled = (vi)power + (__builtin_convertvector(n, vi) << 23);
    return x < -87.0f ? vf{} : (vf)scaled;
}

// The nearest bf16, ties to even, in the upper half of each lane; the lower half is 0. NaN stays NaN.
PYRLHF_INLINE vi nearest_bf16(vf x) {
    typedef uint32_t unsigned_lanes __attribute__((vector_size(4 * W)));
    const unsigned_lanes bits = (unsigned_lanes)x;
    const unsigned_lanes nearest = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return (vi)((x == x ? nearest : bits | 0x00400000u) & 0xFFFF0000u);
}
// The first n lanes of x, in the type of what they are written to.
PYRLHF_INLINE void put(float* p, vf x, int n = W) { memcpy(p, &x, sizeof(float) * static_cast<size_t>(n)); }
PYRLHF_INLINE void put(bf16* p, vf x, int n = W) {
    const vh halves = __builtin_convertvector(nearest_bf16(x) >> 16, vh);
    memcpy(p, &halves, sizeof(bf16) * static_cast<size_t>(n));
}
// The same for whole vectors that nobody reads soon: a plain store would read the line that it overwrites.
PYRLHF_INLINE void put_past_caches(float* p, vf x) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(x) != 0) return put(p, x);
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(PYRLHF_ISA_avx2)
    _mm256_stream_ps(p, (__m256)x);
#else
    put(p, x);
#endif
}
PYRLHF_INLINE void put_past_caches(bf16* p, vf x) {
    const vh halves = __builtin_convertvector(nearest_bf16(x) >> 16, vh);
    if (reinterpret_cast<uintptr_t>(p) % sizeof(halves) != 0) return put(p, x);
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)halves);
#elif defined(PYRLHF_ISA_avx2)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)halves);
#else
    put(p, x);
#endif
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
