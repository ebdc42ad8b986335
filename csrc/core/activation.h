// The MLP's element-wise functions and their slopes, once for CPU and CUDA. V is a float or a vector of floats; the
// functions that both need are the caller's own, each as exact as it is cheap there:
//   Math::sigmoid(z, complement) = 1 / (1 + e^-z), and 1 minus that, both to a few ulp however small they are;
//   Math::normal_cdf(x, density) = Phi(x) to a few ulp in both tails, and e^(-x^2 / 2).
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/portable.h"

namespace pyrlhf {

// What is applied to each output, in the order of pyrlhf/ops/activation.py: KINDS.
enum class Activation : int { none = -1, gelu = 0, gelu_new = 1, quick_gelu = 2, relu = 3, silu = 4 };

// f(std::integral_constant<Activation, kind>{}), for code that is compiled for each kind; nothing for none. F is a
// lambda of the file that calls it, so that no two instruction sets share what is made of this.
template <typename F>
void with_kind(Activation kind, F f) {
    switch (kind) {
        case Activation::none:
            return;
        case Activation::gelu:
            return f(std::integral_constant<Activation, Activation::gelu>{});
        case Activation::gelu_new:
            return f(std::integral_constant<Activation, Activation::gelu_new>{});
        case Activation::quick_gelu:
            return f(std::integral_constant<Activation, Activation::quick_gelu>{});
        case Activation::relu:
            return f(std::integral_constant<Activation, Activation::relu>{});
        case Activation::silu:
            return f(std::integral_constant<Activation, Activation::silu>{});
    }
}

// x is [rows, size], or [rows, 2, size] (gate, up) where gated. grad_out is null in the forward, out [rows, size]; in
// the backward grad_out is [rows, size] and out is the gradient, shaped like x.
struct ActivationArrays {
    const void *grad_out, *x;
    void* out;
    DType dtype;
    Activation kind;
    bool gated;
    int64_t rows, size;
};

template <typename V>
struct ValueAndSlope {
    V value, slope;
};

// x * sigmoid(z) with z = z(x), whose slope is given. bounded_x keeps the slope finite where the sigmoid is 0 or 1.
template <typename Math, typename V>
PYRLHF_HD ValueAndSlope<V> sigmoid_unit(V x, V bounded_x, V z, V z_slope) {
    V complement;
    const V s = Math::sigmoid(z, complement);
    return {x * s, s + bounded_x * (z_slope * (s * complement))};
}

template <Activation kind, typename Math, typename V>
PYRLHF_HD ValueAndSlope<V> value_and_slope(V x) {
    const V zero = {};
    if constexpr (kind == Activation::relu) {
        return {x < 0.0f ? zero : x, x <= 0.0f ? zero : zero + 1.0f};
    } else if constexpr (kind == Activation::gelu) {
        V density;
        const V cdf = Math::normal_cdf(x, density);
        return {x * cdf, cdf + x * (density * 0.398942280401f)};  // 1 / sqrt(2 pi)
    } else if constexpr (kind == Activation::gelu_new) {
        // (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        constexpr float linear = 1.59576912161f, cubic = 0.044715f * linear;
        const V low = zero - 16.0f, high = zero + 16.0f;  // beyond, the slope is 0 or 1
        const V near = x < low ? low : (x > high ? high : x);
        return sigmoid_unit<Math>(x, near, x * (x * x * cubic + linear), near * near * (3.0f * cubic) + linear);
    } else if constexpr (kind == Activation::quick_gelu) {
        return sigmoid_unit<Math>(x, x, x * 1.702f, zero + 1.702f);
    } else {
        return sigmoid_unit<Math>(x, x, x, zero + 1.0f);
    }
}

}  // namespace pyrlhf
