// pyrlhf._C.cuda: the CUDA half's table of contents, one line a kernel. Pointers and streams are integers (0 = none),
// sizes and dtypes are plain numbers; Python has checked them (pyrlhf/ops). The GIL is released while a kernel is
// queued.
#include "cuda/bindings.h"

#include "cuda/kernels.h"

namespace py = pybind11;

namespace pyrlhf {
namespace cuda {
namespace {

using address = uintptr_t;

template <typename T>
T* at(address a) {
    return reinterpret_cast<T*>(a);
}

Queue queue(int device, address stream) { return {device, at<void>(stream)}; }

void activation_at(address grad_out, address x, address out, int dtype, int kind, bool gated, int64_t rows,
                   int64_t size, int device, address stream) {
    activation({at<void>(grad_out), at<void>(x), at<void>(out), static_cast<DType>(dtype),
                static_cast<Activation>(kind), gated, rows, size},
               queue(device, stream));
}

void decode_attention_at(address q, address k_cache, address v_cache, address page_table, address seq_lens, address out,
                         address partial, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t pages,
                         int64_t page_size, int64_t max_pages, int64_t q_row, int64_t q_head, int64_t window,
                         int64_t splits, float scale, int dtype, address faults, int device, address stream) {
    const DecodeShape shape = {rows,      heads, kv_heads, dim,    pages,  page_size,
                               max_pages, q_row, q_head,   window, splits, scale};
    decode_attention(at<void>(q), at<void>(k_cache), at<void>(v_cache), at<int32_t>(page_table), at<int32_t>(seq_lens),
                     at<void>(out), at<float>(partial), shape, static_cast<DType>(dtype), at<int32_t>(faults),
                     queue(device, stream));
}

void gae_at(address rewards, address values, address cu_seqlens, address bootstrap, address advantages, address returns,
            int64_t sequences, int64_t total, float gamma, float lam, address faults, int device, address stream) {
    gae(at<float>(rewards), at<float>(values), at<int32_t>(cu_seqlens), at<float>(bootstrap), at<float>(advantages),
        at<float>(returns), sequences, total, gamma, lam, at<int32_t>(faults), queue(device, stream));
}

float inverse(int64_t size) { return 1.0f / static_cast<float>(size); }

void layer_norm_at(address x, address residual, address weight, address bias, address out, address sum, address mean,
                   address rstd, int dtype, int weight_dtype, int64_t rows, int64_t size, float eps, int device,
                   address stream) {
    layer_norm({at<void>(x), at<void>(residual), at<void>(weight), at<void>(bias), at<void>(out), at<void>(sum),
                at<float>(mean), at<float>(rstd), static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows,
                size, inverse(size), eps},
               queue(device, stream));
}

void layer_norm_backward_at(address grad_out, address grad_sum, address summed, address weight, address mean,
                            address rstd, address grad_x, address grad_weight, address grad_bias, address partials,
                            int dtype, int weight_dtype, int64_t rows, int64_t size, int device, address stream) {
    layer_norm_backward({at<void>(grad_out), at<void>(grad_sum), at<void>(summed), at<void>(weight), at<float>(mean),
                         at<float>(rstd), at<void>(grad_x), at<void>(grad_weight), at<void>(grad_bias),
                         at<float>(partials), static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows, size,
                         norm_groups(rows, size), norm_group_rows(rows, size), inverse(size)},
                        queue(device, stream));
}

void rms_norm_at(address x, address residual, address weight, address out, address sum, address rstd, int dtype,
                 int weight_dtype, int64_t rows, int64_t size, float eps, int device, address stream) {
    rms_norm(
        {at<void>(x), at<void>(residual), at<void>(weight), nullptr, at<void>(out), at<void>(sum), nullptr,
         at<float>(rstd), static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows, size, inverse(size), eps},
        queue(device, stream));
}

void rms_norm_backward_at(address grad_out, address grad_sum, address summed, address weight, address rstd,
                          address grad_x, address grad_weight, address partials, int dtype, int weight_dtype,
                          int64_t rows, int64_t size, int device, address stream) {
    rms_norm_backward({at<void>(grad_out), at<void>(grad_sum), at<void>(summed), at<void>(weight), nullptr,
                       at<float>(rstd), at<void>(grad_x), at<void>(grad_weight), nullptr, at<float>(partials),
                       static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows, size, norm_groups(rows, size),
                       norm_group_rows(rows, size), inverse(size)},
                      queue(device, stream));
}

void rotary_at(address q, address q_out, int64_t q_heads, int64_t q_token, int64_t q_head, address k, address k_out,
               int64_t k_heads, int64_t k_token, int64_t k_head, address positions, address inv_freq, int64_t tokens,
               int64_t head_size, int64_t half, bool inverse, int dtype, int device, address stream) {
    const RotaryShape shape = {at<int64_t>(positions), at<float>(inv_freq), tokens, head_size, half, inverse};
    rotary({at<void>(q), at<void>(q_out), q_heads, q_token, q_head},
           {at<void>(k), at<void>(k_out), k_heads, k_token, k_head}, shape, static_cast<DType>(dtype),
           queue(device, stream));
}

void rotary_write_kv_at(address q, address q_out, int64_t q_heads, int64_t q_token, int64_t q_head, address k,
                        address k_cache, int64_t k_heads, int64_t k_token, int64_t k_head, address v, address v_cache,
                        int64_t v_token, int64_t v_head, address positions, address inv_freq, address slots,
                        int64_t slot_count, int64_t tokens, int64_t head_size, int64_t half, int dtype, address faults,
                        int device, address stream) {
    const RotaryShape shape = {at<int64_t>(positions), at<float>(inv_freq), tokens, head_size, half, false};
    rotary_write_kv({at<void>(q), at<void>(q_out), q_heads, q_token, q_head},
                    {at<void>(k), at<void>(k_cache), k_heads, k_token, k_head},
                    {at<void>(v), at<void>(v_cache), k_heads, v_token, v_head}, at<int64_t>(slots), slot_count, shape,
                    static_cast<DType>(dtype), at<int32_t>(faults), queue(device, stream));
}

void write_kv_at(address k, address v, address k_cache, address v_cache, address slots, int64_t tokens, int64_t heads,
                 int64_t dim_bytes, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,
                 int64_t slot_count, address faults, int device, address stream) {
    const WriteShape shape = {tokens, heads, dim_bytes, k_token, k_head, v_token, v_head, slot_count};
    write_kv(at<void>(k), at<void>(v), at<void>(k_cache), at<void>(v_cache), at<int64_t>(slots), shape,
             at<int32_t>(faults), queue(device, stream));
}

void philox4x32_at(address words, address drawn, int64_t count, int device, address stream) {
    philox4x32(at<uint32_t>(words), at<uint32_t>(drawn), count, queue(device, stream));
}

void sample_at(address logits, int dtype, address ids, address positions, int64_t rows, int64_t vocab,
               int64_t row_stride, uint64_t seed, float inverse_temperature, int64_t top_k, double top_p,
               float log_min_p, address scratch, address tokens, address logprobs, address faults, int device,
               address stream) {
    sample(at<void>(logits), static_cast<DType>(dtype), at<int64_t>(ids), at<int64_t>(positions), rows, vocab,
           row_stride, seed, inverse_temperature, top_k, top_p, log_min_p, at<void>(scratch), at<int64_t>(tokens),
           at<float>(logprobs), at<int32_t>(faults), queue(device, stream));
}

int64_t sample_scratch_at(int64_t rows, int64_t vocab, int64_t top_k, double top_p, int device, address stream) {
    return sample_scratch(rows, vocab, top_k, top_p, queue(device, stream));
}

void sampled_logprob_at(address logits, int dtype, address tokens, int64_t rows, int64_t vocab, int64_t row_stride,
                        float inverse_temperature, address scratch, address logprobs, address faults, int device,
                        address stream) {
    sampled_logprob(at<void>(logits), static_cast<DType>(dtype), at<int64_t>(tokens), rows, vocab, row_stride,
                    inverse_temperature, at<void>(scratch), at<float>(logprobs), at<int32_t>(faults),
                    queue(device, stream));
}

void ppo_loss_at(address logprobs, address old_logprobs, address advantages, address values, address old_values,
                 address returns, address weights, int64_t n, float clip, float value_clip, float dual_clip,
                 float weight, address grad_logprobs, address grad_values, address policy, address value, address stats,
                 address rows, int device, address stream) {
    const PpoArrays in = {at<float>(logprobs),   at<float>(old_logprobs), at<float>(advantages), at<float>(values),
                          at<float>(old_values), at<float>(returns),      at<float>(weights)};
    ppo_loss(in, {clip, value_clip, dual_clip, weight}, n, at<float>(grad_logprobs), at<float>(grad_values),
             at<float>(policy), at<float>(value), at<float>(stats), at<double>(rows), queue(device, stream));
}

void ranking_loss_at(address scores, address cu_groups, address ranks, int64_t groups, int64_t answers,
                     address grad_scores, address loss, address stats, address sums, address faults, int device,
                     address stream) {
    ranking_loss(at<float>(scores), at<int32_t>(cu_groups), at<int32_t>(ranks), groups, answers, at<float>(grad_scores),
                 at<float>(loss), at<float>(stats), at<double>(sums), at<int32_t>(faults), queue(device, stream));
}

}  // namespace

void bind(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> released;
    m.attr("decode_chunk") = decode_chunk;
    m.attr("ppo_block") = ppo_block;
    m.attr("ppo_sums") = ppo_sums;
    m.attr("ranking_sums") = ranking_sums;
    m.def("activation", &activation_at, released);
    m.def("decode_attention", &decode_attention_at, released);
    m.def("gae", &gae_at, released);
    m.def("layer_norm", &layer_norm_at, released);
    m.def("layer_norm_backward", &layer_norm_backward_at, released);
    m.def("norm_groups", &norm_groups);
    m.def("philox4x32", &philox4x32_at, released);
    m.def("ppo_loss", &ppo_loss_at, released);
    m.def("ranking_loss", &ranking_loss_at, released);
    m.def("rms_norm", &rms_norm_at, released);
    m.def("rms_norm_backward", &rms_norm_backward_at, released);
    m.def("rotary", &rotary_at, released);
    m.def("rotary_write_kv", &rotary_write_kv_at, released);
    m.def("sample", &sample_at, released);
    m.def("sample_scratch", &sample_scratch_at);
    m.def("sampled_logprob", &sampled_logprob_at, released);
    m.def("write_kv", &write_kv_at, released);
}

}  // namespace cuda
}  // namespace pyrlhf
