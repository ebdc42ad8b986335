// Kernels of the tests: those that are wrong on purpose, which the emulation must find, and one for mma.h.
#pragma once

#include <string>
#include <vector>

#include "core/dtype.h"

namespace pyrlhf {
namespace cuda {

// A block reverses 0..127 by way of shared memory. fault: "none", or what is done wrong.
std::vector<float> plant(const std::string& fault);

// Two products by the tensor cores of [16, 16] matrices: scores = c + a keys^T, out = scores values. Not of float32.
void multiply_fragments(const void* a, const void* keys, const void* values, const float* c, float* scores, float* out,
                        DType dtype);

}  // namespace cuda
}  // namespace pyrlhf
