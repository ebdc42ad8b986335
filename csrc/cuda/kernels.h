// The CUDA kernels: one line an op, defined in csrc/cuda/<op>.cu. They throw std::runtime_error if the launch fails.
#pragma once

#include <cstdint>

namespace pyrlhf {
namespace cuda {

void gae(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
         float* advantages, float* returns, int64_t sequences, int64_t total, float gamma, float lam, void* stream);

}  // namespace cuda
}  // namespace pyrlhf
