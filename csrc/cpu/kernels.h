// The table of CPU kernels: one line an op. csrc/cpu/<op>.cpp defines it in namespace pyrlhf::PYRLHF_ISA and is
// compiled once an instruction set. To add an op: a line here, its file, and a line in csrc/bindings.cpp.
#pragma once

#include <cstdint>

#include "core/dtype.h"

// clang-format off
#define PYRLHF_CPU_KERNELS(KERNEL)                                                                                     \
    KERNEL(gae, void, (const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,   \
                       float* advantages, float* returns, int64_t sequences, float gamma, float lam, int threads))     \
    KERNEL(linear_logprob_scratch, int64_t, (DType dtype, int64_t rows, int64_t dim, int64_t vocab, bool backwards))   \
    KERNEL(linear_logprob, void, (const LinearLogprobInputs& in, float* logprob, float* entropy, float* lse,           \
                                  void* scratch, int threads))                                                         \
    KERNEL(linear_logprob_backward, void, (const LinearLogprobInputs& in, const LinearLogprobGradients& grads,         \
                                           void* scratch, int threads))                                                \
    KERNEL(ppo_loss, void, (const PpoArrays& in, const PpoOptions& options, int64_t n, float* grad_logprobs,           \
                            float* grad_values, float* policy, float* value, float* stats, double* scratch,            \
                            int threads))                                                                              \
    KERNEL(ranking_loss, void, (const float* scores, const int32_t* cu_groups, const int32_t* ranks, int64_t groups,   \
                                float* grad_scores, float* loss, float* stats, double* scratch, int threads))          \
    KERNEL(sample, int64_t, (const void* logits, DType dtype, const int64_t* ids, const int64_t* positions,            \
                             const SampleOptions& options, int64_t rows, int64_t vocab, int64_t row_stride,            \
                             int64_t* tokens, float* logprobs, int threads))
// clang-format on

namespace pyrlhf {

// hidden [rows, dim], weight [vocab, dim], bias [vocab] or null, all of dtype; targets [rows] in 0..vocab-1.
struct LinearLogprobInputs {
    const void *hidden, *weight, *bias;
    const int64_t* targets;
    DType dtype;
    int64_t rows, dim, vocab;
    float temperature;
};

// What linear_logprob_backward is given and makes. rows: the row_count rows that have an upstream gradient, ascending;
// those of grad hidden are all that is written there. by_logprob, by_entropy: the upstream gradients [in.rows]; entropy
// and lse, the logits' logsumexp [in.rows], are from the forward. A gradient that is null is not wanted; hidden_sums
// [in.rows, dim] is where a bfloat16 grad hidden adds up, and unused otherwise. Scratch memory of both: as many bytes as
// linear_logprob_scratch says for these rows.
struct LinearLogprobGradients {
    const int64_t* rows;
    int64_t row_count;
    const float *by_logprob, *by_entropy, *entropy, *lse;
    float* hidden_sums;
    void *hidden, *weight, *bias;
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
