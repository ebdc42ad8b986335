// Puts the CUDA half into a Python module: pyrlhf._C.cuda, or the tests' emulation of it.
#pragma once

#include <pybind11/pybind11.h>

namespace pyrlhf {
namespace cuda {

void bind(pybind11::module_& m);

}  // namespace cuda
}  // namespace pyrlhf
