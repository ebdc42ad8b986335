// The linear layer of a decode step: a few rows of x times a weight that was laid out once in the order in which it is
// read, so that a step costs what it costs to stream the weight from memory.
//
// A panel holds 64 outputs: for each unit of k (a float, or a pair of bfloat16 that are neighbours in k) 64 units, one
// an output; zeros fill the last panel and an odd k. Every instruction set reads this one layout. Threads share out the
// panels, or many rows. Within a panel, k goes in blocks that stay in the first-level cache while all rows of x pass
// over them, and the same passes ask for the next block: the memory works while the core multiplies. Each output is one
// chain of additions in the order of k (tile.h), whatever the rows beside it, the blocks and the threads.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/sizes.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t block_rows = 64;        // of x, whose sums lie in the first-level cache
constexpr int64_t block_units = 32;       // of k: 8 KB of a panel
constexpr int64_t group_bytes = 1 << 19;  // of x
constexpr int64_t own_rows = 128;         // enough for a thread to have rows of its own
constexpr int64_t fresh_units = 64;       // of k, how far ahead x is asked for
constexpr int64_t line = 64;              // bytes
constexpr int64_t worth_a_fork = 2048;    // units of a panel, times rows, a thread; below, meeting takes longer
constexpr int64_t unit_bytes = 4 * panel_columns;  // of a panel, one unit of k

// --- Units of a row: from either dtype to either dtype ---

PYRLHF_INLINE vi units_at(const float* row, const float*) { return (vi)load(row); }
PYRLHF_INLINE vi units_at(const bf16* row, const float*) { return (vi)load(row); }
PYRLHF_INLINE vi units_at(const bf16* row, const pair*) {
    vi out;
    memcpy(&out, row, sizeof(out));
    return out;
}
PYRLHF_INLINE vi units_at(const float* row, const pair*) {
    const vh halves[2] = {to_bf16(load(row)), to_bf16(load(row + W))};
    vi out;
    memcpy(&out, halves, sizeof(out));
    return out;
}

template <typename Unit>
constexpr int64_t elements_in = 2;
template <>
constexpr int64_t elements_in<float> = 1;

// Units [at, at + W) of a row of n elements; zeros beyond its end, which is not read.
template <typename Unit, typename T>
PYRLHF_INLINE vi units_of(const T* row, int64_t n, int64_t at) {
    constexpr int64_t elements = W * elements_in<Unit>;
    const int64_t first = at * elements_in<Unit>, left = n - first;
    if (left >= elements) return units_at(row + first, static_cast<const Unit*>(nullptr));
    T some[elements] = {};
    if (left > 0) memcpy(some, row + first, sizeof(T) * static_cast<size_t>(left));
    return units_at(some, static_cast<const Unit*>(nullptr));
}

template <typename Unit>
PYRLHF_INLINE void store_units(Unit* to, vi units, int64_t n) {
    if (n >= W)
        memcpy(to, &units, sizeof(units));
    else
        memcpy(to, &units, sizeof(Unit) * static_cast<size_t>(n));
}

// --- Packing ---

// Asks for the line of p. Any address is fine: a prefetch does not fault.
PYRLHF_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// Lanes of units that hold NaN or infinity become -1.
PYRLHF_INLINE vi not_finite(vi units, const float*) { return (units & 0x7F800000) == 0x7F800000; }
PYRLHF_INLINE vi not_finite(vi units, const pair*) {
    return not_finite(units, static_cast<const float*>(nullptr)) | ((units & 0x7F80) == 0x7F80);
}

// W rows of the weight at a time, blocks of W by W turned in registers; meanwhile the rows of the next panel are asked
// for. Whether all that it has written is finite.
template <typename Unit, typename T>
PYRLHF_INLINE bool pack_panel(const T* weight, int64_t stride, int64_t rows, int64_t k, Unit* panel) {
    constexpr int64_t elements = W * elements_in<Unit>, bytes = elements * sizeof(T);
    const int64_t depth = divide_up(k, elements_in<Unit>);
    vi bad = {};
    for (int64_t n = 0; n < panel_columns; n += W)
        for (int64_t at = 0; at < depth; at += W) {
            vi block[W];
            for (int i = 0; i < W; ++i) {
                const T* const row = weight + (n + i) * stride;
                const T* const next = row + panel_columns * stride + at * elements_in<Unit>;
                for (int64_t b = 0; b < bytes; b += line)
                    __builtin_prefetch(reinterpret_cast<const char*>(next) + b, 0, 2);
                block[i] = n + i < rows ? units_of<Unit>(row, k, at) : vi{};
                bad |= not_finite(block[i], panel);
            }
            transpose(block);
            for (int i = 0; i < W && at + i < depth; ++i)
                stream(reinterpret_cast<float*>(panel + (at + i) * panel_columns + n), (vf)block[i]);
        }
    end_of_streams();
    return sum(bad) == 0;
}

