#include <memory>

#include "cuda/device.h"
#include "plants.h"

namespace pyrlhf {
namespace cuda {
namespace {

constexpr int threads = 128;

enum Plant : int {
    none,
    missing_barrier,
    unwritten_shared,
    beyond_shared,
    beyond_array_in_shared,
    beyond_global,
    misaligned_pack,
    barrier_not_reached,
    lanes_apart,
    copy_not_waited_for,
    warps_in_step,
};

struct Shared {
    float x[threads];
    float rest[4];
};

__global__ void reverse(const float* in, float* out, Plant plant) {
    Shared& shared = shared_memory<Shared>();
    const int i = static_cast<int>(threadIdx.x);
    if (plant == copy_not_waited_for) {
        copy_async<sizeof(float)>(&shared.x[i], &in[i]);
        close_async();
    } else if (plant != unwritten_shared || i != 5) {
        shared.x[i] = in[i];
    }
    if (plant == beyond_shared) reinterpret_cast<volatile float*>(&shared)[threads + 4 + i] = 1.0f;
    if (plant == beyond_array_in_shared) shared.rest[i] = 1.0f;
    if (plant == misaligned_pack && i == 0) store_pack(out, load_pack(in + 1));
    if (plant == barrier_not_reached && i >= 64) return;
    if (plant == warps_in_step) {
        for (int step = 0; step < 8; ++step) warp_sum(1.0f);  // the lanes of a warp wait for each other, not the warps
    } else if (plant != missing_barrier) {
        __syncthreads();
    }
    if (plant == lanes_apart) {
        if (i % 2) {
            warp_sum(1.0f);
        } else {
            warp_max(1.0f);
        }
    }
    out[i + (plant == beyond_global)] = shared.x[threads - 1 - i];
}

}  // namespace

std::vector<float> plant(const std::string& fault) {
    static const char* const names[] = {
        "none",          "missing_barrier", "unwritten_shared",    "beyond_shared", "beyond_array_in_shared",
        "beyond_global", "misaligned_pack", "barrier_not_reached", "lanes_apart",   "copy_not_waited_for",
        "warps_in_step"};
    int which = 0;
    while (fault != names[which]) ++which;
    const std::unique_ptr<float[]> in(new float[threads]), out(new float[threads]);
    for (int i = 0; i < threads; ++i) in[i] = static_cast<float>(i);
    launch("plant", reverse, dim3(1), threads, sizeof(Shared), Queue{0, nullptr}, in.get(), out.get(),
           static_cast<Plant>(which));
    return {out.get(), out.get() + threads};
}

}  // namespace cuda
}  // namespace pyrlhf
