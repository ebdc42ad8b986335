// The kernels of rms_norm and layer_norm: one pass over memory forward, one backward.
//
// A row belongs to a warp (up to 128 packs of 16 bytes) or to a block, and stays in registers between its sums and what
// is written from them: pack k of thread t is number k * lanes + t. Rows that are too long for that, or whose elements
// do not come in aligned packs, are read again from the caches by the same threads (the ...again kernels).
// - The rounded sum x + residual is what is normalised; all arithmetic is float32, the variance taken around the mean.
// - A row's bits depend on its length alone: threads and their order of addition are chosen by length and alignment.
// - Backward, a block (or warp) takes a group of neighbouring rows and adds up their share of the parameters' gradients
//   where only it writes: in shared memory, each thread its own columns, or in the scratch itself. A second kernel sums
//   the groups in a fixed order. How rows are grouped depends on the shape alone, so the bits are the same on every run
//   and every device.
#pragma once

#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

// --- Rows, threads and packs ---

template <int lanes>
constexpr int norm_threads = lanes == warp_size ? 4 * warp_size : lanes;

// Whose row this thread works on: a warp's or the block's.
template <int lanes>
struct Turn {
    int lane, in_block;  // this thread within the row, and the row (or group of rows) within the block
    int64_t number;      // of the row (or group) within the grid
    PYRLHF_DEVICE Turn()
        : lane(static_cast<int>(threadIdx.x) % lanes),
          in_block(static_cast<int>(threadIdx.x) / lanes),
          number(int64_t{blockIdx.x} * (norm_threads<lanes> / lanes) + in_block) {}
};

// `width` elements that lie together.
template <typename T, int width>
struct alignas(width * sizeof(T)) Few {
    T at[width];
};

template <int width, typename T>
PYRLHF_DEVICE Few<T, width> load_few(const T* from) {
    return *reinterpret_cast<const Few<T, width>*>(from);
}
template <typename T, int width>
PYRLHF_DEVICE void store_few(T* to, const Few<T, width>& few) {
    *reinterpret_cast<Few<T, width>*>(to) = few;
}

// What was computed from few before is computed again after, not kept in registers: as floats it would take twice the
// room.
template <typename T, int width>
PYRLHF_DEVICE void forget([[maybe_unused]] Few<T, width>& few) {
#if defined(__CUDACC__)
    static_assert(sizeof(few) % sizeof(uint32_t) == 0, "whole registers");
    uint32_t* const words = reinterpret_cast<uint32_t*>(few.at);
#    pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(few) / sizeof(uint32_t)); ++i) asm volatile("" : "+r"(words[i]));
#endif
}

// `width` parameters as floats, in accesses of at most 16 bytes.
template <int width, typename P>
PYRLHF_DEVICE void load_floats(const P* from, float (&to)[width]) {
    constexpr int most = 16 / static_cast<int>(sizeof(P)), step = width < most ? width : most;
#pragma unroll
    for (int i = 0; i < width; i += step) {
        const Few<P, step> some = load_few<step>(from + i);
#pragma unroll
        for (int e = 0; e < step; ++e) to[i + e] = to_float(some.at[e]);
    }
}

template <typename T>
PYRLHF_DEVICE const T* row_of(const void* array, int64_t row, int64_t size) {
    return array ? static_cast<const T*>(array) + row * size : nullptr;
}
template <typename T>
PYRLHF_DEVICE T* row_of(void* array, int64_t row, int64_t size) {
    return array ? static_cast<T*>(array) + row * size : nullptr;
}

// --- Sums over a row ---

// Room for one sum of N numbers over a block's threads; a warp needs none.
template <int lanes, int N>
struct Joined {
    float of_warps[N][lanes / warp_size];
};

// x becomes its sum over the row's threads, the same bits in each. The room may be used again only after another such
// sum, over the same threads and in other room, has been taken: that is what all have read this one by.
template <int lanes, int N>
PYRLHF_DEVICE void join(float (&x)[N], Joined<lanes, N>& room) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
    if constexpr (lanes > warp_size) {
        if (threadIdx.x % warp_size == 0) {
#pragma unroll
            for (int i = 0; i < N; ++i) room.of_warps[i][threadIdx.x / warp_size] = x[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = room.of_warps[i][0];
#pragma unroll
            for (int w = 1; w < lanes / warp_size; ++w) x[i] += room.of_warps[i][w];
        }
    }
}

