// LayerNorm with the residual addition before it: three passes over a row that is in the L1 or L2 cache after the
// first, so one pass over memory forward and one backward. The rounded sum is what is normalised; the statistics are
// float32, the variance taken around the mean.
#include "cpu/norm.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

struct Moments {
    float mean, variance;
};

// The mean of the total is off by its rounding: the mean distance to it mends both moments.
PYRLHF_INLINE Moments moments(const float* row, int64_t size, float total) {
    const float n = static_cast<float>(size), about = total / n;
    float distances[2];
    row_sums<2>(size, distances, [&](int64_t j, auto lanes, vf* sums) PYRLHF_LAMBDA {
        const vf distance = used(load(row + j, lanes) - about, lanes);
        sums[0] += distance;
        sums[1] += distance * distance;
    });
    const float off = distances[0] / n;
    return {about + off, distances[1] / n - off * off};
}

template <typename T, typename P>
void forward(const NormForward& a, int threads) {
    const P *const weight = static_cast<const P*>(a.weight), *const bias = static_cast<const P*>(a.bias);
    const bool streamed = streams<T>(a.out, a.rows, a.size) && streams<T>(a.sum, a.rows, a.size);
    for_rows(a.rows, a.size, a.scratch, threads, [=](int64_t i, float* held) PYRLHF_LAMBDA {
        const T *const x = row_of<T>(a.x, i, a.size), *const residual = row_of<T>(a.residual, i, a.size);
        T *const out = row_of<T>(a.out, i, a.size), *const sum = row_of<T>(a.sum, i, a.size);
        float total;
        row_sums<1>(a.size, &total, [&](int64_t j, auto lanes, vf* sums) PYRLHF_LAMBDA {
            const vf s = summed(x, residual, j, lanes);
            store(held + j, s, lanes);
            sums[0] += s;
        });
        const Moments found = moments(held, a.size, total);
        const float rstd = 1.0f / __builtin_sqrtf(found.variance + a.eps);
        a.mean[i] = found.mean;
        a.rstd[i] = rstd;
        for_vectors(a.size, [&](int64_t j, auto lanes) PYRLHF_LAMBDA {
            const vf s = load(held + j, lanes);
            write(out + j, (s - found.mean) * rstd * load(weight + j, lanes) + load(bias + j, lanes), lanes, streamed);
            if (sum) write(sum + j, s, lanes, streamed);
        });
    });
}

// With n = (x - mean) * rstd and g = grad_out * weight: grad_x = (g - mean(g) - n * mean(g * n)) * rstd + grad_sum;
// grad_weight and grad_bias are the sums over the rows of grad_out * n and grad_out.
template <typename T, typename P>
void backward(const NormBackward& a, int threads) {
    const P* const weight = static_cast<const P*>(a.weight);
    P* const by_parameter[2] = {static_cast<P*>(a.grad_weight), static_cast<P*>(a.grad_bias)};
    const bool streamed = streams<T>(a.grad_x, a.rows, a.size);
    for_rows_backward(a.rows, a.size, a.scratch, by_parameter, threads, [=](int64_t i, float* by_weight) PYRLHF_LAMBDA {
        const T *const x = row_of<T>(a.summed, i, a.size), *const grad_out = row_of<T>(a.grad_out, i, a.size);
        const T* const grad_sum = row_of<T>(a.grad_sum, i, a.size);
        T* const grad_x = row_of<T>(a.grad_x, i, a.size);
        float* const by_bias = by_weight + a.size;
        const float center = a.mean[i], rstd = a.rstd[i];
        float totals[2];
        row_sums<2>(a.size, totals, [&](int64_t j, auto lanes, vf* sums) PYRLHF_LAMBDA {
            const vf grad = load(grad_out + j, lanes), n = (load(x + j, lanes) - center) * rstd;
            const vf weighted = grad * load(weight + j, lanes);
            sums[0] += weighted;
            sums[1] += weighted * n;
            store(by_weight + j, load(by_weight + j, lanes) + grad * n, lanes);
            store(by_bias + j, load(by_bias + j, lanes) + grad, lanes);
        });
        const float mean = totals[0] / static_cast<float>(a.size), slope = totals[1] / static_cast<float>(a.size);
        for_vectors(a.size, [&](int64_t j, auto lanes) PYRLHF_LAMBDA {
            const vf grad = load(grad_out + j, lanes) * load(weight + j, lanes);
            const vf by_x = (grad - mean - (load(x + j, lanes) - center) * rstd * slope) * rstd;
            write(grad_x + j, grad_sum ? by_x + load(grad_sum + j, lanes) : by_x, lanes, streamed);
        });
    });
}

}  // namespace

void layer_norm(const NormForward& a, int threads) {
    if (a.dtype == DType::float32) return forward<float, float>(a, threads);
    if (a.weight_dtype == DType::float32) return forward<bf16, float>(a, threads);
    forward<bf16, bf16>(a, threads);
}

void layer_norm_backward(const NormBackward& a, int threads) {
    if (a.dtype == DType::float32) return backward<float, float>(a, threads);
    if (a.weight_dtype == DType::float32) return backward<bf16, float>(a, threads);
    backward<bf16, bf16>(a, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
