// What rms_norm and layer_norm share: reading x + residual, sums over a row, and a backward that adds up weight
// gradients over blocks of rows that depend on the shape alone, so that its bits do not depend on the number of
// threads.
#pragma once

#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t worth_a_fork = 8192;  // elements; below, waking the other threads takes longer than the work

// Row i of an array [rows, size] of T, null where the array is.
template <typename T>
PYRLHF_INLINE const T* row_of(const void* array, int64_t i, int64_t size) {
    return array ? static_cast<const T*>(array) + i * size : nullptr;
}
template <typename T>
PYRLHF_INLINE T* row_of(void* array, int64_t i, int64_t size) {
    return array ? static_cast<T*>(array) + i * size : nullptr;
}

// Elements from j on of what is normalised: x, or x + residual (may be null) rounded to their dtype.
template <typename T, typename Lanes>
PYRLHF_INLINE vf summed(const T* x, const T* residual, int64_t j, Lanes lanes) {
    const vf first = load(x + j, lanes);
    return residual ? rounded<T>(first + load(residual + j, lanes)) : first;
}

// N sums over a row: add(j, lanes, sums) adds the elements from j on to the N vectors `sums`. Four sums a number hide
// the latency of an addition, and none of them grows over more than 16 vectors before it is folded into the total.
template <int N, typename Add>
PYRLHF_INLINE void row_sums(int64_t size, float* out, Add add) {
    constexpr int64_t step = 4 * W;
    vf total[N] = {};
    int64_t j = 0;
    while (j + step <= size) {
        vf sums[4][N] = {};
        const int64_t end = j + 16 * step < size ? j + 16 * step : size;
        for (; j + step <= end; j += step)
            for (int k = 0; k < 4; ++k) add(j + k * W, Whole{}, sums[k]);
        for (int i = 0; i < N; ++i) total[i] += (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    }
    for (; j + W <= size; j += W) add(j, Whole{}, total);
    if (j < size) add(j, Part{static_cast<int>(size - j)}, total);
    for (int i = 0; i < N; ++i) out[i] = sum_lanes(total[i]);
}

// row(i, held) for every row; held is the thread's own row of scratch [threads, size], for what its passes share.
template <typename Row>
PYRLHF_INLINE void for_rows(int64_t rows, int64_t size, float* scratch, int threads, Row row) {
    const bool alone = rows * size < worth_a_fork;
#pragma omp parallel num_threads(alone ? 1 : threads)
    {
        float* const held = scratch + omp_get_thread_num() * size;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < rows; ++i) row(i, held);
        end_of_streams();
    }
}

// out = the sum of `blocks` arrays that lie `stride` floats apart, in order, in double.
template <typename P, typename Lanes>
PYRLHF_INLINE void sum_blocks(const float* from, int64_t blocks, int64_t stride, P* out, Lanes lanes) {
    vd low = {}, high = {};
    for (int64_t b = 0; b < blocks; ++b) {
        vf_half halves[2];
        const vf x = load(from + b * stride, lanes);
        memcpy(halves, &x, sizeof(x));
        low += __builtin_convertvector(halves[0], vd);
        high += __builtin_convertvector(halves[1], vd);
    }
    const vf_half halves[2] = {__builtin_convertvector(low, vf_half), __builtin_convertvector(high, vf_half)};
    vf x;
    memcpy(&x, halves, sizeof(x));
    store(out, x, lanes);
}

// row(i, partial) for every row: partial is [N, size] floats, to which it adds its share of the gradients of the N
// parameters `grads`, [size] each. They are the sums of the blocks' partials in `scratch`.
template <int N, typename P, typename Row>
PYRLHF_INLINE void for_rows_backward(int64_t rows, int64_t size, float* scratch, P* const (&grads)[N], int threads,
                                     Row row) {
    const int64_t blocks = (rows + norm_block - 1) / norm_block, stride = N * size;
    const bool alone = rows * size < worth_a_fork;
#pragma omp parallel num_threads(alone ? 1 : threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            float* partial = scratch + b * stride;
            memset(partial, 0, sizeof(float) * static_cast<size_t>(stride));
            const int64_t last = (b + 1) * norm_block < rows ? (b + 1) * norm_block : rows;
            for (int64_t i = b * norm_block; i < last; ++i) row(i, partial);
        }
#pragma omp for schedule(static) nowait
        for (int64_t j = 0; j < size; j += W) {
            for (int k = 0; k < N; ++k) {
                const float* from = scratch + k * size + j;
                if (j + W <= size)
                    sum_blocks(from, blocks, stride, grads[k] + j, Whole{});
                else
                    sum_blocks(from, blocks, stride, grads[k] + j, Part{static_cast<int>(size - j)});
            }
        }
        end_of_streams();
    }
}

}  // namespace
}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
