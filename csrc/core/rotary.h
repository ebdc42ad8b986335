// Rotary position embedding (RoFormer, arXiv:2104.09864, eq. 34) of one channel pair, and the series behind its sine
// and cosine, shared by CPU and CUDA. F and D are a float and a double, or vectors of them.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace pyrlhf {

// x is [tokens, heads, head_size] with these strides in elements, its last dimension contiguous; out is contiguous.
struct RotaryHeads {
    const void* x;
    void* out;
    int64_t heads, token_stride, head_stride;
};

// Channels (i, i + half) turn by positions[token] * inv_freq[i], backwards if inverse; those from 2 half on stay.
struct RotaryShape {
    const int64_t* positions;
    const float* inv_freq;
    int64_t tokens, head_size, half;
    bool inverse;
};

// (first, second) turned by the angle with this sine and cosine.
template <typename F>
PYRLHF_HD void turn_pair(F& first, F& second, F sine, F cosine) {
    const F turned = first * cosine - second * sine;
    second = second * cosine + first * sine;
    first = turned;
}

// Sine and cosine of r in -pi/4..pi/4: Taylor, to less than the last bit of a float.
template <typename D>
PYRLHF_HD void sincos_series(D r, D& sine, D& cosine) {
    const D s = r * r;
    D a = s * (-1.0 / 39916800) + 1.0 / 362880;
    a = a * s - 1.0 / 5040;
    a = a * s + 1.0 / 120;
    a = a * s - 1.0 / 6;
    sine = a * s * r + r;
    D b = s * (-1.0 / 3628800) + 1.0 / 40320;
    b = b * s - 1.0 / 720;
    b = b * s + 1.0 / 24;
    b = b * s - 0.5;
    cosine = b * s + 1.0;
}

}  // namespace pyrlhf
