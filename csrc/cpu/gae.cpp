// Generalised advantage estimation over packed sequences: A_t = delta_t + c A_{t+1}, c = gamma lambda, from each
// sequence's last token to its first. W steps at a time: inside a vector the recurrence is a scan of log2 W shifted
// multiply-adds, and one number, A of the first element, is carried to the vector before. Blocks are counted from the
// sequence's own end, so its bits do not depend on where it lies in the batch or which thread takes it.
#include "core/gae.h"

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

struct Decay {
    float c;
    vf step[4];  // c, c^2, c^4, c^8
    vf carried;  // c^W, ..., c^2, c: how much of the carry reaches each element
};

PYRLHF_INLINE Decay make_decay(float c) {
    Decay decay;
    decay.c = c;
    // Each power is rounded once: an error in c^W would grow from vector to vector.
    double power = static_cast<double>(c);
    for (vf& step : decay.step) {
        step = broadcast(static_cast<float>(power));
        power *= power;
    }
    power = 1.0;
    for (int j = W - 1; j >= 0; --j) decay.carried[j] = static_cast<float>(power *= static_cast<double>(c));
    return decay;
}

PYRLHF_INLINE vf scan_backwards(vf x, const Decay& decay) {
    const vf zero = {};
    x += decay.step[0] * shift_down<1>(x, zero);
    x += decay.step[1] * shift_down<2>(x, zero);
    if constexpr (W > 4) x += decay.step[2] * shift_down<4>(x, zero);
    if constexpr (W > 8) x += decay.step[3] * shift_down<8>(x, zero);
    return x;
}

PYRLHF_INLINE void one_sequence(const float* rewards, const float* values, float after, int64_t length, float gamma,
                                const Decay& decay, float* advantages, float* returns) {
    float carry = 0.0f;
    int64_t t = length;
    for (; t >= W; t -= W) {
        const int64_t at = t - W;
        const vf v = load(values + at);
        const vf next = t == length ? shift_down<1>(v, broadcast(after)) : load(values + at + 1);
        const vf delta = load(rewards + at) + gamma * next - v;
        const vf a = scan_backwards(delta, decay) + decay.carried * carry;
        store(advantages + at, a);
        store(returns + at, a + v);
        carry = a[0];
    }
    for (; t > 0; --t) {
        const float next = t == length ? after : values[t];
        carry = td_error(rewards[t - 1], values[t - 1], next, gamma) + decay.c * carry;
        advantages[t - 1] = carry;
        returns[t - 1] = carry + values[t - 1];
    }
}

}  // namespace

void gae(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
         float* advantages, float* returns, int64_t sequences, float gamma, float lam, int threads) {
    const Decay decay = make_decay(gamma * lam);
    const bool alone = cu_seqlens[sequences] < 16384;  // less work than waking the other threads
#pragma omp parallel for schedule(dynamic, 16) num_threads(alone ? 1 : threads)
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t first = cu_seqlens[s];
        one_sequence(rewards + first, values + first, bootstrap ? bootstrap[s] : 0.0f, cu_seqlens[s + 1] - first, gamma,
                     decay, advantages + first, returns + first);
    }
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
