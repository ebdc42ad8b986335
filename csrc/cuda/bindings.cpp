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

void gae_at(address rewards, address values, address cu_seqlens, address bootstrap, address advantages, address returns,
            int64_t sequences, int64_t total, float gamma, float lam, address faults, int device, address stream) {
    gae(at<float>(rewards), at<float>(values), at<int32_t>(cu_seqlens), at<float>(bootstrap), at<float>(advantages),
        at<float>(returns), sequences, total, gamma, lam, at<int32_t>(faults), queue(device, stream));
}

}  // namespace

void bind(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> released;
    m.def("gae", &gae_at, released);
}

}  // namespace cuda
}  // namespace pyrlhf
