// Kernels that are wrong on purpose: what the emulation must find.
#pragma once

#include <string>
#include <vector>

namespace pyrlhf {
namespace cuda {

// A block reverses 0..127 by way of shared memory. fault: "none", or what is done wrong.
std::vector<float> plant(const std::string& fault);

}  // namespace cuda
}  // namespace pyrlhf