// --- Forward ---

struct Statistics {
    float mean, rstd;
};

template <int lanes>
struct ForwardShared {
    Joined<lanes, 1> total;
    Joined<lanes, 2> distances;
};

// The statistics of a row whose elements for_elements(f) hands to f, the same ones each time it is called. The mean of
// the total is off by its rounding: the mean distance to it mends both moments.
template <bool centred, int lanes, typename Shared, typename ForElements>
PYRLHF_DEVICE Statistics statistics(const NormForward& a, Shared& shared, ForElements for_elements) {
    float total[1] = {};
    for_elements([&](float s) { total[0] += centred ? s : s * s; });
    join<lanes>(total, shared.total);
    if constexpr (!centred) return {0.0f, 1.0f / sqrtf(total[0] * a.inverse_size + a.eps)};
    const float about = total[0] * a.inverse_size;
    float distances[2] = {};
    for_elements([&](float s) {
        const float distance = s - about;
        distances[0] += distance;
        distances[1] += distance * distance;
    });
    join<lanes>(distances, shared.distances);
    const float off = distances[0] * a.inverse_size;
    return {about + off, 1.0f / sqrtf(distances[1] * a.inverse_size - off * off + a.eps)};
}

template <bool centred>
PYRLHF_DEVICE void keep_statistics(const NormForward& a, int64_t row, Statistics found) {
    if constexpr (centred) a.mean[row] = found.mean;
    a.rstd[row] = found.rstd;
}

// What is written for the elements of s, which begin at column `first`.
template <bool centred, typename P, typename T, int width>
PYRLHF_DEVICE Few<T, width> normalised(const Few<T, width>& s, Statistics found, const P* weight, const P* bias,
                                       int64_t first) {
    float scale[width], shift[width] = {};
    load_floats<width>(weight + first, scale);
    if constexpr (centred) load_floats<width>(bias + first, shift);
    Few<T, width> out;
#pragma unroll
    for (int e = 0; e < width; ++e) {
        const float n = (centred ? to_float(s.at[e]) - found.mean : to_float(s.at[e])) * found.rstd;
        from_float(centred ? n * scale[e] + shift[e] : n * scale[e], out.at[e]);
    }
    return out;
}

template <typename T, int width>
PYRLHF_DEVICE Few<T, width> added(const Few<T, width>& x, const Few<T, width>& y) {
    Few<T, width> out;
#pragma unroll
    for (int e = 0; e < width; ++e) from_float(to_float(x.at[e]) + to_float(y.at[e]), out.at[e]);
    return out;
}

template <typename T, typename P, bool centred, int lanes, int packs>
__global__ void __launch_bounds__(norm_threads<lanes>) forward_kernel(NormForward a) {
    constexpr int width = Pack<T>::size;
    ForwardShared<lanes>& shared = shared_memory<ForwardShared<lanes>>();
    const Turn<lanes> turn;
    const int64_t row = turn.number;
    if (row >= a.rows) return;  // a whole warp, with no other to meet: where a row is a block's, the grid is the rows
    const int size = static_cast<int>(a.size);
    const T* __restrict__ x = row_of<T>(a.x, row, a.size);
    const T* __restrict__ residual = row_of<T>(a.residual, row, a.size);
    T* __restrict__ sum = row_of<T>(a.sum, row, a.size);
    T* __restrict__ out = row_of<T>(a.out, row, a.size);
    const auto column = [&](int k) { return (k * lanes + turn.lane) * width; };

    Few<T, width> held[packs] = {}, other[packs] = {};
#pragma unroll
    for (int k = 0; k < packs; ++k)
        if (column(k) < size) held[k] = load_few<width>(x + column(k));
    if (residual) {
#pragma unroll
        for (int k = 0; k < packs; ++k)
            if (column(k) < size) other[k] = load_few<width>(residual + column(k));
#pragma unroll
        for (int k = 0; k < packs; ++k) {
            held[k] = added(held[k], other[k]);
            if (column(k) < size) store_few(sum + column(k), held[k]);
        }
    }
    const Statistics found = statistics<centred, lanes>(a, shared, [&](auto&& element) {
#pragma unroll
        for (int k = 0; k < packs; ++k) {
            if (column(k) >= size) continue;
#pragma unroll
            for (int e = 0; e < width; ++e) element(to_float(held[k].at[e]));
        }
    });
    if (turn.lane == 0) keep_statistics<centred>(a, row, found);
#pragma unroll
    for (int k = 0; k < packs; ++k) {
        if (column(k) >= size) continue;
        store_few(out + column(k), normalised<centred>(held[k], found, static_cast<const P*>(a.weight),
                                                       static_cast<const P*>(a.bias), column(k)));
    }
}

