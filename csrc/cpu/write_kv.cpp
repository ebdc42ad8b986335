// Stores new keys and values in the paged cache: row t of k and v goes to slot slots[t], a copy of whole rows.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t worth_a_fork = 1 << 14;  // bytes of k; below, waking the other threads takes longer than the work

// `bytes` that may be of one cache line or of many: whole vectors here, the rest by memcpy.
PYRLHF_INLINE void copy_bytes(char* to, const char* from, int64_t bytes) {
    int64_t at = 0;
    for (; at + static_cast<int64_t>(sizeof(vi)) <= bytes; at += static_cast<int64_t>(sizeof(vi))) {
        vi x;
        memcpy(&x, from + at, sizeof(x));
        memcpy(to + at, &x, sizeof(x));
    }
    if (at < bytes) memcpy(to + at, from + at, static_cast<size_t>(bytes - at));  // nothing may be at null
}

}  // namespace

void write_kv(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots, const WriteShape& shape,
              int threads) {
    const int64_t bytes = shape.dim_bytes, row = shape.heads * bytes;
#pragma omp parallel for schedule(static) num_threads(shape.tokens* row < worth_a_fork ? 1 : threads)
    for (int64_t t = 0; t < shape.tokens; ++t)
        for (int64_t h = 0; h < shape.heads; ++h) {
            const int64_t to = slots[t] * row + h * bytes;
            copy_bytes(static_cast<char*>(k_cache) + to,
                       static_cast<const char*>(k) + t * shape.k_token + h * shape.k_head, bytes);
            copy_bytes(static_cast<char*>(v_cache) + to,
                       static_cast<const char*>(v) + t * shape.v_token + h * shape.v_head, bytes);
        }
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
