// The table of CPU kernels: one line an op. csrc/cpu/<op>.cpp defines it in namespace pyrlhf::PYRLHF_ISA and is
// compiled once an instruction set. To add an op: a line here, its file, and a line in csrc/bindings.cpp.
#pragma once

#include <cstdint>

#include "core/dtype.h"

// clang-format off
#define PYRLHF_CPU_KERNELS(KERNEL)                                                                                     \
    KERNEL(attention, bool, (const void* q, const void* k, const void* v, const int32_t* cu_seqlens,                   \
                             const int32_t* prefix, void* out, float* lse, const AttentionShape& shape, DType dtype,   \
                             int threads))                                                                             \
    KERNEL(attention_backward, bool, (const AttentionGrads& grads, const void* q, const void* k, const void* v,        \
                                      const int32_t* cu_seqlens, const int32_t* prefix, const AttentionShape& shape,   \
                                      DType dtype, int threads))                                                       \
    KERNEL(gae, void, (const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,   \
                       float* advantages, float* returns, int64_t sequences, float gamma, float lam, int threads))     \
    KERNEL(ppo_loss, void, (const PpoArrays& in, const PpoOptions& options, int64_t n, float* grad_logprobs,           \
                            float* grad_values, float* policy, float* value, float* stats, double* scratch,            \
                            int threads))                                                                              \
    KERNEL(ranking_loss, void, (const float* scores, const int32_t* cu_groups, const int32_t* ranks, int64_t groups,   \
                                float* grad_scores, float* loss, float* stats, double* scratch, int threads))          \
    KERNEL(sample, int64_t, (const void* logits, DType dtype, const int64_t* ids, const int64_t* positions,            \
                             const SampleOptions& options, int64_t rows, int64_t vocab, int64_t row_stride,            \
                             int64_t* tokens, float* logprobs, int threads))                                           \
    KERNEL(transpose, void, (const void* in, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, void* out, \
                             float* sums, int threads))
// clang-format on

namespace pyrlhf {

// Sizes of attention. q is [tokens, heads, dim], k and v are [tokens, kv_heads, dim], each with its own strides in
// elements; dim lies together. Everything else is contiguous. window is at least 1, INT64_MAX where there is none.
// attention and attention_backward return false where memory ran out; then nothing is promised of the results.
struct AttentionShape {
    int64_t tokens, sequences, heads, kv_heads, dim;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    int64_t window;
    float scale;
    bool causal;
};

// What the backward reads besides q, k and v, and what it writes.
struct AttentionGrads {
    const void *grad_out, *out;
    const float* lse;  // [heads, tokens], natural logarithms
    void *grad_q, *grad_k, *grad_v;
};

// The seven inputs of ppo_loss, [n] each; weights may be null (then every weight is options.weight).
struct PpoArrays {
    const float *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns, *weights;
};

// dual_clip and value_clip are off when infinite.
struct PpoOptions {
    float clip, value_clip, dual_clip, weight;
};

// ppo_loss sums this many numbers a block of ppo_block tokens; scratch holds (1 + blocks) rows of them.
constexpr int ppo_sums = 7;
constexpr int64_t ppo_block = 2048;

// ranking_loss keeps this many doubles a group in scratch: loss, correct pairs, pairs.
constexpr int ranking_sums = 3;

// log_min_p is -inf and top_k 0 and top_p 1 when off; inverse_temperature 0 asks for the argmax.
struct SampleOptions {
    uint64_t seed;
    float inverse_temperature;
    int64_t top_k;
    double top_p;
    float log_min_p;
};

struct CpuKernels {
#define PYRLHF_MEMBER(name, result, arguments) result(*name) arguments;
    PYRLHF_CPU_KERNELS(PYRLHF_MEMBER)
#undef PYRLHF_MEMBER
};

#define PYRLHF_DECLARE(name, result, arguments) result name arguments;
#define PYRLHF_NAMESPACE(isa)          \
    namespace isa {                    \
    PYRLHF_CPU_KERNELS(PYRLHF_DECLARE) \
    }
PYRLHF_NAMESPACE(generic)
PYRLHF_NAMESPACE(avx2)
PYRLHF_NAMESPACE(avx512)
PYRLHF_NAMESPACE(avx512_bf16)
#undef PYRLHF_NAMESPACE
#undef PYRLHF_DECLARE

}  // namespace pyrlhf
