// The exponential near 0, shared by CPU and CUDA. F is a number: float or a vector of floats.
#pragma once

#include "core/portable.h"

namespace pyrlhf {

// e^x = 2^n e^r with n the integer nearest to x / ln 2; ln 2 in two parts, the first short enough for n times it to be
// exact.
constexpr float per_ln2 = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;

// e^r - 1 - r for |r| <= ln 2 / 2, free of cancellation: a polynomial of degree 7.
template <typename F>
PYRLHF_HD F exp_tail(F r) {
    const F zero = {};
    F p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r;
}

}  // namespace pyrlhf
