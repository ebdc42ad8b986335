// PPO's clipped policy loss and clipped value loss on a GPU: one pass over the tokens writes both gradients and a row
// of sums a block of ppo_block tokens; a second, small kernel adds the rows up.
//
// A token moves 36 bytes (32 with the default weights) and costs about a hundred instructions, so memory is the limit:
// a thread asks for all of its two packs of every input, 16 bytes each, before it uses the first. A block is always the
// same ppo_block tokens and thread i always takes its packs i and i + threads; sums are taken over a thread's 8 tokens
// in float, over the block in double, and over the blocks in double by the same thread in the same order. Nothing
// depends on the number of blocks that run at once, and no block waits for another.
//
// Unaligned inputs and the last, partial block are read one number at a time, by the same thread into the same sum.
#include "core/exp.h"
#include "core/ppo_loss.h"
#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

using Numbers = Pack<float>;

constexpr int threads = 256;
constexpr int total_threads = 256, total_warps = total_threads / warp_size;  // of the second kernel

// e^x, and e^x - 1 - x free of cancellation, as csrc/cpu/simd.h computes them. NaN stays NaN.
PYRLHF_DEVICE float exp_and_rest(float x, float& rest) {
    const float bounded = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
    const float n = rintf(bounded * per_ln2);
    const float r = fmaf(n, -ln2_low, fmaf(n, -ln2_high, bounded));
    const float tail = exp_tail(r);
    const int exponent = n != n ? 0 : static_cast<int>(n), half = exponent >> 1;
    const float result =
        ((tail + r) + 1.0f) * __int_as_float((half + 127) << 23) * __int_as_float((exponent - half + 127) << 23);
    rest = exponent == 0 ? tail : (result - 1.0f) - x;
    return result;
}

using Sums = PpoSums<float>;

PYRLHF_DEVICE void add_token(const PpoToken<float>& x, const PpoOptions& options, Sums& sums, float& grad_logprob,
                             float& grad_value) {
    float kl;
    const float ratio = exp_and_rest(x.logprob - x.old_logprob, kl);
    const PpoTerms<float> terms = ppo_terms<float>(x, ratio, kl, options);
    grad_logprob = terms.grad_logprob;
    grad_value = terms.grad_value;
    ppo_add(sums, terms);
}

// Four tokens, of which the first `left` are there; the others read 0. whole: all are, on 16 bytes.
template <bool whole>
PYRLHF_DEVICE Numbers read(const float* from, int left) {
    Numbers out;
    if constexpr (whole) {
        out = load_pack(from);
    } else {
#pragma unroll
        for (int k = 0; k < Numbers::size; ++k) out.at[k] = k < left ? from[k] : 0.0f;
    }
    return out;
}

template <bool whole>
PYRLHF_DEVICE void write(float* to, const Numbers& x, int left) {
    if constexpr (whole) {
        store_pack(to, x);
    } else {
#pragma unroll
        for (int k = 0; k < Numbers::size; ++k)
            if (k < left) to[k] = x.at[k];
    }
}

struct Packs {
    Numbers logprob, old_logprob, advantage, value, old_value, target, weight;
};

template <bool whole>
PYRLHF_DEVICE Packs read_packs(const PpoArrays& in, float weight, int64_t at, int left) {
    Packs out = {read<whole>(in.logprobs + at, left),
                 read<whole>(in.old_logprobs + at, left),
                 read<whole>(in.advantages + at, left),
                 read<whole>(in.values + at, left),
                 read<whole>(in.old_values + at, left),
                 read<whole>(in.returns + at, left),
                 Numbers{}};
    if (in.weights) {
        out.weight = read<whole>(in.weights + at, left);
    } else {
#pragma unroll
        for (int k = 0; k < Numbers::size; ++k) out.weight.at[k] = whole || k < left ? weight : 0.0f;
    }
    return out;
}

// Tokens that are not there have weight 0 and harmless numbers.
template <bool whole>
PYRLHF_DEVICE Sums sum_thread(const PpoArrays& in, const PpoOptions& options, int64_t first, int count,
                              float* grad_logprobs, float* grad_values) {
    Sums sums = {};
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x) * Numbers::size; at < count; at += threads * Numbers::size) {
        const Packs x = read_packs<whole>(in, options.weight, first + at, count - at);
        Numbers grad_logprob, grad_value;
#pragma unroll
        for (int k = 0; k < Numbers::size; ++k)
            add_token({x.logprob.at[k], x.old_logprob.at[k], x.advantage.at[k], x.value.at[k], x.old_value.at[k],
                       x.target.at[k], x.weight.at[k]},
                      options, sums, grad_logprob.at[k], grad_value.at[k]);
        write<whole>(grad_logprobs + first + at, grad_logprob, count - at);
        write<whole>(grad_values + first + at, grad_value, count - at);
    }
    return sums;
}

