// pyrlhf._C: the table of contents, one line a kernel. Pointers and streams are integers (0 = none), sizes and dtypes
// are plain numbers; Python has checked them (pyrlhf/ops). The GIL is released while a kernel runs. What a decode step
// calls can also be kept on a Tape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "core/philox.h"
#include "cpu/dispatch.h"
#include "tape.h"
#if defined(PYRLHF_CUDA)
#    include "cuda/bindings.h"
#endif

namespace py = pybind11;
using namespace pyrlhf;

namespace {

using address = uintptr_t;

template <typename T>
T* at(address a) {
    return reinterpret_cast<T*>(a);
}

std::unique_ptr<float[]> uninitialised(int64_t floats) {
    return std::unique_ptr<float[]>(new float[static_cast<size_t>(floats)]);
}

void activation(address grad_out, address x, address out, int dtype, int kind, bool gated, int64_t rows, int64_t size,
                int threads) {
    cpu().activation({at<void>(grad_out), at<void>(x), at<void>(out), static_cast<DType>(dtype),
                      static_cast<Activation>(kind), gated, rows, size},
                     threads);
}

// Sizes and strides of attention in the order of AttentionShape's integers.
AttentionShape attention_shape(const std::array<int64_t, 12>& n, float scale, bool causal) {
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], scale, causal};
}

bool attention(address q, address k, address v, address cu_seqlens, address prefix, address out, address lse,
               const std::array<int64_t, 12>& sizes, float scale, bool causal, int dtype, int threads) {
    return cpu().attention(at<void>(q), at<void>(k), at<void>(v), at<int32_t>(cu_seqlens), at<int32_t>(prefix),
                           at<void>(out), at<float>(lse), attention_shape(sizes, scale, causal),
                           static_cast<DType>(dtype), threads);
}

bool attention_backward(address grad_out, address q, address k, address v, address out, address lse, address cu_seqlens,
                        address prefix, address grad_q, address grad_k, address grad_v,
                        const std::array<int64_t, 12>& sizes, float scale, bool causal, int dtype, int threads) {
    const AttentionGrads grads = {at<void>(grad_out), at<void>(out),    at<float>(lse),
                                  at<void>(grad_q),   at<void>(grad_k), at<void>(grad_v)};
    return cpu().attention_backward(grads, at<void>(q), at<void>(k), at<void>(v), at<int32_t>(cu_seqlens),
                                    at<int32_t>(prefix), attention_shape(sizes, scale, causal),
                                    static_cast<DType>(dtype), threads);
}

bool decode_attention(address q, address k_cache, address v_cache, address page_table, address seq_lens, address out,
                      int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page_size, int64_t max_pages,
                      int64_t q_row, int64_t q_head, int64_t window, float scale, int dtype, int threads) {
    const DecodeShape shape = {rows, heads, kv_heads, dim, page_size, max_pages, q_row, q_head, window, scale};
    return cpu().decode_attention(at<void>(q), at<void>(k_cache), at<void>(v_cache), at<int32_t>(page_table),
                                  at<int32_t>(seq_lens), at<void>(out), shape, static_cast<DType>(dtype), threads);
}

int64_t embed(address table, address ids, address added, address out, int dtype, int64_t rows, int64_t width,
              int64_t count, int threads) {
    return cpu().embed({at<void>(table), at<int64_t>(ids), at<void>(added), at<void>(out), static_cast<DType>(dtype)},
                       rows, width, count, threads);
}

void gae(address rewards, address values, address cu_seqlens, address bootstrap, address advantages, address returns,
         int64_t sequences, float gamma, float lam, int threads) {
    cpu().gae(at<float>(rewards), at<float>(values), at<int32_t>(cu_seqlens), at<float>(bootstrap),
              at<float>(advantages), at<float>(returns), sequences, gamma, lam, threads);
}

void layer_norm(address x, address residual, address weight, address bias, address out, address sum, address mean,
                address rstd, int dtype, int weight_dtype, int64_t rows, int64_t size, float eps, int threads) {
    const std::unique_ptr<float[]> scratch = uninitialised(threads * size);
    cpu().layer_norm({at<void>(x), at<void>(residual), at<void>(weight), at<void>(bias), at<void>(out), at<void>(sum),
                      at<float>(mean), at<float>(rstd), scratch.get(), static_cast<DType>(dtype),
                      static_cast<DType>(weight_dtype), rows, size, rows, 0, eps},
                     threads);
}

