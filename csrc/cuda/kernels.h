// The CUDA kernels: one line an op, defined in csrc/cuda/<op>.cu. Pointers are the device's, faults the device's flags
// (core/faults.h). A function returns when its kernels are queued; it throws std::runtime_error if CUDA refuses them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pyrlhf {
namespace cuda {

// Where kernels run: a device and a stream of it.
struct Queue {
    int device;
    void* stream;
};

void gae(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
         float* advantages, float* returns, int64_t sequences, int64_t total, float gamma, float lam, int32_t* faults,
         Queue queue);

}  // namespace cuda
}  // namespace pyrlhf
