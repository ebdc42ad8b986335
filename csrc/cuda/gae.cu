// Generalised advantage estimation on a GPU: one block a sequence, a reverse scan with a carry.
//
// The block walks its sequence from the end in chunks of threads * items tokens. A chunk is read coalesced and turned
// into TD errors in shared memory; each thread scans its own `items` neighbours, a warp shuffle scan and one more over
// the warps join them, and A of the chunk's first token is carried to the chunk before. The recurrence A_t = delta_t +
// c A_{t+1} has a constant factor, so joining two runs needs only powers of c: no pairs are carried. The order of
// additions is fixed.
#include "core/gae.h"
#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

constexpr int threads = 256;
constexpr int items = 4;
constexpr int warps = threads / 32;
constexpr int chunk = threads * items;

// One float of padding every 32 keeps the stride-`items` reads free of bank conflicts.
__device__ __forceinline__ int padded(int i) { return i + i / 32; }

struct Shared {
    float x[chunk + chunk / 32];
    float warp_ends[warps];
};

// Index 0 is the chunk's LAST token: scans run forwards in memory and backwards in time.
__global__ void __launch_bounds__(threads)
    gae_kernel(const float* __restrict__ rewards, const float* __restrict__ values,
               const int32_t* __restrict__ cu_seqlens, const float* __restrict__ bootstrap,
               float* __restrict__ advantages, float* __restrict__ returns, int64_t total, float gamma, float c) {
    Shared& shared = shared_memory<Shared>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Broken offsets cannot be reported from here; clamped, they at least touch nothing outside the batch.
    const int64_t first = max(int64_t{0}, int64_t{cu_seqlens[blockIdx.x]});
    const int64_t last = min(total, int64_t{cu_seqlens[blockIdx.x + 1]});
    const float after = bootstrap ? bootstrap[blockIdx.x] : 0.0f;

    float c_items = 1.0f;  // c^items: how a carry fades over one thread's tokens
    for (int k = 0; k < items; ++k) c_items *= c;
    const float c_warp = powf(c_items, 32.0f);
    const float c_before = powf(c_items, static_cast<float>(lane));

    float carry = 0.0f;
    for (int64_t end = last; end > first; end -= chunk) {
        for (int k = 0; k < items; ++k) {
            const int i = k * threads + threadIdx.x;
            const int64_t t = end - 1 - i;
            float delta = 0.0f;
            if (t >= first) delta = td_error(rewards[t], values[t], t + 1 < last ? values[t + 1] : after, gamma);
            shared.x[padded(i)] = delta;
        }
        __syncthreads();

        float a[items];  // this thread's tokens, scanned alone
        float run = 0.0f;
        for (int k = 0; k < items; ++k) a[k] = run = shared.x[padded(threadIdx.x * items + k)] + c * run;

        float joined = run, factor = c_items;  // inclusive scan over the warp's threads
        for (int step = 1; step < 32; step *= 2) {
            const float other = __shfl_up_sync(0xFFFFFFFFu, joined, step);
            if (lane >= step) joined += factor * other;
            factor *= factor;
        }
        if (lane == 31) shared.warp_ends[warp] = joined;
        __syncthreads();

        float entering = carry;  // what reaches this warp, then (second loop) the next chunk
        for (int w = 0; w < warp; ++w) entering = shared.warp_ends[w] + c_warp * entering;
        float leaving = entering;
        for (int w = warp; w < warps; ++w) leaving = shared.warp_ends[w] + c_warp * leaving;
        carry = leaving;

        const float previous = __shfl_up_sync(0xFFFFFFFFu, joined, 1);
        float fading = (lane > 0 ? previous : 0.0f) + c_before * entering;
        for (int k = 0; k < items; ++k) {
            fading *= c;
            shared.x[padded(threadIdx.x * items + k)] = a[k] + fading;
        }
        __syncthreads();

        for (int k = 0; k < items; ++k) {
            const int i = k * threads + threadIdx.x;
            const int64_t t = end - 1 - i;
            if (t < first) break;
            const float advantage = shared.x[padded(i)];
            advantages[t] = advantage;
            returns[t] = advantage + values[t];
        }
        __syncthreads();
    }
}

}  // namespace

void gae(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
         float* advantages, float* returns, int64_t sequences, int64_t total, float gamma, float lam, int32_t*,
         Queue queue) {
    if (sequences == 0) return;
    launch("gae", gae_kernel, dim3(static_cast<unsigned>(sequences)), threads, sizeof(Shared), queue, rewards, values,
           cu_seqlens, bootstrap, advantages, returns, total, gamma, gamma * lam);
}

}  // namespace cuda
}  // namespace pyrlhf