// XXH64's primes and its round, for 64-bit numbers, one or a vector: another sum or another word gives another result.
constexpr uint64_t prime_1 = 0x9E3779B185EBCA87, prime_2 = 0xC2B2AE3D27D4EB4F;
template <typename Words>
PYRLHF_INLINE Words mixed(Words sum, Words word) {
    sum += word * prime_2;
    return (sum << 31 | sum >> 33) * prime_1;
}

typedef uint64_t vw __attribute__((vector_size(4 * W)));
template <typename T>
PYRLHF_INLINE vw words_at(const T* row, int64_t n) {
    vw out = {};
    const int64_t whole = sizeof(out) / sizeof(T);
    memcpy(&out, row, n >= whole ? sizeof(out) : sizeof(T) * static_cast<size_t>(n));
    return out;
}

// A number made of all bits of a panel's rows, even and not 0: if they change it does, but for a chance of 2^-62.
template <typename T>
PYRLHF_INLINE uint64_t fingerprint(const T* weight, int64_t stride, int64_t rows, int64_t k) {
    constexpr int64_t step = sizeof(vw) / sizeof(T), chains = 4;  // which do not wait for each other
    vw sums[chains] = {};
    for (int64_t r = 0; r < rows; ++r, weight += stride) {
        int64_t at = 0;
        for (; at + chains * step <= k; at += chains * step)
            for (int64_t i = 0; i < chains; ++i) sums[i] = mixed(sums[i], words_at(weight + at + i * step, step));
        for (; at < k; at += step) sums[0] = mixed(sums[0], words_at(weight + at, k - at));
    }
    uint64_t out = 0;
    for (const vw& sum : sums)
        for (int i = 0; i < W / 2; ++i) out = mixed(out, sum[i]);
    return (mixed(out ^ out >> 32, out) & ~uint64_t{1}) | 2;
}

// A panel is left as it is while its rows have the fingerprint that they had, whose lowest bit tells whether they are
// finite.
template <typename Unit, typename T>
static bool pack_panels(const T* weight, int64_t stride, int64_t n, int64_t k, Unit* panels, uint64_t* fingerprints,
                        int threads) {
    const int64_t depth = divide_up(k, elements_in<Unit>), count = divide_up(n, panel_columns);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(n* k < 32768 ? 1 : threads) reduction(&& : finite)
    for (int64_t p = 0; p < count; ++p) {
        const int64_t first = p * panel_columns, rows = least(n - first, panel_columns);
        const T* const from = weight + first * stride;
        const uint64_t found = fingerprint(from, stride, rows, k);
        if ((fingerprints[p] & ~uint64_t{1}) != found)
            fingerprints[p] = found | pack_panel(from, stride, rows, k, panels + first * depth);
        finite = finite && fingerprints[p] & 1;
    }
    return finite;
}

// --- The product ---

// The lines that come two blocks later, asked for between the multiplications of this one. The first of `passes` over a
// block is what the hardware sees as a stream; alone, it needs no more than one line in four to be followed across
// pages, and every line asked for takes one of the core's few places for misses.
struct Ahead {
    const char *at, *end;
    int64_t burst, step;
};

PYRLHF_INLINE Ahead ahead_of(const void* block, int64_t passes) {
    const char* const at = static_cast<const char*>(block) + 2 * block_units * unit_bytes;
    const char* const end = at + block_units * unit_bytes;
    return passes == 1 ? Ahead{at, end, 1, unit_bytes} : Ahead{at, end, divide_up(unit_bytes / line, passes), line};
}
PYRLHF_INLINE void ask(Ahead& ahead) {
    for (int64_t i = 0; i < ahead.burst && ahead.at < ahead.end; ++i, ahead.at += ahead.step) prefetch(ahead.at);
}

// Asks for units [first, end) of all rows of x, or as many of them as there are.
template <typename Unit>
PYRLHF_INLINE void ask_for_units(const Unit* x, int64_t rows, int64_t depth, int64_t first, int64_t end) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t k = first; k < least(end, depth); k += line / static_cast<int64_t>(sizeof(Unit)))
            prefetch(x + m * depth + k);
}

// Asks for the lines of y that a panel's results go to, into the second-level cache: meanwhile they come from where
// they were read last, and no store waits for them.
template <typename T>
PYRLHF_INLINE void ask_for_results(const T* y, int64_t rows, int64_t columns, int64_t stride) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; n += line / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(y + m * stride + n, 0, 2);
}

// One row fills few registers: it takes more columns at once.
template <int M>
constexpr int tile_width = M == 1 ? 4 : tile_vectors;
constexpr int panel_vectors = panel_columns / W;

