// pyrlhf._C: the table of contents, one line a kernel. Pointers and streams are integers (0 = none), sizes and dtypes
// are plain numbers; Python has checked them (pyrlhf/ops). The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/philox.h"
#include "cpu/dispatch.h"
#if defined(PYRLHF_CUDA)
#    include "cuda/kernels.h"
#endif

namespace py = pybind11;
using namespace pyrlhf;

namespace {

using address = uintptr_t;

template <typename T>
T* at(address a) {
    return reinterpret_cast<T*>(a);
}

void gae(address rewards, address values, address cu_seqlens, address bootstrap, address advantages, address returns,
         int64_t sequences, float gamma, float lam, int threads) {
    cpu().gae(at<float>(rewards), at<float>(values), at<int32_t>(cu_seqlens), at<float>(bootstrap),
              at<float>(advantages), at<float>(returns), sequences, gamma, lam, threads);
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
    cpu().linear_logprob_backward({at<void>(hidden), at<void>(weight), at<void>(bias), at<int64_t>(targets),
                                   static_cast<DType>(dtype), rows, dim, vocab, temperature},
                                  {at<int64_t>(active), active_count, at<float>(grad_logprob), at<float>(grad_entropy),
                                   at<float>(entropy), at<float>(lse), at<float>(hidden_sums), at<void>(grad_hidden),
                                   at<void>(grad_weight), at<void>(grad_bias)},
                                  at<void>(scratch), threads);
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

int64_t sample(address logits, int dtype, address ids, address positions, int64_t rows, int64_t vocab,
               int64_t row_stride, uint64_t seed, float inverse_temperature, int64_t top_k, double top_p,
               float log_min_p, address tokens, address logprobs, int threads) {
    return cpu().sample(at<void>(logits), static_cast<DType>(dtype), at<int64_t>(ids), at<int64_t>(positions),
                        {seed, inverse_temperature, top_k, top_p, log_min_p}, rows, vocab, row_stride,
                        at<int64_t>(tokens), at<float>(logprobs), threads);
}

std::vector<uint32_t> philox(std::vector<uint32_t> counter, std::vector<uint32_t> key) {
    if (counter.size() != 4 || key.size() != 2) throw std::invalid_argument("philox4x32: counter has 4 words, key 2");
    const Philox drawn = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return {drawn.word, drawn.word + 4};
}

#if defined(PYRLHF_CUDA)
constexpr bool cuda_built = true;

void gae_cuda(address rewards, address values, address cu_seqlens, address bootstrap, address advantages,
              address returns, int64_t sequences, int64_t total, float gamma, float lam, address stream) {
    cuda::gae(at<float>(rewards), at<float>(values), at<int32_t>(cu_seqlens), at<float>(bootstrap),
              at<float>(advantages), at<float>(returns), sequences, total, gamma, lam, at<void>(stream));
}
#else
constexpr bool cuda_built = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    const py::call_guard<py::gil_scoped_release> released;
    m.def("gae", &gae, released);
    m.def("linear_logprob_scratch", &linear_logprob_scratch);
    m.def("linear_logprob", &linear_logprob, released);
    m.def("linear_logprob_backward", &linear_logprob_backward, released);
    m.def("ppo_loss", &ppo_loss, released);
    m.def("ranking_loss", &ranking_loss, released);
    m.def("sample", &sample, released);
#if defined(PYRLHF_CUDA)
    m.def("gae_cuda", &gae_cuda, released);
#endif

    m.def("philox4x32", &philox, "Philox4x32-10 of a counter (4 words) and a key (2 words), for known-answer tests");
    m.def("isa", &isa, "the instruction set in use");
    m.def("isas_built", &isas_built, "the instruction sets in this binary, plainest first");
    m.def("isas_available", &isas_available, "of these, the ones this CPU has");
    m.def("set_isa", &set_isa, "use this instruction set; ValueError if it is unknown or missing here");
    m.attr("cuda_built") = cuda_built;
    m.attr("compiler") = __VERSION__;
}
