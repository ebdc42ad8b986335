// Rotary position embedding, half-split: channels (i, i + half) of every head turn by the angle position * inv_freq[i],
// which is rounded to float32 as in models' own code. Sine and cosine are computed once a token and serve all heads of
// q and k, which may be views of one matrix: only their last dimension is contiguous.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t tile = 128;            // channel pairs whose sines and cosines are held at once
constexpr int64_t worth_a_fork = 16384;  // elements

struct Angles {
    float sine[tile], cosine[tile];
};

PYRLHF_INLINE void find_angles(float position, const float* inv_freq, int64_t n, bool inverse, Angles& angles) {
    for_vectors(n, [&](int64_t i, auto lanes) PYRLHF_LAMBDA {
        vf sine, cosine;
        sincos(position * load(inv_freq + i, lanes), sine, cosine);
        store(angles.sine + i, inverse ? -sine : sine);
        store(angles.cosine + i, cosine);
    });
}

// n channel pairs of one head.
template <typename T>
PYRLHF_INLINE void turn(const T* x, T* out, int64_t half, int64_t n, const Angles& angles, bool streamed) {
    for_vectors(n, [&](int64_t i, auto lanes) PYRLHF_LAMBDA {
        vf first = load(x + i, lanes), second = load(x + half + i, lanes);
        turn_pair(first, second, load(angles.sine + i), load(angles.cosine + i));
        write(out + i, first, lanes, streamed);
        write(out + half + i, second, lanes, streamed);
    });
}

template <typename T>
PYRLHF_INLINE void turn_token(const RotaryHeads& heads, const RotaryShape& shape, int64_t token, int64_t first,
                              int64_t n, const Angles& angles, bool streamed) {
    const int64_t turned = 2 * shape.half, size = shape.head_size;
    const T* x = static_cast<const T*>(heads.x) + token * heads.token_stride;
    T* out = static_cast<T*>(heads.out) + token * heads.heads * size;
    for (int64_t h = 0; h < heads.heads; ++h, x += heads.head_stride, out += size) {
        turn(x + first, out + first, shape.half, n, angles, streamed);
        if (first == 0 && turned < size)
            memcpy(out + turned, x + turned, sizeof(T) * static_cast<size_t>(size - turned));
    }
}

template <typename T>
void rotate(const RotaryHeads& q, const RotaryHeads& k, const RotaryShape& shape, int threads) {
    const bool alone = shape.tokens * (q.heads + k.heads) * shape.head_size < worth_a_fork;
    const bool whole = shape.half % W == 0 && shape.head_size % W == 0;
    const bool stream_q = whole && streams<T>(q.out, shape.tokens * q.heads, shape.head_size);
    const bool stream_k = whole && streams<T>(k.out, shape.tokens * k.heads, shape.head_size);
#pragma omp parallel num_threads(alone ? 1 : threads)
    {
        Angles angles;
#pragma omp for schedule(static) nowait
        for (int64_t token = 0; token < shape.tokens; ++token) {
            const float position = static_cast<float>(shape.positions[token]);
            int64_t first = 0;
            do {  // once also where nothing turns
                const int64_t n = shape.half - first < tile ? shape.half - first : tile;
                find_angles(position, shape.inv_freq + first, n, shape.inverse, angles);
                turn_token<T>(q, shape, token, first, n, angles, stream_q);
                turn_token<T>(k, shape, token, first, n, angles, stream_k);
                first += tile;
            } while (first < shape.half);
        }
        end_of_streams();
    }
}

}  // namespace

void rotary(const RotaryHeads& q, const RotaryHeads& k, const RotaryShape& shape, DType dtype, int threads) {
    if (dtype == DType::float32)
        rotate<float>(q, k, shape, threads);
    else
        rotate<bf16>(q, k, shape, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
