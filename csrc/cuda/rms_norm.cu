// RMSNorm with the residual addition before it. The kernels are layer_norm's, without a mean and a bias: see norm.h.
#include "cuda/norm.h"

namespace pyrlhf {
namespace cuda {

void rms_norm(const NormForward& arrays, Queue queue) { norm_forward<false>("rms_norm", arrays, queue); }

void rms_norm_backward(const NormBackward& arrays, Queue queue) {
    norm_backward<false>("rms_norm_backward", arrays, queue);
}

}  // namespace cuda
}  // namespace pyrlhf
