// The MLP's element-wise functions, plain or gated: act(x), or act(gate) * up with gate and up as the halves of a row.
// One pass forward; the backward recomputes the function from x and writes the gradient of both halves in one pass.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t chunk = 4096;          // elements of a row that one thread takes at a time
constexpr int64_t worth_a_fork = 16384;  // elements

// run(row, first, length) for every stretch of at most `chunk` elements of a row.
template <typename Run>
PYRLHF_INLINE void for_stretches(int64_t rows, int64_t size, int threads, Run run) {
    const int64_t chunks = (size + chunk - 1) / chunk;
    const bool alone = rows * size < worth_a_fork;
#pragma omp parallel num_threads(alone ? 1 : threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < rows * chunks; ++c) {
            const int64_t first = c % chunks * chunk;
            run(c / chunks, first, size - first < chunk ? size - first : chunk);
        }
        end_of_streams();
    }
}

template <typename T, Activation kind, bool gated>
void forward(const ActivationArrays& a, int threads) {
    const bool streamed = streams<T>(a.out, a.rows, a.size);
    for_stretches(a.rows, a.size, threads, [=](int64_t i, int64_t first, int64_t length) PYRLHF_LAMBDA {
        const T *const x = static_cast<const T*>(a.x) + i * a.size * (1 + gated) + first, *const up = x + a.size;
        T* const out = static_cast<T*>(a.out) + i * a.size + first;
        for_vectors(length, [=](int64_t j, auto lanes) PYRLHF_LAMBDA {
            const vf value = value_and_slope<kind, ActivationMath>(load(x + j, lanes)).value;
            if constexpr (gated)
                write(out + j, value * load(up + j, lanes), lanes, streamed);
            else
                write(out + j, value, lanes, streamed);
        });
    });
}

template <typename T, Activation kind, bool gated>
void backward(const ActivationArrays& a, int threads) {
    const bool streamed = streams<T>(a.out, a.rows * (1 + gated), a.size);
    for_stretches(a.rows, a.size, threads, [=](int64_t i, int64_t first, int64_t length) PYRLHF_LAMBDA {
        const T *const x = static_cast<const T*>(a.x) + i * a.size * (1 + gated) + first, *const up = x + a.size;
        const T* const grad_out = static_cast<const T*>(a.grad_out) + i * a.size + first;
        T *const by_x = static_cast<T*>(a.out) + i * a.size * (1 + gated) + first, *const by_up = by_x + a.size;
        for_vectors(length, [=](int64_t j, auto lanes) PYRLHF_LAMBDA {
            const vf grad = load(grad_out + j, lanes);
            const ValueAndSlope<vf> f = value_and_slope<kind, ActivationMath>(load(x + j, lanes));
            if constexpr (gated) {
                write(by_x + j, grad * load(up + j, lanes) * f.slope, lanes, streamed);
                write(by_up + j, grad * f.value, lanes, streamed);
            } else {
                write(by_x + j, grad * f.slope, lanes, streamed);
            }
        });
    });
}

template <typename T, Activation kind, bool gated>
void run(const ActivationArrays& a, int threads) {
    if (a.grad_out)
        backward<T, kind, gated>(a, threads);
    else
        forward<T, kind, gated>(a, threads);
}

template <typename T, bool gated>
void run(const ActivationArrays& a, int threads) {
    with_kind(a.kind, [&](auto kind) { run<T, kind.value, gated>(a, threads); });
}

}  // namespace

void activation(const ActivationArrays& a, int threads) {
    if (a.dtype == DType::float32)
        a.gated ? run<float, true>(a, threads) : run<float, false>(a, threads);
    else
        a.gated ? run<bf16, true>(a, threads) : run<bf16, false>(a, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
