// Rotary position embedding, half-split, and the same on the way into the paged cache.
//
// A thread has a few neighbouring channel pairs (i, i + half) of one token: their sines and cosines, found once in
// registers, turn these pairs in every head of q and k, `together` heads at a time so that enough bytes are under way.
// Where there are too few tokens to fill the device, the heads are shared out among blocks. With slots, k goes to its
// slot of the key cache, and v, untouched, to that of the value cache. A result depends on its own token only.
#include "core/rotary.h"
#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

constexpr int threads = 128;
constexpr int together = 4;

// x is read by strides, out is [rows, heads, size].
template <typename T>
struct Heads {
    const T* x;
    T* out;
    int heads;
    int64_t token_stride, head_stride;
};

template <typename T>
struct Arguments {
    Heads<T> q, k, v;
    const int64_t* positions;
    const float* inv_freq;
    const int64_t* slots;  // of k and v, or null: row t of out is token t
    int64_t slot_count, tokens;
    int size, half, items, heads_a_block;
    bool inverse;
    int32_t* faults;
};

template <typename T, int width>
struct alignas(width * sizeof(T)) Part {
    T at[width];
};

// Of an angle in float: x = n pi / 2 + r in double, with pi / 2 in three parts and n taken away in two steps, so that
// r is right for every int64 position.
PYRLHF_DEVICE void sincos(float angle, float& sine, float& cosine) {
    constexpr double turns = 0x1.45f306dc9c883p-1, high = 0x1.921fb54442d18p+0, middle = 0x1.1a62633145c07p-54,
                     low = -0x1.f1976b7ed8fbcp-110;
    const double x = angle, n = rint(x * turns);
    double r = fma(-n, low, fma(-n, middle, fma(-n, high, x)));
    const double more = rint(r * turns);
    r = fma(-more, high, r);
    double a, b;
    sincos_series(r, a, b);
    const int64_t quarter = static_cast<int64_t>(n) + static_cast<int64_t>(more);
    const bool odd = (quarter & 1) != 0;
    sine = static_cast<float>(odd ? b : a);
    cosine = static_cast<float>(odd ? a : b);
    if (quarter & 2) sine = -sine;
    if ((quarter + 1) & 2) cosine = -cosine;
}

// turn(first, second) on the parts at channels `at` and at + apart of the heads [begin, end); apart 0: only one part.
template <typename T, int width, typename F>
PYRLHF_DEVICE void each_head(const Heads<T>& heads, int64_t token, int64_t row, int size, int begin, int end, int at,
                             int apart, F&& turn) {
    using Pair = Part<T, width>;
    const T* x = heads.x + token * heads.token_stride + at;
    T* out = heads.out + row * heads.heads * size + at;
    for (int h = begin; h < end; h += together) {
        Pair first[together], second[together];
#pragma unroll
        for (int j = 0; j < together; ++j) {
            if (h + j >= end) continue;
            const T* from = x + (h + j) * heads.head_stride;
            first[j] = *reinterpret_cast<const Pair*>(from);
            if (apart) second[j] = *reinterpret_cast<const Pair*>(from + apart);
        }
#pragma unroll
        for (int j = 0; j < together; ++j) {
            if (h + j >= end) continue;
            T* to = out + static_cast<int64_t>(h + j) * size;
            if (apart) {
                turn(first[j], second[j]);
                *reinterpret_cast<Pair*>(to + apart) = second[j];
            }
            *reinterpret_cast<Pair*>(to) = first[j];
        }
    }
}

