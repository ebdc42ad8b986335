// Dtype codes that cross from Python (pyrlhf/ops/_core.py: CORE_DTYPES and CUDA_DTYPES), and the 16-bit floats that C++
// has no type for. float16 is the CUDA half's alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/portable.h"

namespace pyrlhf {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

PYRLHF_HD float to_float(float x) { return x; }

PYRLHF_HD float to_float(bf16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float out;
    memcpy(&out, &bits, sizeof(out));
    return out;
}

}  // namespace pyrlhf
