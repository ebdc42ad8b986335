// Stores new keys and values in the paged cache: row t of k and v goes to slot slots[t]. A copy of bytes: a thread
// moves one unit of k and the same one of v, 16 bytes where everything lies on 16. Slots out of range are skipped and
// flagged.
#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

constexpr int threads = 256;

template <int bytes>
struct alignas(bytes) Unit {
    unsigned char at[bytes];
};

struct Arrays {
    const char *k, *v;
    char *k_cache, *v_cache;
    const int64_t* slots;
};

template <int bytes>
__global__ void __launch_bounds__(threads)
    write_kv_kernel(Arrays arrays, WriteShape shape, int units, int32_t* faults) {
    const int64_t index = int64_t{blockIdx.x} * threads + threadIdx.x;
    const int row_units = static_cast<int>(shape.heads) * units;
    const int64_t token = index / row_units;
    if (token >= shape.tokens) return;
    const int unit = static_cast<int>(index - token * row_units), head = unit / units, within = unit - head * units;
    const int64_t slot = arrays.slots[token];
    if (slot < 0 || slot >= shape.slots) {
        if (unit == 0) raise_fault(faults, Fault::write_kv_slots);
        return;
    }
    using U = Unit<bytes>;
    const int64_t from = token * shape.k_token + head * shape.k_head,
                  also = token * shape.v_token + head * shape.v_head;
    const U k = *(reinterpret_cast<const U*>(arrays.k + from) + within);
    const U v = *(reinterpret_cast<const U*>(arrays.v + also) + within);
    const int64_t to = slot * row_units + unit;
    *(reinterpret_cast<U*>(arrays.k_cache) + to) = k;
    *(reinterpret_cast<U*>(arrays.v_cache) + to) = v;
}

template <int bytes>
void start(const Arrays& arrays, const WriteShape& shape, int32_t* faults, Queue queue) {
    const int64_t units = shape.dim_bytes / bytes;
    const int64_t blocks = ceil_div(shape.tokens * shape.heads * units, int64_t{threads});
    launch("write_kv", write_kv_kernel<bytes>, dim3(static_cast<unsigned>(blocks)), threads, 0, queue, arrays, shape,
           static_cast<int>(units), faults);
}

}  // namespace

void write_kv(const void* k, const void* v, void* k_cache, void* v_cache, const int64_t* slots, const WriteShape& shape,
              int32_t* faults, Queue queue) {
    if (shape.tokens * shape.heads * shape.dim_bytes == 0) return;
    const Arrays arrays = {static_cast<const char*>(k), static_cast<const char*>(v), static_cast<char*>(k_cache),
                           static_cast<char*>(v_cache), slots};
    uint64_t all = static_cast<uint64_t>(shape.dim_bytes | shape.k_token | shape.k_head | shape.v_token | shape.v_head);
    for (const void* pointer : {k, v, static_cast<const void*>(k_cache), static_cast<const void*>(v_cache)})
        all |= reinterpret_cast<uintptr_t>(pointer);
    if (all % 16 == 0)
        start<16>(arrays, shape, faults, queue);
    else if (all % 4 == 0)
        start<4>(arrays, shape, faults, queue);
    else
        start<2>(arrays, shape, faults, queue);
}

}  // namespace cuda
}  // namespace pyrlhf