void layer_norm_backward(address grad_out, address grad_sum, address summed, address weight, address mean, address rstd,
                         address grad_x, address grad_weight, address grad_bias, int dtype, int weight_dtype,
                         int64_t rows, int64_t size, int threads) {
    const std::unique_ptr<float[]> scratch = uninitialised(2 * size * (rows / norm_block + 1));
    cpu().layer_norm_backward(
        {at<void>(grad_out), at<void>(grad_sum), at<void>(summed), at<void>(weight), at<float>(mean), at<float>(rstd),
         at<void>(grad_x), at<void>(grad_weight), at<void>(grad_bias), scratch.get(), static_cast<DType>(dtype),
         static_cast<DType>(weight_dtype), rows, size},
        threads);
}

int64_t linear_logprob_scratch(int dtype, int64_t rows, int64_t dim, int64_t vocab, bool backwards) {
    return cpu().linear_logprob_scratch(static_cast<DType>(dtype), rows, dim, vocab, backwards);
}

void linear_logprob(address hidden, address weight, address bias, address targets, int dtype, int64_t rows, int64_t dim,
                    int64_t vocab, float temperature, address logprob, address entropy, address lse, address scratch,
                    int threads) {
    cpu().linear_logprob({at<void>(hidden), at<void>(weight), at<void>(bias), at<int64_t>(targets),
                          static_cast<DType>(dtype), rows, dim, vocab, temperature},
                         at<float>(logprob), at<float>(entropy), at<float>(lse), at<void>(scratch), threads);
}

void linear_logprob_backward(address hidden, address weight, address bias, address targets, int dtype, int64_t rows,
                             int64_t dim, int64_t vocab, float temperature, address active, int64_t active_count,
                             address grad_logprob, address grad_entropy, address entropy, address lse,
                             address hidden_sums, address grad_hidden, address grad_weight, address grad_bias,
                             address scratch, int threads) {
    cpu().linear_logprob_backward(
        {at<void>(hidden), at<void>(weight), at<void>(bias), at<int64_t>(targets), static_cast<DType>(dtype), rows, dim,
         vocab, temperature},
        {at<int64_t>(active), active_count, at<float>(grad_logprob), at<float>(grad_entropy), at<float>(entropy),
         at<float>(lse), at<float>(hidden_sums), at<void>(grad_hidden), at<void>(grad_weight), at<void>(grad_bias)},
        at<void>(scratch), threads);
}

int64_t note_draws(address drawn, address drawn_logprobs, int64_t rows, address last_tokens, address positions,
                   address columns, address places, address ends, int64_t ends_count, address tokens,
                   address logprobs) {
    const bool ended =
        cpu().note_draws(at<int64_t>(drawn), at<float>(drawn_logprobs), rows,
                         {at<int64_t>(last_tokens), at<int64_t>(positions), at<int64_t>(columns), at<int64_t>(places)},
                         at<int64_t>(ends), ends_count, at<int64_t>(tokens), at<float>(logprobs));
    return ended ? Tape::halt : Tape::done;
}

bool pack_weight(address weight, int from, int64_t row_stride, int64_t rows, int64_t columns, address panels, int to,
                 address fingerprints, int threads) {
    return cpu().pack_weight(at<void>(weight), static_cast<DType>(from), row_stride, rows, columns, at<void>(panels),
                             static_cast<DType>(to), at<uint64_t>(fingerprints), threads);
}

void packed_linear(address x, int x_dtype, address panels, int panels_dtype, address bias, int bias_dtype,
                   int activation, int64_t rows, int64_t in_features, int64_t out_features, address y, int y_dtype,
                   int threads) {
    const bool whole = static_cast<DType>(panels_dtype) == DType::float32 || in_features % 2 == 0;
    const bool as_is = x_dtype == panels_dtype && whole;
    const std::unique_ptr<uint32_t[]> units(as_is ? nullptr : new uint32_t[static_cast<size_t>(rows * in_features)]);
    cpu().packed_linear(
        {at<void>(x), static_cast<DType>(x_dtype), units.get(), at<void>(panels), static_cast<DType>(panels_dtype),
         at<void>(bias), static_cast<DType>(bias_dtype), at<void>(y), static_cast<DType>(y_dtype)},
        {rows, in_features, out_features}, static_cast<Activation>(activation), threads);
}

