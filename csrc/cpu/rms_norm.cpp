// RMSNorm with the residual addition before it: two passes over a row that is in the L1 or L2 cache after the first, so
// one pass over memory forward and one backward. The rounded sum is what is normalised; the statistics are float32.
#include "cpu/norm.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

// Row i of x.
template <typename T>
PYRLHF_INLINE const T* row_of_x(const NormForward& a, int64_t i) {
    const int64_t group = i < a.x_group ? 0 : i / a.x_group;  // a division takes as long as a short row
    return static_cast<const T*>(a.x) + group * a.x_stride + (i - group * a.x_group) * a.size;
}

template <typename T, typename P>
void forward(const NormForward& a, int threads) {
    const P* const weight = static_cast<const P*>(a.weight);
    const bool streamed = streams<T>(a.out, a.rows, a.size) && streams<T>(a.sum, a.rows, a.size);
    for_rows(a.rows, a.size, a.scratch, threads, [=](int64_t i, float* held) PYRLHF_LAMBDA {
        const T *const x = row_of_x<T>(a, i), *const residual = row_of<T>(a.residual, i, a.size);
        T *const out = row_of<T>(a.out, i, a.size), *const sum = row_of<T>(a.sum, i, a.size);
        float squares;
        row_sums<1>(a.size, &squares, [&](int64_t j, auto lanes, vf* sums) PYRLHF_LAMBDA {
            const vf s = summed(x, residual, j, lanes);
            store(held + j, s, lanes);
            sums[0] += s * s;
        });
        const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(a.size) + a.eps);
        a.rstd[i] = rstd;
        for_vectors(a.size, [&](int64_t j, auto lanes) PYRLHF_LAMBDA {
            const vf s = load(held + j, lanes);
            write(out + j, s * rstd * load(weight + j, lanes), lanes, streamed);
            if (sum) write(sum + j, s, lanes, streamed);
        });
    });
}

// With n = x * rstd and g = grad_out * weight: grad_x = (g - n * mean(g * n)) * rstd + grad_sum, and grad_weight is the
// sum over the rows of grad_out * n.
template <typename T, typename P>
void backward(const NormBackward& a, int threads) {
    const P* const weight = static_cast<const P*>(a.weight);
    P* const by_parameter[1] = {static_cast<P*>(a.grad_weight)};
    const bool streamed = streams<T>(a.grad_x, a.rows, a.size);
    for_rows_backward(a.rows, a.size, a.scratch, by_parameter, threads, [=](int64_t i, float* by_weight) PYRLHF_LAMBDA {
        const T *const x = row_of<T>(a.summed, i, a.size), *const grad_out = row_of<T>(a.grad_out, i, a.size);
        const T* const grad_sum = row_of<T>(a.grad_sum, i, a.size);
        T* const grad_x = row_of<T>(a.grad_x, i, a.size);
        const float rstd = a.rstd[i];
        float products;
        row_sums<1>(a.size, &products, [&](int64_t j, auto lanes, vf* sums) PYRLHF_LAMBDA {
            const vf product = load(grad_out + j, lanes) * (load(x + j, lanes) * rstd);
            sums[0] += product * load(weight + j, lanes);
            store(by_weight + j, load(by_weight + j, lanes) + product, lanes);
        });
        const float mean = products / static_cast<float>(a.size);
        for_vectors(a.size, [&](int64_t j, auto lanes) PYRLHF_LAMBDA {
            const vf grad = load(grad_out + j, lanes) * load(weight + j, lanes);
            const vf by_x = (grad - load(x + j, lanes) * rstd * mean) * rstd;
            write(grad_x + j, grad_sum ? by_x + load(grad_sum + j, lanes) : by_x, lanes, streamed);
        });
    });
}

}  // namespace

void rms_norm(const NormForward& a, int threads) {
    if (a.dtype == DType::float32) return forward<float, float>(a, threads);
    if (a.weight_dtype == DType::float32) return forward<bf16, float>(a, threads);
    forward<bf16, bf16>(a, threads);
}

void rms_norm_backward(const NormBackward& a, int threads) {
    if (a.dtype == DType::float32) return backward<float, float>(a, threads);
    if (a.weight_dtype == DType::float32) return backward<bf16, float>(a, threads);
    backward<bf16, bf16>(a, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