// The same for rows of any length, `width` elements at a time.
template <typename T, typename P, bool centred, int lanes, int width>
__global__ void __launch_bounds__(norm_threads<lanes>) forward_again_kernel(NormForward a) {
    ForwardShared<lanes>& shared = shared_memory<ForwardShared<lanes>>();
    const Turn<lanes> turn;
    const int64_t row = turn.number;
    if (row >= a.rows) return;
    const T *x = row_of<T>(a.x, row, a.size), *residual = row_of<T>(a.residual, row, a.size);
    T *sum = row_of<T>(a.sum, row, a.size), *out = row_of<T>(a.out, row, a.size);
    const int64_t begin = turn.lane * width, step = lanes * width;

    if (residual) {
        for (int64_t j = begin; j < a.size; j += step)
            store_few(sum + j, added(load_few<width>(x + j), load_few<width>(residual + j)));
    }
    const T* const summed = residual ? sum : x;  // each thread reads what it wrote itself
    const Statistics found = statistics<centred, lanes>(a, shared, [&](auto&& element) {
        for (int64_t j = begin; j < a.size; j += step) {
            const Few<T, width> s = load_few<width>(summed + j);
#pragma unroll
            for (int e = 0; e < width; ++e) element(to_float(s.at[e]));
        }
    });
    if (turn.lane == 0) keep_statistics<centred>(a, row, found);
    for (int64_t j = begin; j < a.size; j += step)
        store_few(out + j, normalised<centred>(load_few<width>(summed + j), found, static_cast<const P*>(a.weight),
                                               static_cast<const P*>(a.bias), j));
}

// --- Backward ---
// With n = (x - mean) * rstd and g = grad_out * weight: grad_x = (g - n * mean(g * n) - mean(g)) * rstd + grad_sum, the
// last mean for layer_norm alone; grad_weight and grad_bias are the sums over the rows of grad_out * n and grad_out.

template <bool centred>
constexpr int parameters = centred ? 2 : 1;

// The sums over a row of g * n and, centred, of g. Consecutive rows take turns with the room.
template <int lanes, int N>
struct RowSums {
    Joined<lanes, N> room[2];
};

template <bool centred>
struct RowBackward {
    Statistics found;
    float slope = 0.0f, mean = 0.0f;  // the means of g * n and of g

    PYRLHF_DEVICE float n(float x) const { return (centred ? x - found.mean : x) * found.rstd; }
    PYRLHF_DEVICE float grad_x(float g, float x) const {
        const float off = centred ? g - mean : g;
        return (off - n(x) * slope) * found.rstd;
    }
    template <int lanes>
    PYRLHF_DEVICE void join(float (&sums)[parameters<centred>], float inverse_size,
                            Joined<lanes, parameters<centred>>& room) {
        cuda::join<lanes>(sums, room);
        slope = sums[0] * inverse_size;
        if constexpr (centred) mean = sums[1] * inverse_size;
    }
};

template <bool centred>
PYRLHF_DEVICE RowBackward<centred> begin_row(const NormBackward& a, int64_t row) {
    RowBackward<centred> out;
    out.found.mean = centred ? a.mean[row] : 0.0f;
    out.found.rstd = a.rstd[row];
    return out;
}

template <bool centred, typename P, typename T, int width>
PYRLHF_DEVICE Few<T, width> gradient(const RowBackward<centred>& r, const Few<T, width>& grad, const Few<T, width>& x,
                                     const Few<T, width>& more, const P* weight) {
    float scale[width];
    load_floats<width>(weight, scale);
    Few<T, width> out;
#pragma unroll
    for (int e = 0; e < width; ++e)
        from_float(r.grad_x(to_float(grad.at[e]) * scale[e], to_float(x.at[e])) + to_float(more.at[e]), out.at[e]);
    return out;
}