template <int M, typename Unit>
PYRLHF_INLINE void multiply_rows(float* sums, const Unit* x, int64_t x_stride, const Unit* panel, int64_t depth,
                                 bool first, Ahead& ahead) {
    constexpr int N = tile_width<M>;
    for (int n = 0; n < panel_columns; n += N * W) {
        vf c[M][N];
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < N; ++j) c[i][j] = first ? vf{} : load(sums + i * panel_columns + n + j * W);
        for (int64_t k = 0; k < depth; ++k) {
            ask(ahead);
            multiply_tile(c, x + k, panel + k * panel_columns + n, 1, {x_stride, 1, panel_columns, panel_columns});
        }
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < N; ++j) store(sums + i * panel_columns + n + j * W, c[i][j]);
    }
}

PYRLHF_INLINE int64_t passes(int64_t rows) {
    const int64_t left = rows % tile_rows;
    return rows / tile_rows *
           (panel_vectors /
            tile_width<tile_rows>)+(left == 0 ? 0 : panel_vectors / (left == 1 ? tile_width<1> : tile_width<2>));
}

// sums [rows, panel_columns] of `rows` rows of x and one panel. Rows that are fresh, perhaps written by another core
// just now, take long to come: they are asked for in the order in which they are read.
template <typename Unit>
static void multiply_panel(float* sums, const Unit* x, bool fresh, int64_t rows, const Unit* panel, int64_t depth) {
    if (fresh) ask_for_units(x, rows, depth, 0, fresh_units);
    for (int64_t k = 0; k < depth; k += block_units) {
        const int64_t units = least(depth - k, block_units);
        if (fresh) ask_for_units(x, rows, depth, k + fresh_units, k + fresh_units + block_units);
        const Unit* const block = panel + k * panel_columns;
        Ahead ahead = ahead_of(block, passes(rows));
        int64_t m = 0;
        for (; m + tile_rows <= rows; m += tile_rows)
            multiply_rows<tile_rows>(sums + m * panel_columns, x + m * depth + k, depth, block, units, k == 0, ahead);
        float* const last_sums = sums + m * panel_columns;
        const Unit* const last = x + m * depth + k;
        if (rows - m == 3) multiply_rows<3>(last_sums, last, depth, block, units, k == 0, ahead);
        if (rows - m == 2) multiply_rows<2>(last_sums, last, depth, block, units, k == 0, ahead);
        if (rows - m == 1) multiply_rows<1>(last_sums, last, depth, block, units, k == 0, ahead);
    }
}

// --- Bias, rounding, activation: what the activation op would make of the result ---

// y = what `activated` makes of sums + bias.
template <typename T, typename Activated>
PYRLHF_INLINE void write_rows(const float* sums, const float* bias, int64_t rows, int64_t columns, T* y, int64_t stride,
                              Activated activated) {
    for (int64_t m = 0; m < rows; ++m, sums += panel_columns, y += stride)
        for_vectors(columns, [&](int64_t n, auto lanes) PYRLHF_LAMBDA {
            const vf out = load(sums + n) + load(bias + n);
            store(y + n, activated(out), lanes);
        });
}

template <typename T>
static void finish(Activation activation, const float* sums, const float* bias, int64_t rows, int64_t columns, T* y,
                   int64_t stride) {
    if (activation == Activation::none)
        return write_rows(sums, bias, rows, columns, y, stride, [](vf out) PYRLHF_LAMBDA { return out; });
    with_kind(activation, [=](auto kind) {
        write_rows(sums, bias, rows, columns, y, stride, [](vf out) PYRLHF_LAMBDA {
            return value_and_slope<decltype(kind)::value, ActivationMath>(rounded<T>(out)).value;
        });
    });
}

// A row of x as units.
template <typename Unit, typename T>
PYRLHF_INLINE void write_units(const T* row, int64_t features, Unit* to) {
    const int64_t depth = divide_up(features, elements_in<Unit>);
    for (int64_t at = 0; at < depth; at += W) store_units(to + at, units_of<Unit>(row, features, at), depth - at);
}

PYRLHF_INLINE void bias_of_panel(const PackedLinearArrays& in, int64_t first, int64_t columns, float* bias) {
    memset(bias, 0, panel_columns * sizeof(float));
    for (int64_t n = 0; in.bias && n < columns; ++n)
        bias[n] = in.bias_dtype == DType::bfloat16 ? to_float(static_cast<const bf16*>(in.bias)[first + n])
                                                   : static_cast<const float*>(in.bias)[first + n];
}

// multiply(panel, first row, rows) for each panel and at most block_rows rows at a time, by all threads of a region.
// `group` rows pass over all panels before the next ones do.

