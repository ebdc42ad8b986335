// What a decode step does beside its layers: where its tokens lie in the paged cache, what they are embedded as, where
// what it draws goes.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t worth_a_fork = 65536;  // elements

template <typename T>
void look_up(const EmbedArrays& a, int64_t rows, int64_t width, int threads) {
    const T *const table = static_cast<const T*>(a.table), *const added = static_cast<const T*>(a.added);
#pragma omp parallel for schedule(static) num_threads(rows* width < worth_a_fork ? 1 : threads)
    for (int64_t r = 0; r < rows; ++r) {
        const T* const row = table + a.ids[r] * width;
        T* const out = static_cast<T*>(a.out) + r * width;
        if (!added) {
            memcpy(out, row, static_cast<size_t>(width) * sizeof(T));
            continue;
        }
        for_vectors(width, [=](int64_t j, auto lanes) PYRLHF_LAMBDA {
            store(out + j, load(row + j, lanes) + load(added + r * width + j, lanes), lanes);
        });
    }
}

}  // namespace

int64_t embed(const EmbedArrays& arrays, int64_t rows, int64_t width, int64_t count, int threads) {
    for (int64_t r = 0; r < rows; ++r)
        if (arrays.ids[r] < 0 || arrays.ids[r] >= count) return r;
    if (arrays.dtype == DType::float32)
        look_up<float>(arrays, rows, width, threads);
    else
        look_up<bf16>(arrays, rows, width, threads);
    return -1;
}

void token_places(const int32_t* page_table, int64_t max_pages, const int64_t* positions, int64_t tokens,
                  int64_t page_size, int64_t* slots, int32_t* seq_lens, int64_t* following) {
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t page = page_table[t * max_pages + positions[t] / page_size];
        slots[t] = page * page_size + positions[t] % page_size;
        following[t] = positions[t] + 1;
        seq_lens[t] = static_cast<int32_t>(following[t]);
    }
}

bool note_draws(const int64_t* drawn, const float* drawn_logprobs, int64_t rows, const DecodeRows& live,
                const int64_t* ends, int64_t ends_count, int64_t* tokens, float* logprobs) {
    bool ended = false;
    for (int64_t r = 0; r < rows; ++r) {
        ++live.positions[r];
        ++live.columns[r];
        const int64_t place = ++live.places[r];
        tokens[place] = drawn[r];
        logprobs[place] = drawn_logprobs[r];
        live.tokens[r] = drawn[r] < 0 ? 0 : drawn[r];
        for (int64_t e = 0; e < ends_count; ++e) ended = ended || drawn[r] == ends[e];
    }
    return ended;
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