template <typename T, int width>
__global__ void __launch_bounds__(threads, 4) rotary_kernel(Arguments<T> arguments) {
    const Arguments<T>& a = arguments;
    const int64_t index = int64_t{blockIdx.x} * threads + threadIdx.x, token = index / a.items;
    if (token >= a.tokens) return;
    const int item = static_cast<int>(index - token * a.items), pairs = a.half / width;
    const bool turning = item < pairs;
    const int at = turning ? item * width : 2 * a.half + (item - pairs) * width, apart = turning ? a.half : 0;

    float sine[width], cosine[width];
    const float position = turning ? static_cast<float>(a.positions[token]) : 0.0f;
#pragma unroll
    for (int i = 0; i < width; ++i) {
        sincos(turning ? position * a.inv_freq[at + i] : 0.0f, sine[i], cosine[i]);
        if (a.inverse) sine[i] = -sine[i];
    }
    const auto turn = [&](Part<T, width>& first, Part<T, width>& second) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
            float x = to_float(first.at[i]), y = to_float(second.at[i]);
            turn_pair(x, y, sine[i], cosine[i]);
            from_float(x, first.at[i]);
            from_float(y, second.at[i]);
        }
    };

    const int begin = static_cast<int>(blockIdx.y) * a.heads_a_block, end = begin + a.heads_a_block;
    const auto part = [&](const Heads<T>& heads, int before, int64_t row, auto&& how) {
        each_head<T, width>(heads, token, row, a.size, max(begin - before, 0), min(end - before, heads.heads), at,
                            apart, how);
    };
    part(a.q, 0, token, turn);
    int64_t row = token;
    if (a.slots) {
        row = a.slots[token];
        if (row < 0 || row >= a.slot_count) {
            if (item == 0) raise_fault(a.faults, Fault::write_kv_slots);
            return;
        }
    }
    part(a.k, a.q.heads, row, turn);
    part(a.v, a.q.heads + a.k.heads, row, [](Part<T, width>&, Part<T, width>&) {});
}

template <typename T>
Heads<T> typed(const RotaryHeads& heads) {
    return {static_cast<const T*>(heads.x), static_cast<T*>(heads.out), static_cast<int>(heads.heads),
            heads.token_stride, heads.head_stride};
}

// Whether every part of `width` elements lies on a multiple of its size.
bool lies_on(const RotaryHeads& heads, int width) {
    return on_16_bytes(heads.x, heads.out) && heads.token_stride % width == 0 && heads.head_stride % width == 0;
}

template <typename T, int width>
void start(const char* op, Arguments<T> arguments, Queue queue) {
    arguments.items = (arguments.size - arguments.half) / width;
    const int64_t blocks = ceil_div(arguments.tokens * arguments.items, int64_t{threads});
    const int heads = arguments.q.heads + arguments.k.heads + arguments.v.heads;
    if (blocks == 0 || heads == 0) return;
    // Eight blocks a processor; more of them than there are heads to share out would be idle.
    const int64_t wanted = ceil_div(int64_t{8} * processors(queue), blocks), shares = ceil_div(heads, together);
    arguments.heads_a_block = static_cast<int>(ceil_div(shares, min(wanted, shares))) * together;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(heads, arguments.heads_a_block)));
    launch(op, rotary_kernel<T, width>, grid, threads, 0, queue, arguments);
}

void rotate(const char* op, const RotaryHeads& q, const RotaryHeads& k, const RotaryHeads& v, const int64_t* slots,
            int64_t slot_count, const RotaryShape& shape, DType dtype, int32_t* faults, Queue queue) {
    visit(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int width = Pack<T>::size;
        const Arguments<T> arguments = {typed<T>(q),
                                        typed<T>(k),
                                        typed<T>(v),
                                        shape.positions,
                                        shape.inv_freq,
                                        slots,
                                        slot_count,
                                        shape.tokens,
                                        static_cast<int>(shape.head_size),
                                        static_cast<int>(shape.half),
                                        0,
                                        0,
                                        shape.inverse,
                                        faults};
        if (shape.half % width == 0 && shape.head_size % width == 0 && lies_on(q, width) && lies_on(k, width) &&
            lies_on(v, width))
            start<T, width>(op, arguments, queue);
        else
            start<T, 1>(op, arguments, queue);
    });
}

}  // namespace

void rotary(const RotaryHeads& q, const RotaryHeads& k, const RotaryShape& shape, DType dtype, Queue queue) {
    rotate("rotary", q, k, {nullptr, nullptr, 0, 0, 0}, nullptr, 0, shape, dtype, nullptr, queue);
}

void rotary_write_kv(const RotaryHeads& q, const RotaryHeads& k, const RotaryHeads& v, const int64_t* slots,
                     int64_t slot_count, const RotaryShape& shape, DType dtype, int32_t* faults, Queue queue) {
    rotate("rotary with write_kv", q, k, v, slots, slot_count, shape, dtype, faults, queue);
}

}  // namespace cuda
}  // namespace pyrlhf