// Each thread has rows of its own. It has mostly written them itself, as other ops share rows out in the same way: what
// another core has written is slow to read.
template <typename Multiply>
PYRLHF_INLINE void share_rows(int64_t rows, int64_t panels, int64_t group, Multiply multiply) {
    const int64_t each = round_up(divide_up(rows, omp_get_num_threads()), tile_rows);
    const int64_t first = each * omp_get_thread_num(), last = least(first + each, rows);
    for (int64_t from = first; from < last; from += group) {
        const int64_t end = least(from + group, last);
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t m = from; m < end; m += block_rows) multiply(panel, m, least(end - m, block_rows));
    }
}

// Each thread has panels of its own; where there are fewer panels than threads, fewer rows of one.
template <typename Multiply>
PYRLHF_INLINE void share_panels(int64_t rows, int64_t panels, int64_t group, Multiply multiply) {
    const int64_t share = divide_up(rows * panels, omp_get_num_threads());
    const int64_t item_rows = least(block_rows, round_up(most(1, share), tile_rows));
    for (int64_t from = 0; from < rows; from += group) {
        const int64_t end = least(from + group, rows), blocks = divide_up(end - from, item_rows);
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < panels * blocks; ++item) {  // a panel's blocks of rows one after the other
            const int64_t m = from + item % blocks * item_rows;
            multiply(item / blocks, m, least(end - m, item_rows));
        }
    }
}

template <typename Unit, typename T>
static void linear(const PackedLinearArrays& in, const PackedLinearShape& shape, Activation activation, int threads) {
    const int64_t depth = divide_up(shape.in_features, elements_in<Unit>);
    const int64_t panels = divide_up(shape.out_features, panel_columns);
    // Few enough for the second-level cache to hold them.
    const int64_t group = most(1, group_bytes / (4 * block_rows * most(depth, 1))) * block_rows;
    const Unit* const x = static_cast<const Unit*>(in.units ? in.units : in.x);
    T* const y = static_cast<T*>(in.y);
    const bool alone = panels * depth * (shape.rows + 8) < worth_a_fork * threads;
#pragma omp parallel num_threads(alone ? 1 : threads)
    {
        if (in.units) {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < shape.rows; ++m) {
                const int64_t from = m * shape.in_features;
                Unit* const to = static_cast<Unit*>(in.units) + m * depth;
                if (in.x_dtype == DType::float32)
                    write_units(static_cast<const float*>(in.x) + from, shape.in_features, to);
                else
                    write_units(static_cast<const bf16*>(in.x) + from, shape.in_features, to);
            }
        }
        float sums[block_rows * panel_columns], bias[panel_columns];
        int64_t first_panel = -1;  // of this thread
        const auto multiply = [&](int64_t panel, int64_t m, int64_t rows) PYRLHF_LAMBDA {
            const int64_t first = panel * panel_columns, columns = least(shape.out_features - first, panel_columns);
            T* const to = y + m * shape.out_features + first;
            ask_for_results(to, rows, columns, shape.out_features);
            first_panel = first_panel < 0 ? panel : first_panel;
            memset(sums, 0, depth == 0 ? sizeof(sums) : 0);
            multiply_panel(sums, x + m * depth, panel == first_panel, rows,
                           static_cast<const Unit*>(in.panels) + first * depth, depth);
            bias_of_panel(in, first, columns, bias);
            finish(activation, sums, bias, rows, columns, to, shape.out_features);
        };
        if (shape.rows >= own_rows * omp_get_num_threads())
            share_rows(shape.rows, panels, group, multiply);
        else
            share_panels(shape.rows, panels, group, multiply);
    }
}

}  // namespace

bool pack_weight(const void* weight, DType from, int64_t stride, int64_t n, int64_t k, void* panels, DType to,
                 uint64_t* fingerprints, int threads) {
    const bool wide = to == DType::float32;
    if (from == DType::float32) {
        const float* const w = static_cast<const float*>(weight);
        return wide ? pack_panels(w, stride, n, k, static_cast<float*>(panels), fingerprints, threads)
                    : pack_panels(w, stride, n, k, static_cast<pair*>(panels), fingerprints, threads);
    }
    const bf16* const w = static_cast<const bf16*>(weight);
    return wide ? pack_panels(w, stride, n, k, static_cast<float*>(panels), fingerprints, threads)
                : pack_panels(w, stride, n, k, static_cast<pair*>(panels), fingerprints, threads);
}

void packed_linear(const PackedLinearArrays& arrays, const PackedLinearShape& shape, Activation activation,
                   int threads) {
    if (arrays.panels_dtype == DType::float32)
        arrays.y_dtype == DType::float32 ? linear<float, float>(arrays, shape, activation, threads)
                                         : linear<float, bf16>(arrays, shape, activation, threads);
    else
        arrays.y_dtype == DType::float32 ? linear<pair, float>(arrays, shape, activation, threads)
                                         : linear<pair, bf16>(arrays, shape, activation, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
