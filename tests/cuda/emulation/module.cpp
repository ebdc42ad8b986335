// The CUDA half on the emulation, as a Python module with the functions of pyrlhf._C.cuda; its pointers are the host's.
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "plants.h"

PYBIND11_MODULE(emulated, m) {
    pyrlhf::cuda::bind(m);
    m.def("plant", &pyrlhf::cuda::plant, "runs a kernel with this fault, or with none; returns its output");
}
