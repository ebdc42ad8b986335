// The products of csrc/cuda/mma.h on matrices that lie plainly in memory, for the test of their layout.
#include "cuda/mma.h"
#include "plants.h"

namespace pyrlhf {
namespace cuda {
namespace {

template <typename T>
struct Shared {
    alignas(16) T a[16][16], keys[16][16], values[16][16];
};

// scores = c + a keys^T, out = scores values; everything is [16, 16].
template <typename T>
__global__ void products(const T* a, const T* keys, const T* values, const float* c, float* scores, float* out) {
    auto& shared = shared_memory<Shared<T>>();
    const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += warp_size) {
        shared.a[i / 16][i % 16] = a[i];
        shared.keys[i / 16][i % 16] = keys[i];
        shared.values[i / 16][i % 16] = values[i];
    }
    __syncwarp();
    const auto place = [&](int n, int i) { return (g + i / 2 * 8) * 16 + n * 8 + t * 2 + i % 2; };
    float s[2][4], o[2][4] = {};
    for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) s[n][i] = c[place(n, i)];
    const Matrices left = load_matrices(&shared.a[lane % 16][lane / 16 * 8]);
    const Matrices right = load_matrices(&shared.keys[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
    mma(s[0], left.x, right.x[0], right.x[1], T{});
    mma(s[1], left.x, right.x[2], right.x[3], T{});
    uint32_t p[4];
    for (int n = 0; n < 2; ++n)
        for (int half = 0; half < 2; ++half) p[n * 2 + half] = rounded_pair(s[n][half * 2], s[n][half * 2 + 1], T{});
    const Matrices across = load_matrices<true>(&shared.values[lane % 16][lane / 16 * 8]);
    mma(o[0], p, across.x[0], across.x[1], T{});
    mma(o[1], p, across.x[2], across.x[3], T{});
    for (int n = 0; n < 2; ++n)
        for (int i = 0; i < 4; ++i) {
            scores[place(n, i)] = s[n][i];
            out[place(n, i)] = o[n][i];
        }
}

}  // namespace

void multiply_fragments(const void* a, const void* keys, const void* values, const float* c, float* scores, float* out,
                        DType dtype) {
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        launch("products", products<T>, dim3(1), warp_size, sizeof(Shared<T>), Queue{0, nullptr},
               static_cast<const T*>(a), static_cast<const T*>(keys), static_cast<const T*>(values), c, scores, out);
    };
    if (dtype == DType::bfloat16)
        run(bf16{});
    else
        run(f16{});
}

}  // namespace cuda
}  // namespace pyrlhf
