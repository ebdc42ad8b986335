// LayerNorm with the residual addition before it. The kernels are shared with rms_norm: see norm.h.
#include "cuda/norm.h"

namespace pyrlhf {
namespace cuda {

void layer_norm(const NormForward& arrays, Queue queue) { norm_forward<true>("layer_norm", arrays, queue); }

void layer_norm_backward(const NormBackward& arrays, Queue queue) {
    norm_backward<true>("layer_norm_backward", arrays, queue);
}

}  // namespace cuda
}  // namespace pyrlhf
