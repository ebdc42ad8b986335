// The table of CPU kernels: one line an op. csrc/cpu/<op>.cpp defines it in namespace pyrlhf::PYRLHF_ISA and is
// compiled once an instruction set. To add an op: a line here, its file, and a line in csrc/bindings.cpp.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/ppo_loss.h"
#include "core/ranking_loss.h"
#include "core/rotary.h"

// clang-format off
#define PYRLHF_CPU_KERNELS(KERNEL)                                                                                     \
    KERNEL(activation, void, (const ActivationArrays& arrays, int threads))                                            \
    KERNEL(attention, bool, (const void* q, const void* k, const void* v, const int32_t* cu_seqlens,                   \
                             const int32_t* prefix, void* out, float* lse, const AttentionShape& shape, DType dtype,   \
                             int threads))                                                                             \
    KERNEL(attention_backward, bool, (const AttentionGrads& grads, const void* q, const void* k, const void* v,        \
                                      const int32_t* cu_seqlens, const int32_t* prefix, const AttentionShape& shape,   \
                                      DType dtype, int threads))                                                       \
    KERNEL(decode_attention, bool, (const void* q, const void* k_cache, const void* v_cache,                           \
                                    const int32_t* page_table, const int32_t* seq_lens, void* out,                     \
                                    const DecodeShape& shape, DType dtype, int threads))                               \
    KERNEL(embed, int64_t, (const EmbedArrays& arrays, int64_t rows, int64_t width, int64_t count, int threads))       \
    KERNEL(gae, void, (const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,   \
                       float* advantages, float* returns, int64_t sequences, float gamma, float lam, int threads))     \
    KERNEL(layer_norm, void, (const NormForward& arrays, int threads))                                                 \
    KERNEL(layer_norm_backward, void, (const NormBackward& arrays, int threads))                                       \
    KERNEL(linear_logprob_scratch, int64_t, (DType dtype, int64_t rows, int64_t dim, int64_t vocab, bool backwards))   \
    KERNEL(linear_logprob, void, (const LinearLogprobInputs& in, float* logprob, float* entropy, float* lse,           \
                                  void* scratch, int threads))                                                         \
    KERNEL(linear_logprob_backward, void, (const LinearLogprobInputs& in, const LinearLogprobGradients& grads,         \
                                           void* scratch, int threads))                                                \
    KERNEL(note_draws, bool, (const int64_t* drawn, const float* drawn_logprobs, int64_t rows, const DecodeRows& live, \
                              const int64_t* ends, int64_t ends_count, int64_t* tokens, float* logprobs))              \
    KERNEL(pack_weight, bool, (const void* weight, DType from, int64_t row_stride, int64_t rows, int64_t columns,      \
                               void* panels, DType to, uint64_t* fingerprints, int threads))                           \
    KERNEL(packed_linear, void, (const PackedLinearArrays& arrays, const PackedLinearShape& shape,                     \
                                 Activation activation, int threads))                                                  \
    KERNEL(ppo_loss, void, (const PpoArrays& in, const PpoOptions& options, int64_t n, float* grad_logprobs,           \
                            float* grad_values, float* policy, float* value, float* stats, double* scratch,            \
                            int threads))                                                                              \
    KERNEL(ranking_loss, void, (const float* scores, const int32_t* cu_groups, const int32_t* ranks, int64_t groups,   \
                                float* grad_scores, float* loss, float* stats, double* scratch, int threads))          \
    KERNEL(rms_norm, void, (const NormForward& arrays, int threads))                                                   \
    KERNEL(rms_norm_backward, void, (const NormBackward& arrays, int threads))                                         \
    KERNEL(rotary, void, (const RotaryHeads& q, const RotaryHeads& k, const RotaryShape& shape, DType dtype,           \
                          int threads))                                                                                \
    KERNEL(sample, int64_t, (const void* logits, DType dtype, const int64_t* ids, const int64_t* positions,            \
                             const SampleOptions& options, int64_t rows, int64_t vocab, int64_t row_stride,            \
                             int64_t* tokens, float* logprobs, int threads))                                           \
    KERNEL(sampled_logprob, int64_t, (const void* logits, DType dtype, const int64_t* tokens, float inverse_temperature, \
                                      int64_t rows, int64_t vocab, int64_t row_stride, float* logprobs, int threads))  \
    KERNEL(token_places, void, (const int32_t* page_table, int64_t max_pages, const int64_t* positions,                \
                                int64_t tokens, int64_t page_size, int64_t* slots, int32_t* seq_lens,                  \
                                int64_t* following))                                                                   \
    KERNEL(transpose, void, (const void* in, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, void* out, \
                             float* sums, int threads))                                                                \
    KERNEL(write_kv, void, (const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots,          \
                            const WriteShape& shape, int threads))
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

