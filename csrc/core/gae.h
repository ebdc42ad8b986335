// One step of generalised advantage estimation (Schulman et al. 2016, eq. 16), shared by CPU and CUDA.
#pragma once

#include "core/portable.h"

namespace pyrlhf {

// delta_t = r_t + gamma V_{t+1} - V_t
PYRLHF_HD float td_error(float reward, float value, float next_value, float gamma) {
    return reward + gamma * next_value - value;
}

}  // namespace pyrlhf