// grad_out's share of the parameters' gradients, float4 by float4, so that a warp's accesses have no bank conflicts.
template <bool centred, int lanes, int floats>
struct BackwardShared {
    RowSums<lanes, parameters<centred>> sums;
    Few<float, 4> by[parameters<centred>][floats / 4][norm_threads<lanes>];
};

template <typename T, typename P, bool centred, int lanes, int packs>
__global__ void __launch_bounds__(norm_threads<lanes>) backward_kernel(NormBackward a) {
    constexpr int width = Pack<T>::size, N = parameters<centred>, quads = width / 4;
    using Shared = BackwardShared<centred, lanes, packs * width>;
    Shared& shared = shared_memory<Shared>();
    const Turn<lanes> turn;
    const int64_t group = turn.number;
    if (group >= a.groups) return;  // a whole warp, as in the forward
    const int size = static_cast<int>(a.size);
    const P* __restrict__ weight = static_cast<const P*>(a.weight);
    const auto column = [&](int k) { return (k * lanes + turn.lane) * width; };
    const int64_t end = min(a.rows, (group + 1) * a.group_rows);

#pragma unroll
    for (int p = 0; p < N; ++p)
#pragma unroll
        for (int q = 0; q < packs * quads; ++q) shared.by[p][q][threadIdx.x] = {};

    for (int64_t row = group * a.group_rows; row < end; ++row) {
        const T* __restrict__ grad_out = row_of<T>(a.grad_out, row, a.size);
        const T* __restrict__ grad_sum = row_of<T>(a.grad_sum, row, a.size);
        const T* __restrict__ summed = row_of<T>(a.summed, row, a.size);
        T* __restrict__ grad_x = row_of<T>(a.grad_x, row, a.size);
        Few<T, width> grad[packs] = {}, x[packs] = {}, more[packs] = {};
        const auto load_more = [&] {
            if (!grad_sum) return;
#pragma unroll
            for (int k = 0; k < packs; ++k)
                if (column(k) < size) more[k] = load_few<width>(grad_sum + column(k));
        };
#pragma unroll
        for (int k = 0; k < packs; ++k) {
            if (column(k) >= size) continue;
            grad[k] = load_few<width>(grad_out + column(k));
            x[k] = load_few<width>(summed + column(k));
        }
        if constexpr (packs <= 4) load_more();
        RowBackward<centred> r = begin_row<centred>(a, row);
        float sums[N] = {};
#pragma unroll
        for (int k = 0; k < packs; ++k) {
            if (column(k) >= size) continue;
            float scale[width];
            load_floats<width>(weight + column(k), scale);
#pragma unroll
            for (int q = 0; q < quads; ++q) {
                Few<float, 4> by[N];
#pragma unroll
                for (int p = 0; p < N; ++p) by[p] = shared.by[p][k * quads + q][threadIdx.x];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float g = to_float(grad[k].at[4 * q + e]), n = r.n(to_float(x[k].at[4 * q + e]));
                    sums[0] += g * n * scale[4 * q + e];
                    by[0].at[e] += g * n;
                    if constexpr (centred) {
                        sums[1] += g * scale[4 * q + e];
                        by[1].at[e] += g;
                    }
                }
#pragma unroll
                for (int p = 0; p < N; ++p) shared.by[p][k * quads + q][threadIdx.x] = by[p];
            }
        }
        r.template join<lanes>(sums, a.inverse_size, shared.sums.room[row % 2]);
#pragma unroll
        for (int k = 0; k < packs; ++k) {
            forget(grad[k]);
            forget(x[k]);
        }
        if constexpr (packs > 4) load_more();  // else early, so that it comes with the others; here there is no room
#pragma unroll
        for (int k = 0; k < packs; ++k)
            if (column(k) < size)
                store_few(grad_x + column(k), gradient(r, grad[k], x[k], more[k], weight + column(k)));
    }

#pragma unroll
    for (int p = 0; p < N; ++p) {
        float* const to = a.partials + (group * N + p) * a.size;
#pragma unroll
        for (int k = 0; k < packs; ++k)
#pragma unroll
            for (int q = 0; q < quads; ++q)
                if (column(k) < size) store_few(to + column(k) + 4 * q, shared.by[p][k * quads + q][threadIdx.x]);
    }
}

