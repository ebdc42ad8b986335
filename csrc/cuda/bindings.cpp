// pyrlhf._C.cuda: the CUDA half's table of contents, one line a kernel. Pointers and streams are integers (0 = none),
// sizes and dtypes are plain numbers; Python has checked them (pyrlhf/ops). The GIL is released while a kernel is
// queued.
#include "cuda/bindings.h"

#include "cuda/kernels.h"

namespace py = pybind11;

namespace pyrlhf {
namespace cuda {
namespace {

using address = uintptr_t;

template <typename T>
T* at(address a) {
    return reinterpret_cast<T*>(a);
}

Queue queue(int device, address stream) { return {device, at<void>(stream)}; }

void activation_at(address grad_out, address x, address out, int dtype, int kind, bool gated, int64_t rows,
                   int64_t size, int device, address stream) {
    activation({at<void>(grad_out), at<void>(x), at<void>(out), static_cast<DType>(dtype),
                static_cast<Activation>(kind), gated, rows, size},
               queue(device, stream));
}

void gae_at(address rewards, address values, address cu_seqlens, address bootstrap, address advantages, address returns,
            int64_t sequences, int64_t total, float gamma, float lam, address faults, int device, address stream) {
    gae(at<float>(rewards), at<float>(values), at<int32_t>(cu_seqlens), at<float>(bootstrap), at<float>(advantages),
        at<float>(returns), sequences, total, gamma, lam, at<int32_t>(faults), queue(device, stream));
}

float inverse(int64_t size) { return 1.0f / static_cast<float>(size); }

void layer_norm_at(address x, address residual, address weight, address bias, address out, address sum, address mean,
                   address rstd, int dtype, int weight_dtype, int64_t rows, int64_t size, float eps, int device,
                   address stream) {
    layer_norm({at<void>(x), at<void>(residual), at<void>(weight), at<void>(bias), at<void>(out), at<void>(sum),
                at<float>(mean), at<float>(rstd), static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows,
                size, inverse(size), eps},
               queue(device, stream));
}

void layer_norm_backward_at(address grad_out, address grad_sum, address summed, address weight, address mean,
                            address rstd, address grad_x, address grad_weight, address grad_bias, address partials,
                            int dtype, int weight_dtype, int64_t rows, int64_t size, int device, address stream) {
    layer_norm_backward({at<void>(grad_out), at<void>(grad_sum), at<void>(summed), at<void>(weight), at<float>(mean),
                         at<float>(rstd), at<void>(grad_x), at<void>(grad_weight), at<void>(grad_bias),
                         at<float>(partials), static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows, size,
                         norm_groups(rows, size), norm_group_rows(rows, size), inverse(size)},
                        queue(device, stream));
}

void rms_norm_at(address x, address residual, address weight, address out, address sum, address rstd, int dtype,
                 int weight_dtype, int64_t rows, int64_t size, float eps, int device, address stream) {
    rms_norm(
        {at<void>(x), at<void>(residual), at<void>(weight), nullptr, at<void>(out), at<void>(sum), nullptr,
         at<float>(rstd), static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows, size, inverse(size), eps},
        queue(device, stream));
}

void rms_norm_backward_at(address grad_out, address grad_sum, address summed, address weight, address rstd,
                          address grad_x, address grad_weight, address partials, int dtype, int weight_dtype,
                          int64_t rows, int64_t size, int device, address stream) {
    rms_norm_backward({at<void>(grad_out), at<void>(grad_sum), at<void>(summed), at<void>(weight), nullptr,
                       at<float>(rstd), at<void>(grad_x), at<void>(grad_weight), nullptr, at<float>(partials),
                       static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows, size, norm_groups(rows, size),
                       norm_group_rows(rows, size), inverse(size)},
                      queue(device, stream));
}

}  // namespace

void bind(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> released;
    m.def("activation", &activation_at, released);
    m.def("gae", &gae_at, released);
    m.def("layer_norm", &layer_norm_at, released);
    m.def("layer_norm_backward", &layer_norm_backward_at, released);
    m.def("norm_groups", &norm_groups);
    m.def("rms_norm", &rms_norm_at, released);
    m.def("rms_norm_backward", &rms_norm_backward_at, released);
}

}  // namespace cuda
}  // namespace pyrlhf