// Sizes of decode_attention. q is [rows, heads, dim] with strides in elements, dim lies together; the caches are
// [pages, page_size, kv_heads, dim] and the page table [rows, max_pages], contiguous. window is at least 0, INT64_MAX
// where there is none. Returns false where memory ran out.
struct DecodeShape {
    int64_t rows, heads, kv_heads, dim, page_size, max_pages, q_row, q_head, window;
    float scale;
};

// The sequences of a decode step, [rows]: the last token of each, its position, how many were drawn before it, and its
// place among all that is drawn. note_draws tells whether a draw is one of `ends`.
struct DecodeRows {
    int64_t *tokens, *positions, *columns, *places;
};

// table [count, width], ids [rows] and added [rows, width] or null -> out [rows, width]. embed returns the first row
// whose id is not in 0..count-1, and then has written nothing; -1 where there is none.
struct EmbedArrays {
    const void* table;
    const int64_t* ids;
    const void* added;
    void* out;
    DType dtype;
};

// Sizes of write_kv in bytes: k and v are [tokens, heads, dim_bytes] with these strides, a slot is [heads, dim_bytes].
struct WriteShape {
    int64_t tokens, heads, dim_bytes, k_token, k_head, v_token, v_head;
};

// hidden [rows, dim], weight [vocab, dim], bias [vocab] or null, all of dtype; targets [rows] in 0..vocab-1. dim and
// vocab are at least 1.
struct LinearLogprobInputs {
    const void *hidden, *weight, *bias;
    const int64_t* targets;
    DType dtype;
    int64_t rows, dim, vocab;
    float temperature;
};

// What linear_logprob_backward is given and makes. rows: the row_count rows that have an upstream gradient,
// ascending; those of grad hidden are all that is written there. by_logprob, by_entropy: the upstream gradients
// [in.rows]; entropy and lse, the logits' logsumexp [in.rows], are from the forward. A gradient that is null is not
// wanted; hidden_sums [in.rows, dim] is where a bfloat16 grad hidden adds up, and unused otherwise. Scratch memory
// of both: as many bytes as linear_logprob_scratch says for these rows.
struct LinearLogprobGradients {
    const int64_t* rows;
    int64_t row_count;
    const float *by_logprob, *by_entropy, *entropy, *lse;
    float* hidden_sums;
    void *hidden, *weight, *bias;
};

// Outputs that share a panel of a packed weight. Panels begin on a cache line. pack_weight takes and leaves a
// fingerprint a panel, 0 for one that was never written; it writes the panels whose rows have another, and returns
// whether all of them are finite.
constexpr int64_t panel_columns = 64;

// Arrays of packed_linear. units: scratch for x in the dtype of the panels, rows of whole pairs; null where x itself is
// that. bias may be null.
struct PackedLinearArrays {
    const void* x;
    DType x_dtype;
    void* units;
    const void* panels;
    DType panels_dtype;
    const void* bias;
    DType bias_dtype;
    void* y;
    DType y_dtype;
};

struct PackedLinearShape {
    int64_t rows, in_features, out_features;
};

// Arrays of dtype [rows, size], parameters of weight_dtype [size] and statistics [rows] of rms_norm and layer_norm.
// residual and sum (x + residual) are null together; bias and mean are layer_norm's alone. scratch is [threads,
// size]. rms_norm's x need not lie together: its rows do in groups of x_group, which begin x_stride elements apart.
struct NormForward {
    const void *x, *residual, *weight, *bias;
    void *out, *sum;
    float *mean, *rstd, *scratch;
    DType dtype, weight_dtype;
    int64_t rows, size, x_group, x_stride;
    float eps;
};

// summed is what was normalised, grad_sum (may be null) the gradient that reached the sum itself. scratch holds the
// parameters' gradients for each block of norm_block rows.
struct NormBackward {
    const void *grad_out, *grad_sum, *summed, *weight;
    const float *mean, *rstd;
    void *grad_x, *grad_weight, *grad_bias;
    float* scratch;
    DType dtype, weight_dtype;
    int64_t rows, size;
};
constexpr int64_t norm_block = 32;

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
