// The CUDA half on the emulation, as a Python module with the functions of pyrlhf._C.cuda; its pointers are the host's.
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "plants.h"

PYBIND11_MODULE(emulated, m) {
    pyrlhf::cuda::bind(m);
    m.def("multiply_fragments",
          [](uintptr_t a, uintptr_t keys, uintptr_t values, uintptr_t c, uintptr_t scores, uintptr_t out, int dtype) {
              pyrlhf::cuda::multiply_fragments(reinterpret_cast<void*>(a), reinterpret_cast<void*>(keys),
                                               reinterpret_cast<void*>(values), reinterpret_cast<float*>(c),
                                               reinterpret_cast<float*>(scores), reinterpret_cast<float*>(out),
                                               static_cast<pyrlhf::DType>(dtype));
          });
    m.def("plant", &pyrlhf::cuda::plant, "runs a kernel with this fault, or with none; returns its output");
}