// The same for rows of any length, `width` elements at a time. The group's share adds up in the scratch.
template <typename T, typename P, bool centred, int lanes, int width>
__global__ void __launch_bounds__(norm_threads<lanes>) backward_again_kernel(NormBackward a) {
    constexpr int N = parameters<centred>;
    RowSums<lanes, N>& shared = shared_memory<RowSums<lanes, N>>();
    const Turn<lanes> turn;
    const int64_t group = turn.number;
    if (group >= a.groups) return;
    const P* __restrict__ weight = static_cast<const P*>(a.weight);
    const int64_t begin = turn.lane * width, step = lanes * width, end = min(a.rows, (group + 1) * a.group_rows);
    float *const by_weight = a.partials + group * N * a.size, *const by_bias = by_weight + a.size;

    for (int64_t j = begin; j < a.size; j += step)
#pragma unroll
        for (int e = 0; e < width; ++e) {
            by_weight[j + e] = 0.0f;
            if constexpr (centred) by_bias[j + e] = 0.0f;
        }
    for (int64_t row = group * a.group_rows; row < end; ++row) {
        const T *grad_out = row_of<T>(a.grad_out, row, a.size), *grad_sum = row_of<T>(a.grad_sum, row, a.size);
        const T* summed = row_of<T>(a.summed, row, a.size);
        T* grad_x = row_of<T>(a.grad_x, row, a.size);
        RowBackward<centred> r = begin_row<centred>(a, row);
        float sums[N] = {};
        for (int64_t j = begin; j < a.size; j += step) {
            const Few<T, width> grad = load_few<width>(grad_out + j), x = load_few<width>(summed + j);
            float scale[width];
            load_floats<width>(weight + j, scale);
#pragma unroll
            for (int e = 0; e < width; ++e) {
                const float g = to_float(grad.at[e]), n = r.n(to_float(x.at[e]));
                sums[0] += g * n * scale[e];
                by_weight[j + e] += g * n;
                if constexpr (centred) {
                    sums[1] += g * scale[e];
                    by_bias[j + e] += g;
                }
            }
        }
        r.template join<lanes>(sums, a.inverse_size, shared.room[row % 2]);
        for (int64_t j = begin; j < a.size; j += step) {
            const Few<T, width> grad = load_few<width>(grad_out + j), x = load_few<width>(summed + j);
            Few<T, width> more = {};
            if (grad_sum) more = load_few<width>(grad_sum + j);
            store_few(grad_x + j, gradient(r, grad, x, more, weight + j));
        }
    }
}

// The parameters' gradients: column by column the sum of the groups' shares. A block takes 8 columns (32 bytes, a
// sector) of the parameter blockIdx.y; its 32 threads a column take every 32nd group, and one adds up their sums.
constexpr int sum_threads = 256, sum_columns = 8, sum_ways = sum_threads / sum_columns;
struct SumShared {
    float by[sum_ways][sum_columns];
};

template <typename P>
__global__ void __launch_bounds__(sum_threads)
    sum_groups_kernel(const float* __restrict__ partials, int64_t groups, int64_t size, P* grad_weight, P* grad_bias) {
    SumShared& shared = shared_memory<SumShared>();
    const int way = static_cast<int>(threadIdx.x) / sum_columns, c = static_cast<int>(threadIdx.x) % sum_columns;
    const int64_t column = int64_t{blockIdx.x} * sum_columns + c, stride = int64_t{gridDim.y} * size;
    const float* from = partials + blockIdx.y * size + column;
    float sum = 0.0f;
    if (column < size) {
#pragma unroll 8
        for (int64_t g = way; g < groups; g += sum_ways) sum += from[g * stride];
    }
    shared.by[way][c] = sum;
    __syncthreads();
    if (way > 0 || column >= size) return;
#pragma unroll
    for (int w = 1; w < sum_ways; ++w) sum += shared.by[w][c];
    from_float(sum, (blockIdx.y == 0 ? grad_weight : grad_bias)[column]);
}

// --- Launching ---

template <int lanes_, int count_>
struct Way {
    static constexpr int lanes = lanes_, count = count_;  // count: packs a thread, or elements at a time
};

