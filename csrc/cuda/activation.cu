// The MLP's element-wise functions, plain or gated: act(x), or act(gate) * up with gate and up as the halves of a row.
// One pass over memory forward; the backward recomputes the function from x and writes both gradients in one pass.
//
// A thread takes `packs` packs of 16 bytes, a block's width apart, and loads all before it uses the first. Where packs
// are not aligned, a gated size is no multiple of them, or elements are left over, the same is done element by element.
// The formulas are core/activation.h's, in float32; 16-bit floats, which round the result to 2^-9 or 2^-12, get exp and
// 1 / x from the hardware's own approximations. An element's bits do not depend on its place.
#include <stdexcept>

#include "core/activation.h"
#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

constexpr int threads = 256;
constexpr int packs = 2;

// The hardware's 2^x and 1 / x, subnormal numbers as 0, to 2 and 1 ulp. The emulation errs by 2 ulp, always upwards.
#if defined(__CUDACC__)
PYRLHF_DEVICE float quick_exp2(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
PYRLHF_DEVICE float quick_reciprocal(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
#else
inline float upwards(float x) { return fabsf(x) < 0x1p-126f ? 0.0f : x * (1.0f + 0x1p-22f); }
inline float quick_exp2(float x) { return upwards(exp2f(x)); }
inline float quick_reciprocal(float x) { return upwards(1.0f / x); }
#endif

// exact: for float32 results.
template <bool exact>
struct Math {
    // For x in [1, 6] or NaN. Newton's step makes it exact but for the last rounding.
    static PYRLHF_DEVICE float reciprocal(float x) {
        const float near = quick_reciprocal(x);
        return exact ? fmaf(near, fmaf(-x, near, 1.0f), near) : near;
    }

    static PYRLHF_DEVICE float sigmoid(float z, float& complement) {
        const float magnitude = fabsf(z);
        const float e = exact ? expf(-magnitude) : quick_exp2(magnitude * -1.44269504088896341f);
        const float sum = 1.0f + e;  // in [1, 2]
        const float large = reciprocal(sum);
        const float small = e * large;
        complement = z < 0.0f ? large : small;
        return z < 0.0f ? small : large;
    }

    // With t = 1 / (1 + 0.3 |x|), Phi(-|x|) = e^(-x^2 / 2) t Q(t), Q minimax (relative error 2^-28) for |x| <= 16;
    // beyond, a float is 0.
    static PYRLHF_DEVICE float normal_cdf(float x, float& density) {
        const float t = reciprocal(fmaf(0.3f, fminf(fabsf(x), 16.0f), 1.0f));
        density = exact ? expf(-0.5f * x * x) : quick_exp2(x * x * -0.72134752044448170f);
        float q = -2.062989026e-2f;
        q = fmaf(q, t, 1.124717519e-1f);
        q = fmaf(q, t, -2.283018976e-1f);
        q = fmaf(q, t, 1.919071823e-1f);
        q = fmaf(q, t, -7.953003049e-2f);
        q = fmaf(q, t, 9.621670842e-2f);
        q = fmaf(q, t, 7.836792618e-2f);
        q = fmaf(q, t, 1.102403179e-1f);
        q = fmaf(q, t, 1.195711941e-1f);
        q = fmaf(q, t, 1.196867228e-1f);
        const float tail = density * (q * t);
        return x < 0.0f ? tail : 1.0f - tail;
    }
};

// What goes into an element and comes out of it: x is the gate and `up` what it gates, if anything.
struct Element {
    float x, up, grad;
};
struct Results {
    float first, second;  // the value; or the gradients of x and of up
};

template <typename T, Activation kind, bool gated, bool backwards>
PYRLHF_DEVICE Results results(Element in) {
    const ValueAndSlope<float> f = value_and_slope<kind, Math<sizeof(T) == 4>>(in.x);
    if constexpr (backwards) return {in.grad * (gated ? in.up * f.slope : f.slope), in.grad * f.value};
    return {gated ? f.value * in.up : f.value, 0.0f};
}

// Where things lie, in elements: those of output element i.
template <bool gated>
struct Places {
    int64_t x, up, out;
    PYRLHF_DEVICE Places(uint32_t i, uint32_t size) : x(i), up(0), out(i) {
        if constexpr (gated) {
            x = int64_t{i / size} * size + i;
            up = x + size;
        }
    }
};

template <typename T, Activation kind, bool gated, bool backwards>
PYRLHF_DEVICE void one_element(const T* grad_out, const T* x, T* out, uint32_t i, uint32_t size) {
    const Places<gated> at(i, size);
    const Results r = results<T, kind, gated, backwards>(
        {to_float(x[at.x]), gated ? to_float(x[at.up]) : 0.0f, backwards ? to_float(grad_out[at.out]) : 0.0f});
    from_float(r.first, out[backwards ? at.x : at.out]);
    if constexpr (backwards && gated) from_float(r.second, out[at.up]);
}

// count = rows * size elements of output.
template <typename T, Activation kind, bool gated, bool backwards>
__global__ void __launch_bounds__(threads) in_packs(const T* __restrict__ grad_out, const T* __restrict__ x,
                                                    T* __restrict__ out, uint32_t count, uint32_t size) {
    constexpr uint32_t width = Pack<T>::size, block = threads * width;
    const uint32_t first = blockIdx.x * (block * packs) + threadIdx.x * width;
    Pack<T> xs[packs], ups[packs] = {}, grads[packs] = {};
#pragma unroll
    for (int k = 0; k < packs; ++k) {
        const uint32_t i = first + k * block;
        if (i + width > count) continue;
        const Places<gated> at(i, size);
        xs[k] = load_pack(x + at.x);
        if constexpr (gated) ups[k] = load_pack(x + at.up);
        if constexpr (backwards) grads[k] = load_pack(grad_out + at.out);
    }
#pragma unroll
    for (int k = 0; k < packs; ++k) {
        const uint32_t i = first + k * block;
        if (i + width > count) continue;
        const Places<gated> at(i, size);
        Pack<T> by_x, by_up;
#pragma unroll
        for (uint32_t e = 0; e < width; ++e) {
            const Results r = results<T, kind, gated, backwards>(
                {to_float(xs[k].at[e]), to_float(ups[k].at[e]), to_float(grads[k].at[e])});
            from_float(r.first, by_x.at[e]);
            from_float(r.second, by_up.at[e]);
        }
        store_pack(out + (backwards ? at.x : at.out), by_x);
        if constexpr (backwards && gated) store_pack(out + at.up, by_up);
    }
    if constexpr (!gated) {  // gated, the rows are whole packs
        const uint32_t left = count % width;
        if (blockIdx.x == gridDim.x - 1 && threadIdx.x < left)
            one_element<T, kind, gated, backwards>(grad_out, x, out, count - left + threadIdx.x, size);
    }
}

template <typename T, Activation kind, bool gated, bool backwards>
__global__ void __launch_bounds__(threads) one_by_one(const T* __restrict__ grad_out, const T* __restrict__ x,
                                                      T* __restrict__ out, uint32_t count, uint32_t size) {
    const uint32_t i = blockIdx.x * threads + threadIdx.x;
    if (i < count) one_element<T, kind, gated, backwards>(grad_out, x, out, i, size);
}

// Offsets within a launch fit in 32 bits, which makes the division by size cheap; more elements are more launches.
constexpr int64_t elements_a_launch = int64_t{1} << 30;

template <typename T, Activation kind, bool gated, bool backwards>
void run(const ActivationArrays& a, Queue queue) {
    constexpr int64_t width = Pack<T>::size;
    const bool aligned = on_16_bytes(a.grad_out, a.x, a.out);
    const bool packed = aligned && (!gated || a.size % width == 0);
    const int64_t a_block = threads * (packed ? packs * width : 1);
    const int64_t row = gated ? a.size : 1, rows = a.rows * a.size / row;
    if (row > elements_a_launch) throw std::runtime_error("pyrlhf activation (CUDA): a row holds more than 2^30 gates");
    const int64_t a_launch = elements_a_launch / row;
    for (int64_t done = 0; done < rows; done += a_launch) {
        const int64_t left = rows - done, count = (left < a_launch ? left : a_launch) * row;
        const T *grad_out = static_cast<const T*>(a.grad_out), *x = static_cast<const T*>(a.x);
        T* out = static_cast<T*>(a.out);
        if (backwards) grad_out += done * row;
        x += done * row * (1 + gated);
        out += done * row * (1 + (gated && backwards));
        launch(backwards ? "activation_backward" : "activation",
               packed ? in_packs<T, kind, gated, backwards> : one_by_one<T, kind, gated, backwards>,
               dim3(static_cast<unsigned>(ceil_div(count, a_block))), threads, 0, queue, grad_out, x, out,
               static_cast<uint32_t>(count), static_cast<uint32_t>(row));
    }
}

template <typename T, Activation kind>
void run(const ActivationArrays& a, Queue queue) {
    if (a.grad_out)
        a.gated ? run<T, kind, true, true>(a, queue) : run<T, kind, false, true>(a, queue);
    else
        a.gated ? run<T, kind, true, false>(a, queue) : run<T, kind, false, false>(a, queue);
}

template <typename T>
void run(const ActivationArrays& a, Queue queue) {
    with_kind(a.kind, [&](auto kind) { run<T, kind.value>(a, queue); });
}

}  // namespace

void activation(const ActivationArrays& arrays, Queue queue) {
    if (arrays.rows * arrays.size == 0) return;
    visit(arrays.dtype, [&](auto zero) { run<decltype(zero)>(arrays, queue); });
}

}  // namespace cuda
}  // namespace pyrlhf
