// What a sampler is made of, shared by CPU and CUDA: a token's exact weight, the order of tokens, the target of top-p,
// the keyed draw, the log-prob. pyrlhf/ops/sample.py says the same in plain PyTorch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/exp.h"
#include "core/philox.h"
#include "core/portable.h"

namespace pyrlhf {

// e^z 2^20 for z <= 0, from which a token's weight is w = floor(e^z 2^40): a fixed sequence of float32 operations, none
// fused. Math gives the numbers, one or a vector: Real with + - * that round each time, Integer, at_least(Real, float),
// round(Real x, Real& n, Integer& i) to the nearest integer, and power(Integer i) = 2^i.
template <typename Math>
PYRLHF_HD typename Math::Real exp_2_20(typename Math::Real z) {
    using Real = typename Math::Real;
    Real n;
    typename Math::Integer exponent;
    z = Math::at_least(z, -32.0f);
    Math::round(z * per_ln2, n, exponent);
    const Real r = (z - n * ln2_high) - n * ln2_low;
    return ((exp_tail(r) + r) + 1.0f) * Math::power(exponent + 20);
}

// Rises as the logit falls; -0 and 0 are equal logits.
PYRLHF_HD uint32_t descending_key(float x) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof(bits));
    return bits >> 31 ? bits : 0x7FFFFFFFu ^ bits;
}

PYRLHF_HD float logit_of_key(uint32_t key) {
    const uint32_t bits = key >> 31 ? key : 0x7FFFFFFFu ^ key;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// The running weight at which top-p stops keeping, given the weight of all that it may keep.
PYRLHF_HD int64_t top_p_target(double top_p, int64_t mass) {
    const int64_t wanted = static_cast<int64_t>(floor(top_p * static_cast<double>(mass)));
    return wanted < 1 ? 1 : wanted;
}

// Where in [0, mass) the draw of (seed, id, position) points: floor(u mass / 2^62).
PYRLHF_HD int64_t drawn_point(uint64_t seed, uint64_t id, uint64_t position, int64_t mass) {
    const unsigned __int128 product =
        static_cast<unsigned __int128>(keyed_bits62(seed, id, position)) * static_cast<uint64_t>(mass);
    return static_cast<int64_t>(product >> 62);
}

// log(e^z / sum of e^z) as the sampler's exact weights have it.
PYRLHF_HD float sampled_logprob_of(float z, int64_t mass) {
    return static_cast<float>(static_cast<double>(z) - log(static_cast<double>(mass) * 0x1p-40));
}

}  // namespace pyrlhf
