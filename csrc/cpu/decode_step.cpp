// What a decode step counts: where its tokens lie in the paged cache, and where what it draws goes.
#include "cpu/kernels.h"

namespace pyrlhf {
namespace PYRLHF_ISA {

void token_places(const int32_t* page_table, int64_t max_pages, const int64_t* positions, int64_t tokens,
                  int64_t page_size, int64_t* slots, int32_t* seq_lens) {
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t page = page_table[t * max_pages + positions[t] / page_size];
        slots[t] = page * page_size + positions[t] % page_size;
        seq_lens[t] = static_cast<int32_t>(positions[t] + 1);
    }
}

void note_draws(const int64_t* drawn, const float* drawn_logprobs, int64_t rows, const DecodeRows& live,
                int64_t* tokens, float* logprobs) {
    for (int64_t r = 0; r < rows; ++r) {
        ++live.positions[r];
        ++live.columns[r];
        const int64_t place = ++live.places[r];
        tokens[place] = drawn[r];
        logprobs[place] = drawn_logprobs[r];
        live.tokens[r] = drawn[r] < 0 ? 0 : drawn[r];
    }
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
