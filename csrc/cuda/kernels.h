// The CUDA kernels: one line an op, defined in csrc/cuda/<op>.cu. Pointers are the device's, faults the device's flags
// (core/faults.h). A function returns when its kernels are queued; it throws std::runtime_error if CUDA refuses them.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"

namespace pyrlhf {
namespace cuda {

// Where kernels run: a device and a stream of it.
struct Queue {
    int device;
    void* stream;
};

// x is [rows, size], or gated [rows, 2 size]: the gates, then what they gate. Without grad_out, out is the value [rows,
// size]; with it, out is the gradient of x in x's shape.
struct ActivationArrays {
    const void *grad_out, *x;
    void* out;
    DType dtype;
    Activation kind;
    bool gated;
    int64_t rows, size;
};

// x, residual (may be null), out and sum (null with residual) are [rows, size] of dtype; weight and bias [size] of
// weight_dtype, which is dtype or float32; mean and rstd [rows]. rms_norm has no bias and no mean.
struct NormForward {
    const void *x, *residual, *weight, *bias;
    void *out, *sum;
    float *mean, *rstd;
    DType dtype, weight_dtype;
    int64_t rows, size;
    float inverse_size, eps;
};

// summed is what was normalised, grad_sum (may be null) the gradient that reached the sum itself. partials holds the
// parameters' gradients for each group of group_rows rows: [groups, grad_weight and (layer_norm) grad_bias, size].
struct NormBackward {
    const void *grad_out, *grad_sum, *summed, *weight;
    const float *mean, *rstd;
    void *grad_x, *grad_weight, *grad_bias;
    float* partials;
    DType dtype, weight_dtype;
    int64_t rows, size, groups, group_rows;
    float inverse_size;
};

// Rows a group of the backward: 8 at least, so that its partial sums are little beside its rows; and as many groups as
// fill a large device (1024 blocks, or 4096 warps where a row is a warp's), since all are read again.
inline int64_t norm_group_rows(int64_t rows, int64_t size) {
    const int64_t most = size <= 1024 ? 4096 : 1024, needed = (rows + most - 1) / most;
    return needed < 8 ? 8 : needed;
}
inline int64_t norm_groups(int64_t rows, int64_t size) {
    const int64_t together = norm_group_rows(rows, size);
    return (rows + together - 1) / together;
}

void activation(const ActivationArrays& arrays, Queue queue);

void gae(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
         float* advantages, float* returns, int64_t sequences, int64_t total, float gamma, float lam, int32_t* faults,
         Queue queue);

void layer_norm(const NormForward& arrays, Queue queue);
void layer_norm_backward(const NormBackward& arrays, Queue queue);

void rms_norm(const NormForward& arrays, Queue queue);
void rms_norm_backward(const NormBackward& arrays, Queue queue);

}  // namespace cuda
}  // namespace pyrlhf