// held(Way<lanes, packs>) for rows that fit in registers, again(Way<lanes, width>) for others.
template <typename T, typename Held, typename Again>
void by_length(int64_t size, bool aligned, Held held, Again again) {
    constexpr int width = Pack<T>::size;
    if (!aligned || size % width != 0) return size <= 1024 ? again(Way<32, 1>{}) : again(Way<256, 1>{});
    const int64_t packs = size / width;
    if (packs <= 32) return held(Way<32, 1>{});
    if (packs <= 64) return held(Way<32, 2>{});
    if (packs <= 128) return held(Way<32, 4>{});
    if (packs <= 256) return held(Way<128, 2>{});
    if (packs <= 512) return held(Way<256, 2>{});
    if (packs <= 1024) return held(Way<256, 4>{});
    if (packs <= 2048) return held(Way<512, 4>{});
    if (size <= 16384) {
        if constexpr (width == 4) return held(Way<512, 8>{});  // float32
    }
    again(Way<256, width>{});
}

template <typename T, typename F>
void by_weight_dtype(DType weight, F f) {
    if (weight == DType::float32) return f(float{});
    f(T{});
}

template <int lanes>
dim3 turns(int64_t count) {
    return dim3(static_cast<unsigned>(ceil_div<int64_t>(count, norm_threads<lanes> / lanes)));
}

template <bool centred>
void norm_forward(const char* op, const NormForward& a, Queue queue) {
    if (a.rows == 0 || a.size == 0) return;
    const bool aligned = on_16_bytes(a.x, a.residual, a.weight, a.bias, a.out, a.sum);
    visit(a.dtype, [&](auto element) {
        using T = decltype(element);
        by_weight_dtype<T>(a.weight_dtype, [&](auto parameter) {
            using P = decltype(parameter);
            const auto run = [&](auto way, auto kernel) {
                constexpr int lanes = decltype(way)::lanes;
                launch(op, kernel, turns<lanes>(a.rows), norm_threads<lanes>, sizeof(ForwardShared<lanes>), queue, a);
            };
            by_length<T>(
                a.size, aligned,
                [&](auto way) { run(way, forward_kernel<T, P, centred, decltype(way)::lanes, decltype(way)::count>); },
                [&](auto way) {
                    run(way, forward_again_kernel<T, P, centred, decltype(way)::lanes, decltype(way)::count>);
                });
        });
    });
}

template <bool centred>
void norm_backward(const char* op, const NormBackward& a, Queue queue) {
    if (a.size == 0) return;
    constexpr int N = parameters<centred>;
    const bool aligned = on_16_bytes(a.grad_out, a.grad_sum, a.summed, a.weight, a.grad_x, a.partials);
    visit(a.dtype, [&](auto element) {
        using T = decltype(element);
        by_weight_dtype<T>(a.weight_dtype, [&](auto parameter) {
            using P = decltype(parameter);
            const auto run = [&](auto way, auto kernel, size_t shared_bytes) {
                constexpr int lanes = decltype(way)::lanes;
                launch(op, kernel, turns<lanes>(a.groups), norm_threads<lanes>, shared_bytes, queue, a);
            };
            if (a.groups > 0)
                by_length<T>(
                    a.size, aligned,
                    [&](auto way) {
                        constexpr int lanes = decltype(way)::lanes, packs = decltype(way)::count;
                        run(way, backward_kernel<T, P, centred, lanes, packs>,
                            sizeof(BackwardShared<centred, lanes, packs * Pack<T>::size>));
                    },
                    [&](auto way) {
                        constexpr int lanes = decltype(way)::lanes, width = decltype(way)::count;
                        run(way, backward_again_kernel<T, P, centred, lanes, width>, sizeof(RowSums<lanes, N>));
                    });
            const dim3 columns(static_cast<unsigned>(ceil_div<int64_t>(a.size, sum_columns)), N);
            launch(op, sum_groups_kernel<P>, columns, sum_threads, sizeof(SumShared), queue,
                   static_cast<const float*>(a.partials), a.groups, a.size, static_cast<P*>(a.grad_weight),
                   static_cast<P*>(a.grad_bias));
        });
    });
}

}  // namespace
}  // namespace cuda
}  // namespace pyrlhf