void ppo_loss(address logprobs, address old_logprobs, address advantages, address values, address old_values,
              address returns, address weights, int64_t n, float clip, float value_clip, float dual_clip, float weight,
              address grad_logprobs, address grad_values, address policy, address value, address stats, int threads) {
    const PpoArrays in = {at<float>(logprobs),   at<float>(old_logprobs), at<float>(advantages), at<float>(values),
                          at<float>(old_values), at<float>(returns),      at<float>(weights)};
    std::vector<double> scratch(static_cast<size_t>(ppo_sums * (n / ppo_block + 1)));
    cpu().ppo_loss(in, {clip, value_clip, dual_clip, weight}, n, at<float>(grad_logprobs), at<float>(grad_values),
                   at<float>(policy), at<float>(value), at<float>(stats), scratch.data(), threads);
}

void ranking_loss(address scores, address cu_groups, address ranks, int64_t groups, address grad_scores, address loss,
                  address stats, int threads) {
    std::vector<double> scratch(static_cast<size_t>(ranking_sums * (groups + 1)));
    cpu().ranking_loss(at<float>(scores), at<int32_t>(cu_groups), at<int32_t>(ranks), groups, at<float>(grad_scores),
                       at<float>(loss), at<float>(stats), scratch.data(), threads);
}

void rms_norm(address x, address residual, address weight, address out, address sum, address rstd, int dtype,
              int weight_dtype, int64_t rows, int64_t size, float eps, int64_t x_group, int64_t x_stride, int threads) {
    const std::unique_ptr<float[]> scratch = uninitialised(threads * size);
    cpu().rms_norm({at<void>(x), at<void>(residual), at<void>(weight), nullptr, at<void>(out), at<void>(sum), nullptr,
                    at<float>(rstd), scratch.get(), static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows,
                    size, x_group, x_stride, eps},
                   threads);
}

void rms_norm_backward(address grad_out, address grad_sum, address summed, address weight, address rstd, address grad_x,
                       address grad_weight, int dtype, int weight_dtype, int64_t rows, int64_t size, int threads) {
    const std::unique_ptr<float[]> scratch = uninitialised(size * (rows / norm_block + 1));
    cpu().rms_norm_backward({at<void>(grad_out), at<void>(grad_sum), at<void>(summed), at<void>(weight), nullptr,
                             at<float>(rstd), at<void>(grad_x), at<void>(grad_weight), nullptr, scratch.get(),
                             static_cast<DType>(dtype), static_cast<DType>(weight_dtype), rows, size},
                            threads);
}

void rotary(address q, int64_t q_heads, int64_t q_token_stride, int64_t q_head_stride, address k, int64_t k_heads,
            int64_t k_token_stride, int64_t k_head_stride, address positions, address inv_freq, int64_t tokens,
            int64_t head_size, int64_t half, bool inverse, int dtype, address q_out, address k_out, int threads) {
    cpu().rotary({at<void>(q), at<void>(q_out), q_heads, q_token_stride, q_head_stride},
                 {at<void>(k), at<void>(k_out), k_heads, k_token_stride, k_head_stride},
                 {at<int64_t>(positions), at<float>(inv_freq), tokens, head_size, half, inverse},
                 static_cast<DType>(dtype), threads);
}

int64_t sample(address logits, int dtype, address ids, address positions, int64_t rows, int64_t vocab,
               int64_t row_stride, uint64_t seed, float inverse_temperature, int64_t top_k, double top_p,
               float log_min_p, address tokens, address logprobs, int threads) {
    return cpu().sample(at<void>(logits), static_cast<DType>(dtype), at<int64_t>(ids), at<int64_t>(positions),
                        {seed, inverse_temperature, top_k, top_p, log_min_p}, rows, vocab, row_stride,
                        at<int64_t>(tokens), at<float>(logprobs), threads);
}

int64_t sampled_logprob(address logits, int dtype, address tokens, int64_t rows, int64_t vocab, int64_t row_stride,
                        float inverse_temperature, address logprobs, int threads) {
    return cpu().sampled_logprob(at<void>(logits), static_cast<DType>(dtype), at<int64_t>(tokens), inverse_temperature,
                                 rows, vocab, row_stride, at<float>(logprobs), threads);
}

