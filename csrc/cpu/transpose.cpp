// A matrix written out transposed, with the sums of its columns on the way: oneDNN multiplies fastest when its first
// operand runs along the summed dimension, and a bias gradient is a column sum. W x W tiles turn in registers, by log2
// W rounds of interleaving. A thread owns whole stripes of columns and takes their rows in order, a block at a time:
// the block is read in runs of a stripe and leaves in runs of block_rows elements, so that neither side touches memory
// in single lines. Sums are taken over a block, then over the blocks: what is written does not depend on the number of
// threads.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int stripe = 128;      // columns
constexpr int block_rows = 128;  // both multiples of every W

typedef int16_t vs __attribute__((vector_size(2 * W)));

template <typename V, typename I, int... J>
PYRLHF_INLINE void interleave_by(V a, V b, V& low, V& high, std::integer_sequence<int, J...>) {
#if defined(__clang__)
    low = __builtin_shufflevector(a, b, (J / 2 + J % 2 * W)...);
    high = __builtin_shufflevector(a, b, (W / 2 + J / 2 + J % 2 * W)...);
#else
    low = __builtin_shuffle(a, b, I{(J / 2 + J % 2 * W)...});
    high = __builtin_shuffle(a, b, I{(W / 2 + J / 2 + J % 2 * W)...});
#endif
}
// low and high, one after the other: a0 b0 a1 b1 ...
PYRLHF_INLINE void interleave(vf a, vf b, vf& low, vf& high) {
    interleave_by<vf, vi>(a, b, low, high, std::make_integer_sequence<int, W>{});
}
PYRLHF_INLINE void interleave(vh a, vh b, vh& low, vh& high) {
    interleave_by<vh, vs>(a, b, low, high, std::make_integer_sequence<int, W>{});
}

PYRLHF_INLINE vf as_floats(vf x) { return x; }
PYRLHF_INLINE vf as_floats(vh x) { return (vf)(__builtin_convertvector(x, vi) << 16); }

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    using type = vf;
};
template <>
struct VectorOf<bf16> {
    using type = vh;
};

// One W x W tile; returns the sums of its columns.
template <typename T>
PYRLHF_INLINE vf turn_tile(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
    using V = typename VectorOf<T>::type;
    V rows[W], other[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) memcpy(&rows[i], in + i * in_stride, sizeof(V));
    vf sums = as_floats(rows[0]);
#pragma GCC unroll 16
    for (int i = 1; i < W; ++i) sums += as_floats(rows[i]);
#pragma GCC unroll 4
    for (int done = 1; done < W; done *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) interleave(rows[i], rows[i + W / 2], other[2 * i], other[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = other[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) memcpy(out + i * out_stride, &rows[i], sizeof(V));
    return sums;
}

// A tile cut off by the edge of the matrix.
template <typename T>
PYRLHF_INLINE vf turn_edge(const T* in, int64_t in_stride, T* out, int64_t out_stride, int rows, int columns) {
    vf sums = {};
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) {
            out[j * out_stride + i] = in[i * in_stride + j];
            sums[j] += to_float(in[i * in_stride + j]);
        }
    return sums;
}

// The columns [first, last) of all rows.
template <typename T>
PYRLHF_INLINE void turn_columns(const T* in, int64_t rows, int64_t first, int64_t last, int64_t in_stride, T* out,
                                float* sums) {
    if (sums) memset(sums + first, 0, sizeof(float) * (last - first));
    for (int64_t top = 0; top < rows; top += block_rows) {
        const int64_t bottom = top + block_rows < rows ? top + block_rows : rows;
        for (int64_t j = first; j < last; j += W) {
            const int width = static_cast<int>(last - j < W ? last - j : W);
            vf part = {};
            for (int64_t i = top; i < bottom; i += W) {
                const int height = static_cast<int>(bottom - i < W ? bottom - i : W);
                const T* from = in + i * in_stride + j;
                T* to = out + j * rows + i;
                part += width == W && height == W ? turn_tile(from, in_stride, to, rows)
                                                  : turn_edge(from, in_stride, to, rows, height, width);
            }
            if (sums)
                for (int c = 0; c < width; ++c) sums[j + c] += part[c];
        }
    }
}

template <typename T>
void turn(const T* in, int64_t rows, int64_t columns, int64_t in_stride, T* out, float* sums, int threads) {
    const int64_t stripes = (columns + stripe - 1) / stripe;
    const bool alone = rows * columns < 65536;  // less work than waking the other threads
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : threads)
    for (int64_t s = 0; s < stripes; ++s) {
        const int64_t first = s * stripe, last = first + stripe < columns ? first + stripe : columns;
        turn_columns(in, rows, first, last, in_stride, out, sums);
    }
}

}  // namespace

void transpose(const void* in, DType dtype, int64_t rows, int64_t columns, int64_t row_stride, void* out, float* sums,
               int threads) {
    if (dtype == DType::bfloat16)
        turn(static_cast<const bf16*>(in), rows, columns, row_stride, static_cast<bf16*>(out), sums, threads);
    else
        turn(static_cast<const float*>(in), rows, columns, row_stride, static_cast<float*>(out), sums, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
