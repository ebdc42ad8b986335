// The CUDA kernels: one line an op, defined in csrc/cuda/<op>.cu. Pointers are the device's, faults the device's flags
// (core/faults.h). A function returns when its kernels are queued; it throws std::runtime_error if CUDA refuses them.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/ppo_loss.h"
#include "core/ranking_loss.h"
#include "core/rotary.h"

namespace pyrlhf {
namespace cuda {

// Where kernels run: a device and a stream of it.
struct Queue {
    int device;
    void* stream;
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

// Keys that decode_attention takes as one piece of a row's work: a constant, so that a row's bits depend on its own
// length only. Pieces are counted from the start of the sequence.
constexpr int64_t decode_chunk = 512;

// The caches are [pages, page_size, kv_heads, dim], page_table is [rows, max_pages], out is [rows, heads, dim]; q has
// strides in elements. window: INT64_MAX / 2 or less. splits: the most chunks that a row can see, at least 1; where it
// is more than 1, partial is [rows, heads, splits, dim + 2] floats of scratch.
struct DecodeShape {
    int64_t rows, heads, kv_heads, dim, pages, page_size, max_pages, q_row, q_head, window, splits;
    float scale;
};
void decode_attention(const void* q, const void* k_cache, const void* v_cache, const int32_t* page_table,
                      const int32_t* seq_lens, void* out, float* partial, const DecodeShape& shape, DType dtype,
                      int32_t* faults, Queue queue);

void gae(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
         float* advantages, float* returns, int64_t sequences, int64_t total, float gamma, float lam, int32_t* faults,
         Queue queue);

void layer_norm(const NormForward& arrays, Queue queue);
void layer_norm_backward(const NormBackward& arrays, Queue queue);

void rms_norm(const NormForward& arrays, Queue queue);
void rms_norm_backward(const NormBackward& arrays, Queue queue);

void rotary(const RotaryHeads& q, const RotaryHeads& k, const RotaryShape& shape, DType dtype, Queue queue);

// rotary, and write_kv of the turned k and of v: the out of these two is the cache, a row a slot.
void rotary_write_kv(const RotaryHeads& q, const RotaryHeads& k, const RotaryHeads& v, const int64_t* slots,
                     int64_t slot_count, const RotaryShape& shape, DType dtype, int32_t* faults, Queue queue);

// Sizes in bytes: k and v are [tokens, heads, dim_bytes] with these strides, the caches [slots, heads, dim_bytes].
struct WriteShape {
    int64_t tokens, heads, dim_bytes, k_token, k_head, v_token, v_head, slots;
};
void write_kv(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots, const WriteShape& shape,
              int32_t* faults, Queue queue);

// words: count <= 1024 times four of the counter and two of the key; drawn: count times four. For known-answer tests.
void philox4x32(const uint32_t* words, uint32_t* drawn, int64_t count, Queue queue);

// top_k 0, top_p 1 and log_min_p -infinity filter nothing; inverse_temperature 0 takes the largest logit. scratch:
// sample_scratch(...) bytes, on 16 bytes. A bad row gets token -1 and log-prob NaN.
void sample(const void* logits, DType dtype, const int64_t* ids, const int64_t* positions, int64_t rows, int64_t vocab,
            int64_t row_stride, uint64_t seed, float inverse_temperature, int64_t top_k, double top_p, float log_min_p,
            void* scratch, int64_t* tokens, float* logprobs, int32_t* faults, Queue queue);
int64_t sample_scratch(int64_t rows, int64_t vocab, int64_t top_k, double top_p, Queue queue);

// scratch: as of sample without filters.
void sampled_logprob(const void* logits, DType dtype, const int64_t* tokens, int64_t rows, int64_t vocab,
                     int64_t row_stride, float inverse_temperature, void* scratch, float* logprobs, int32_t* faults,
                     Queue queue);

// rows: scratch for ppo_sums doubles a block of ppo_block tokens.
void ppo_loss(const PpoArrays& in, const PpoOptions& options, int64_t n, float* grad_logprobs, float* grad_values,
              float* policy, float* value, float* stats, double* rows, Queue queue);

// sums: scratch for ranking_sums doubles a group.
void ranking_loss(const float* scores, const int32_t* cu_groups, const int32_t* ranks, int64_t groups, int64_t answers,
                  float* grad_scores, float* loss, float* stats, double* sums, int32_t* faults, Queue queue);

}  // namespace cuda
}  // namespace pyrlhf