// Two parts of sum k joined: the last one is a maximum, in which a NaN stays.
PYRLHF_DEVICE double join(int k, double a, double b) {
    if (k < ppo_sums - 1) return a + b;
    return b > a || b != b ? b : a;
}

PYRLHF_DEVICE double warp_join(int k, double x) {
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2) x = join(k, x, __shfl_xor_sync(all_lanes, x, step));
    return x;
}

constexpr int warps = threads / warp_size;

struct Shared {
    double sums[warps][ppo_sums];
};

// rows [ppo_sums, blocks]: what this block's tokens add to each sum, and their largest ratio. No comparison finds a NaN
// ratio, but their sum shows it.
PYRLHF_DEVICE void write_row(const Sums& sums, double* rows) {
    Shared& shared = shared_memory<Shared>();
    const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
    const float largest = sums.ratio != sums.ratio ? sums.ratio : sums.ratio_max;
    const float mine[ppo_sums] = {sums.policy,        sums.value, sums.kl, sums.clipped,
                                  sums.value_clipped, sums.ratio, largest};
#pragma unroll
    for (int k = 0; k < ppo_sums; ++k) {
        const double joined = warp_join(k, static_cast<double>(mine[k]));
        if (lane == 0) shared.sums[warp][k] = joined;
    }
    __syncthreads();
    const int k = static_cast<int>(threadIdx.x);
    if (k >= ppo_sums) return;
    double total = shared.sums[0][k];
    for (int w = 1; w < warps; ++w) total = join(k, total, shared.sums[w][k]);
    rows[int64_t{k} * gridDim.x + blockIdx.x] = total;
}

template <bool aligned>
__global__ void __launch_bounds__(threads, 4)
    ppo_loss_kernel(const PpoArrays in, const PpoOptions options, int64_t n, float* __restrict__ grad_logprobs,
                    float* __restrict__ grad_values, double* __restrict__ rows) {
    const int64_t first = blockIdx.x * ppo_block;
    const int count = static_cast<int>(min(n - first, ppo_block));
    const Sums sums = aligned && count == ppo_block
                          ? sum_thread<aligned>(in, options, first, count, grad_logprobs, grad_values)
                          : sum_thread<false>(in, options, first, count, grad_logprobs, grad_values);
    write_row(sums, rows);
}

struct SharedTotals {
    double sums[total_warps];
};

// One block a sum.
__global__ void __launch_bounds__(total_threads)
    ppo_loss_totals_kernel(const double* __restrict__ rows, int64_t blocks, float* __restrict__ policy,
                           float* __restrict__ value, float* __restrict__ stats) {
    SharedTotals& shared = shared_memory<SharedTotals>();
    const int k = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
    double total = 0.0;
#pragma unroll 8
    for (int64_t b = thread; b < blocks; b += total_threads) total = join(k, total, rows[k * blocks + b]);
    total = warp_join(k, total);
    if (thread % warp_size == 0) shared.sums[thread / warp_size] = total;
    __syncthreads();
    if (thread > 0) return;
    for (int w = 1; w < total_warps; ++w) total = join(k, total, shared.sums[w]);
    const float out = static_cast<float>(k == 1 ? 0.5 * total : total);
    *(k == 0 ? policy : k == 1 ? value : stats + (k - 2)) = out;
}

}  // namespace

void ppo_loss(const PpoArrays& in, const PpoOptions& options, int64_t n, float* grad_logprobs, float* grad_values,
              float* policy, float* value, float* stats, double* rows, Queue queue) {
    const int64_t blocks = ceil_div(n, ppo_block);
    const bool aligned = on_16_bytes(in.logprobs, in.old_logprobs, in.advantages, in.values, in.old_values, in.returns,
                                     in.weights, grad_logprobs, grad_values);
    if (blocks > 0)
        launch("ppo_loss", aligned ? ppo_loss_kernel<true> : ppo_loss_kernel<false>,
               dim3(static_cast<unsigned>(blocks)), threads, sizeof(Shared), queue, in, options, n, grad_logprobs,
               grad_values, rows);
    launch("ppo_loss", ppo_loss_totals_kernel, dim3(ppo_sums), total_threads, sizeof(SharedTotals), queue, rows, blocks,
           policy, value, stats);
}

}  // namespace cuda
}  // namespace pyrlhf