void transpose(address in, int dtype, int64_t rows, int64_t columns, int64_t row_stride, address out, address sums,
               int threads) {
    cpu().transpose(at<void>(in), static_cast<DType>(dtype), rows, columns, row_stride, at<void>(out), at<float>(sums),
                    threads);
}

void token_places(address page_table, int64_t max_pages, address positions, int64_t tokens, int64_t page_size,
                  address slots, address seq_lens, address following) {
    cpu().token_places(at<int32_t>(page_table), max_pages, at<int64_t>(positions), tokens, page_size,
                       at<int64_t>(slots), at<int32_t>(seq_lens), at<int64_t>(following));
}

void write_kv(address k, address v, address k_cache, address v_cache, address slots, int64_t tokens, int64_t heads,
              int64_t dim_bytes, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, int threads) {
    cpu().write_kv(at<void>(k), at<void>(v), at<void>(k_cache), at<void>(v_cache), at<int64_t>(slots),
                   {tokens, heads, dim_bytes, k_token, k_head, v_token, v_head}, threads);
}

std::vector<uint32_t> philox(std::vector<uint32_t> counter, std::vector<uint32_t> key) {
    if (counter.size() != 4 || key.size() != 2) throw std::invalid_argument("philox4x32: counter has 4 words, key 2");
    const Philox drawn = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return {drawn.word, drawn.word + 4};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    const py::call_guard<py::gil_scoped_release> released;
    const auto define = [&](const char* name, auto* function) {
        m.def(name, function, released);
        Tape::knows(name, function);
    };
    define("activation", &activation);
    define("attention", &attention);
    m.def("attention_backward", &attention_backward, released);
    define("decode_attention", &decode_attention);
    define("embed", &embed);
    m.def("gae", &gae, released);
    define("layer_norm", &layer_norm);
    m.def("layer_norm_backward", &layer_norm_backward, released);
    m.def("linear_logprob_scratch", &linear_logprob_scratch);
    m.def("linear_logprob", &linear_logprob, released);
    m.def("linear_logprob_backward", &linear_logprob_backward, released);
    define("note_draws", &note_draws);
    m.def("pack_weight", &pack_weight, released);
    define("packed_linear", &packed_linear);
    m.def("ppo_loss", &ppo_loss, released);
    m.def("ranking_loss", &ranking_loss, released);
    define("rms_norm", &rms_norm);
    m.def("rms_norm_backward", &rms_norm_backward, released);
    define("rotary", &rotary);
    define("sample", &sample);
    define("sampled_logprob", &sampled_logprob);
    define("token_places", &token_places);
    m.def("transpose", &transpose, released);
    define("write_kv", &write_kv);
#if defined(PYRLHF_CUDA)
    py::module_ cuda_half = m.def_submodule("cuda", "the CUDA kernels (csrc/cuda/bindings.cpp)");
    cuda::bind(cuda_half);
#endif

    // A capsule, no class: pybind11 modules share their classes' memory, which each must have from the same allocator.
    const auto keep = [](const std::vector<std::pair<std::string, py::tuple>>& calls) {
        return py::capsule(new Tape(calls), [](void* tape) { delete static_cast<Tape*>(tape); });
    };
    m.def("tape", keep, "keeps calls, pairs of a function's name and its arguments, for run_tapes");
    const auto run = [](const std::vector<py::capsule>& tapes, int64_t times) {
        std::vector<const Tape*> all;
        for (const py::capsule& tape : tapes) all.push_back(tape.get_pointer<Tape>());
        const py::gil_scoped_release released;
        return Tape::run(all, times);
    };
    m.def("run_tapes", run,
          "makes the calls of these tapes in order, the whole so many times or until one of them halts it: how many "
          "times that was, and -1, or of the first call that failed -2 (no memory) or the wrong row's number");

    m.def("philox4x32", &philox, "Philox4x32-10 of a counter (4 words) and a key (2 words), for known-answer tests");
    m.def("isa", &isa, "the instruction set in use");
    m.def("isas_built", &isas_built, "the instruction sets in this binary, plainest first");
    m.def("isas_available", &isas_available, "of these, the ones this CPU has");
    m.def("set_isa", &set_isa, "use this instruction set; ValueError if it is unknown or missing here");
#if defined(PYRLHF_CUDA)
    m.attr("cuda_built") = true;
#else
    m.attr("cuda_built") = false;
#endif
    m.attr("compiler") = __VERSION__;
}
