// Attention of one new token a row over the keys and values of its sequence in the paged cache.
//
// A block takes one row, one chunk of decode_chunk tokens, one key head and up to 16 (float32: 8) of the query heads
// that share it, so a key is read once for all of them. Its warps work apart from each other until the end: each takes
// every fourth strip of keys through its own ring of buffers in shared memory, filled by cp.async two strips ahead (one
// for large heads), whose page numbers were asked for a strip earlier still. That keeps 32 to 128 KB under way on a
// processor. 16-bit floats go through the tensor cores, float32 through plain multiply-adds; scores, softmax and sums
// are float32 and the softmax is online. At the end the four warps' results are joined in order.
//
// Chunks and strips are counted from the start of the sequence, and the number of chunks that a row sees follows from
// its length (and the window) alone: so do its bits. A row of one chunk is written at once; of more, each leaves a
// maximum, a sum and an unnormalised output in `partial`, which a second kernel joins in order. The grid covers what
// the page table can hold and blocks beyond a row's length end at once: the lengths stay on the device, as a CUDA graph
// needs. Lengths and pages out of range are flagged and their keys skipped; cache that no row sees is never read.
#include "cuda/device.h"
#include "cuda/mma.h"

namespace pyrlhf {
namespace cuda {
namespace {

constexpr int warps = 4;
constexpr int threads = warps * warp_size;
constexpr int chunk = static_cast<int>(decode_chunk);
constexpr float log2_e = 1.44269504088896341f;
constexpr float lowest = -INFINITY;

struct Arrays {
    const void *q, *k_cache, *v_cache;
    const int32_t *page_table, *seq_lens;
    void* out;
    float* partial;
    int32_t* faults;
};

// The tokens [begin, end) that a row sees, and the chunks that they are in.
struct Span {
    int64_t begin, end, first_chunk, chunks;
    bool known;  // whether the length can be right
};

PYRLHF_DEVICE Span find_span(int64_t length, const DecodeShape& shape) {
    const bool known = length >= 0 && length <= shape.max_pages * shape.page_size;
    const int64_t end = known ? length : 0, begin = max(int64_t{0}, end - shape.window);
    const int64_t first = begin / decode_chunk;
    return {begin, end, first, begin < end ? ceil_div(end, decode_chunk) - first : 0, known};
}

// --- What a warp's ring holds ---

// `dim` is the head size rounded up. Rows are padded by 16 bytes, which spreads a column over the banks.
template <typename T, int dim>
struct Strip {
    static constexpr int keys = 32 / sizeof(T);
    static constexpr int pitch = dim + Pack<T>::size;
    alignas(16) T k[keys][pitch];
    alignas(16) T v[keys][pitch];
};

// 16 bytes of a row of `size` elements from element `at` on; zeros beyond its end, or where the row is not wanted.
template <typename T>
PYRLHF_DEVICE void copy_part(T* to, const T* row, int at, int size, bool wanted) {
    wanted = wanted && at < size;
    copy_async<16>(to, row + (wanted ? at : 0), wanted);
}

// The same where nothing need lie on 16 bytes.
template <typename T>
PYRLHF_DEVICE void copy_elements(T* to, const T* row, int at, int size, bool wanted) {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) {
        T x = {};
        if (wanted && at + i < size) x = row[at + i];
        to[i] = x;
    }
}

// --- Online softmax over strips, 16-bit floats: the warp's 16 heads by `dim` channels in tensor core registers ---

template <typename T, int dim>
struct Attention {
    static constexpr int rows = 16, pitch = Strip<T, dim>::pitch;
    float highest[2] = {lowest, lowest}, total[2] = {0.0f, 0.0f};  // of rows lane / 4 and lane / 4 + 8
    float o[dim / 8][4] = {};

    PYRLHF_DEVICE void add(const T (&q)[rows][pitch], const Strip<T, dim>& strip, uint32_t seen, float factor, int) {
        const int lane = threadIdx.x % warp_size;
        float s[2][4] = {};
#pragma unroll
        for (int c = 0; c < dim; c += 16) {
            const Matrices a = load_matrices(&q[lane % 16][c + lane / 16 * 8]);
            const Matrices b = load_matrices(&strip.k[lane % 8 + lane / 16 * 8][c + lane / 8 % 2 * 8]);
            mma(s[0], a.x, b.x[0], b.x[1], T{});
            mma(s[1], a.x, b.x[2], b.x[3], T{});
        }
        uint32_t p[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = lowest;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& score = s[i / 2][half * 2 + i % 2];
                const int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
                score = (seen >> key & 1) != 0 ? score * factor : lowest;
                top = fmaxf(top, score);
            }
            top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
            top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
            const float fade = raise_highest(top, highest[half]), base = highest[half] == lowest ? 0.0f : highest[half];
            total[half] *= fade;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const uint32_t pair = rounded_pair(exp2f(s[n][half * 2] - base), exp2f(s[n][half * 2 + 1] - base), T{});
                total[half] += low_half<T>(pair) + high_half<T>(pair);  // what the product will see
                p[n * 2 + half] = pair;
            }
#pragma unroll
            for (int c = 0; c < dim / 8; ++c) {
                o[c][half * 2] *= fade;
                o[c][half * 2 + 1] *= fade;
            }
        }
#pragma unroll
        for (int c = 0; c < dim; c += 16) {
            const Matrices b = load_matrices<true>(&strip.v[lane % 16][c + lane / 16 * 8]);
            mma(o[c / 8], p, b.x[0], b.x[1], T{});
            mma(o[c / 8 + 1], p, b.x[2], b.x[3], T{});
        }
    }

    // What earlier sums must be multiplied by now that the highest score is at least `top`.
    static PYRLHF_DEVICE float raise_highest(float top, float& highest) {
        const float before = highest;
        highest = fmaxf(before, top);
        return before == lowest ? 0.0f : exp2f(before - highest);
    }

    PYRLHF_DEVICE void leave(float (&to)[rows][dim], float (&tops)[rows], float (&totals)[rows]) {
        const int lane = threadIdx.x % warp_size;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + half * 8;
            total[half] += __shfl_xor_sync(all_lanes, total[half], 1);
            total[half] += __shfl_xor_sync(all_lanes, total[half], 2);
            if (lane % 4 == 0) {
                tops[row] = highest[half];
                totals[row] = total[half];
            }
#pragma unroll
            for (int c = 0; c < dim / 8; ++c) {
                to[row][c * 8 + lane % 4 * 2] = o[c][half * 2];
                to[row][c * 8 + lane % 4 * 2 + 1] = o[c][half * 2 + 1];
            }
        }
    }
};

// --- The same in float32: lane = key + 8 * a quarter of the channels for the scores, then the channels share the
// lanes.

template <int dim>
struct Attention<float, dim> {
    static constexpr int rows = 8, keys = Strip<float, dim>::keys, pitch = Strip<float, dim>::pitch;
    static constexpr int packs = (dim + 127) / 128;  // of channels a lane has
    static_assert(keys == 8);
    float highest[rows], total[rows] = {}, o[rows][packs][4] = {};  // total: of the lane's own key

    PYRLHF_DEVICE Attention() {
#pragma unroll
        for (int r = 0; r < rows; ++r) highest[r] = lowest;
    }

    PYRLHF_DEVICE void add(const float (&q)[rows][pitch], const Strip<float, dim>& strip, uint32_t seen, float factor,
                           int count) {
        const int lane = threadIdx.x % warp_size, key = lane % keys, quarter = lane / keys;
        float s[rows] = {};
#pragma unroll 4
        for (int c = quarter * 4; c < dim; c += 16) {
            const Pack<float> k = load_pack(&strip.k[key][c]);
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                if (r >= count) continue;
                const Pack<float> x = load_pack(&q[r][c]);
#pragma unroll
                for (int i = 0; i < 4; ++i) s[r] += x.at[i] * k.at[i];
            }
        }
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            if (r >= count) continue;
            s[r] += __shfl_xor_sync(all_lanes, s[r], 8);
            s[r] += __shfl_xor_sync(all_lanes, s[r], 16);
            s[r] = (seen >> key & 1) != 0 ? s[r] * factor : lowest;
            float top = s[r];
#pragma unroll
            for (int step = 1; step < keys; step *= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
            const float before = highest[r];
            highest[r] = fmaxf(before, top);
            const float fade = before == lowest ? 0.0f : exp2f(before - highest[r]);
            s[r] = exp2f(s[r] - (highest[r] == lowest ? 0.0f : highest[r]));
            total[r] = total[r] * fade + s[r];
#pragma unroll
            for (int j = 0; j < packs; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) o[r][j][i] *= fade;
        }
#pragma unroll
        for (int n = 0; n < keys; ++n) {
            Pack<float> v[packs];
#pragma unroll
            for (int j = 0; j < packs; ++j)
                v[j] = load_pack(&strip.v[n][min(j * 128 + lane * 4, dim - 4)]);  // lanes beyond dim are not used
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                if (r >= count) continue;
                const float p = __shfl_sync(all_lanes, s[r], n);
#pragma unroll
                for (int j = 0; j < packs; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[r][j][i] += p * v[j].at[i];
            }
        }
    }

    PYRLHF_DEVICE void leave(float (&to)[rows][dim], float (&tops)[rows], float (&totals)[rows]) {
        const int lane = threadIdx.x % warp_size;
#pragma unroll
        for (int r = 0; r < rows; ++r) {
#pragma unroll
            for (int step = 1; step < keys; step *= 2) total[r] += __shfl_xor_sync(all_lanes, total[r], step);
            if (lane == 0) {
                tops[r] = highest[r];
                totals[r] = total[r];
            }
#pragma unroll
            for (int j = 0; j < packs; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (const int c = j * 128 + lane * 4 + i; c < dim) to[r][c] = o[r][j][i];
        }
    }
};

// --- The kernel ---

template <typename T, int dim>
struct Shared {
    static constexpr int rows = Attention<T, dim>::rows;
    static constexpr int stages = dim <= 128 ? 3 : 2;
    static constexpr int blocks = dim <= 64 ? 3 : dim <= 128 ? 2 : 1;  // that fit on a processor of 228 KB
    alignas(16) T q[rows][Strip<T, dim>::pitch];
    union {
        Strip<T, dim> strips[warps][stages];
        float o[warps][rows][dim];  // when all strips are done with
    };
    float highest[warps][rows], total[warps][rows];
};

// Where a lane's key of a strip lies: the page number is on its way while an earlier strip is worked on.
struct Place {
    int32_t page;
    uint32_t within;
    bool wanted;
};

template <typename T, int dim>
__global__ void __launch_bounds__(threads, Shared<T, dim>::blocks)
    decode_kernel(Arrays arrays, DecodeShape shape, bool on_16, bool q_on_16) {
    using Mine = Strip<T, dim>;
    auto& shared = shared_memory<Shared<T, dim>>();
    constexpr int rows = Shared<T, dim>::rows, stages = Shared<T, dim>::stages, keys = Mine::keys;
    constexpr int width = Pack<T>::size, parts = dim / width;
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    const int size = static_cast<int>(shape.dim), group = static_cast<int>(shape.heads / shape.kv_heads);

    const unsigned tiles = static_cast<unsigned>(ceil_div(group, rows));
    unsigned left = blockIdx.x;
    const int tile = static_cast<int>(left % tiles);
    left /= tiles;
    const int kv_head = static_cast<int>(left % static_cast<unsigned>(shape.kv_heads));
    left /= static_cast<unsigned>(shape.kv_heads);
    const int split = static_cast<int>(left % static_cast<unsigned>(shape.splits));
    const int64_t row = left / static_cast<unsigned>(shape.splits);

    const Span span = find_span(arrays.seq_lens[row], shape);
    const int count = min(rows, group - tile * rows);
    const int64_t first_head = int64_t{kv_head} * group + tile * rows, out_row = row * shape.heads + first_head;
    T* out = static_cast<T*>(arrays.out) + out_row * size;
    if (span.chunks == 0 && split == 0) {
        if (!span.known && threadIdx.x == 0) raise_fault(arrays.faults, Fault::decode_attention_seq_lens);
        for (int i = threadIdx.x; i < count * size; i += threads) from_float(0.0f, out[i]);
    }
    if (split >= span.chunks) return;

    const int64_t chunk_first = (span.first_chunk + split) * chunk;
    const int begin = static_cast<int>(max(int64_t{0}, span.begin - chunk_first));  // tokens within the chunk
    const int end = static_cast<int>(min(int64_t{chunk}, span.end - chunk_first));
    const int32_t* pages = arrays.page_table + row * shape.max_pages;
    const uint32_t page_size = static_cast<uint32_t>(shape.page_size);
    const int64_t token_size = shape.kv_heads * size;
    const T* k_cache = static_cast<const T*>(arrays.k_cache) + kv_head * size;
    const T* v_cache = static_cast<const T*>(arrays.v_cache) + kv_head * size;

    const auto look = [&](int strip) -> Place {
        const int at = (strip * warps + warp) * keys + lane % keys;
        const bool wanted = at >= begin && at < end;
        const uint32_t token = static_cast<uint32_t>(chunk_first) + static_cast<uint32_t>(at), page = token / page_size;
        return {wanted ? pages[page] : 0, token - page * page_size, wanted};
    };
    // Starts a strip's way to shared memory; returns which of its keys are to be seen.
    const auto fetch = [&](const Place& place, Mine& to) -> uint32_t {
        const bool known = place.page >= 0 && place.page < shape.pages;
        if (place.wanted && !known) raise_fault(arrays.faults, Fault::decode_attention_page_table);
        const int64_t offset =
            place.wanted && known ? (place.page * shape.page_size + place.within) * token_size : int64_t{-1};
        const auto each_part = [&](int i, auto&& copy) {
            const int index = i * warp_size + lane, key = index / parts, at = index % parts * width;
            const int64_t from = __shfl_sync(all_lanes, offset, key), row = max(from, int64_t{0});
            copy(&to.k[key][at], k_cache + row, at, size, from >= 0);
            copy(&to.v[key][at], v_cache + row, at, size, from >= 0);
        };
        constexpr int rounds = keys * parts / warp_size;
        if (on_16) {
#pragma unroll
            for (int i = 0; i < rounds; ++i) each_part(i, copy_part<T>);
        } else {
#pragma unroll 1
            for (int i = 0; i < rounds; ++i) each_part(i, copy_elements<T>);
        }
        return __ballot_sync(all_lanes, offset >= 0);
    };

    const T* q = static_cast<const T*>(arrays.q) + row * shape.q_row + first_head * shape.q_head;
    for (int i = threadIdx.x; i < rows * parts; i += threads) {
        const int r = i / parts, at = i % parts * width;
        const T* from = q + min(r, count - 1) * shape.q_head;
        if (q_on_16)
            copy_part(&shared.q[r][at], from, at, size, r < count);
        else
            copy_elements(&shared.q[r][at], from, at, size, r < count);
    }
    close_async();

    const int first = begin / (warps * keys);
    const int last = ceil_div(max(end - warp * keys, 0), warps * keys);  // of the strips that this warp takes
    uint32_t seen[stages];
    Place next = look(first);
#pragma unroll
    for (int i = 0; i < stages - 1; ++i) {
        const Place place = next;
        next = look(first + i + 1);
        seen[i] = first + i < last ? fetch(place, shared.strips[warp][i]) : 0;
        close_async();
    }
    wait_async<stages - 1>();
    __syncthreads();  // q has come

    Attention<T, dim> attention;
    const float factor = shape.scale * log2_e;
    int slot = 0;
    for (int strip = first; strip < last; ++strip) {
        wait_async<stages - 2>();
        __syncwarp();  // the strip has come for all lanes, and all are done with the one before, whose place is taken
        const Place place = next;
        next = look(strip + stages);
        seen[stages - 1] = 0;
        if (strip + stages - 1 < last)
            seen[stages - 1] = fetch(place, shared.strips[warp][slot == 0 ? stages - 1 : slot - 1]);
        close_async();
        attention.add(shared.q, shared.strips[warp][slot], seen[0], factor, count);
        slot = slot == stages - 1 ? 0 : slot + 1;
#pragma unroll
        for (int i = 0; i < stages - 1; ++i) seen[i] = seen[i + 1];
    }
    wait_async<0>();
    __syncthreads();
    attention.leave(shared.o[warp], shared.highest[warp], shared.total[warp]);
    __syncthreads();

    for (int i = threadIdx.x; i < count * size; i += threads) {
        const int r = i / size, c = i - r * size;
        float highest = lowest, total = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < warps; ++w) highest = fmaxf(highest, shared.highest[w][r]);
        const float base = highest == lowest ? 0.0f : highest;
#pragma unroll
        for (int w = 0; w < warps; ++w) {
            const float weight = exp2f(shared.highest[w][r] - base);
            total += weight * shared.total[w][r];
            sum += weight * shared.o[w][r][c];
        }
        if (span.chunks == 1) {
            from_float(total == 0.0f ? 0.0f : sum / total, out[i]);
            continue;
        }
        float* to = arrays.partial + ((out_row + r) * shape.splits + split) * (size + 2);
        to[c] = sum;
        if (c == 0) {
            to[size] = highest;
            to[size + 1] = total;
        }
    }
}

// --- Joining the chunks of a row: one block a row and query head ---

constexpr int join_warps = 8;
constexpr int join_threads = join_warps * warp_size;
constexpr int most_dim = 256;

struct JoinShared {
    float o[join_warps][most_dim], total[join_warps], highest[join_warps];
};

template <typename T>
__global__ void __launch_bounds__(join_threads) join_kernel(Arrays arrays, DecodeShape shape) {
    auto& shared = shared_memory<JoinShared>();
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, size = static_cast<int>(shape.dim);
    const int64_t row = blockIdx.x / static_cast<unsigned>(shape.heads);
    const Span span = find_span(arrays.seq_lens[row], shape);
    if (span.chunks <= 1) return;
    const int chunks = static_cast<int>(span.chunks), stride = size + 2;
    const float* partial = arrays.partial + blockIdx.x * shape.splits * stride;

    float highest = lowest;
    for (int s = threadIdx.x; s < chunks; s += join_threads)
        highest = fmaxf(highest, partial[int64_t{s} * stride + size]);
    highest = warp_max(highest);
    if (lane == 0) shared.highest[warp] = highest;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < join_warps; ++w) highest = fmaxf(highest, shared.highest[w]);
    const float base = highest == lowest ? 0.0f : highest;

    float total = 0.0f, o[most_dim / warp_size] = {};
#pragma unroll 2
    for (int s = warp; s < chunks; s += join_warps) {
        const float* from = partial + int64_t{s} * stride;
        const float weight = exp2f(from[size] - base);
        total += weight * from[size + 1];
#pragma unroll
        for (int j = 0; j < most_dim / warp_size; ++j)
            if (const int c = j * warp_size + lane; c < size) o[j] += weight * from[c];
    }
#pragma unroll
    for (int j = 0; j < most_dim / warp_size; ++j) shared.o[warp][j * warp_size + lane] = o[j];
    if (lane == 0) shared.total[warp] = total;
    __syncthreads();

    T* out = static_cast<T*>(arrays.out) + int64_t{blockIdx.x} * size;
    for (int c = threadIdx.x; c < size; c += join_threads) {
        float sum = 0.0f, all = 0.0f;
#pragma unroll
        for (int w = 0; w < join_warps; ++w) {
            sum += shared.o[w][c];
            all += shared.total[w];
        }
        from_float(all == 0.0f ? 0.0f : sum / all, out[c]);
    }
}

template <typename T, int dim>
void start(const Arrays& arrays, const DecodeShape& shape, Queue queue) {
    const int64_t tiles = ceil_div(shape.heads / shape.kv_heads, int64_t{Shared<T, dim>::rows});
    const int64_t blocks = shape.rows * shape.splits * shape.kv_heads * tiles;
    constexpr int64_t width = Pack<T>::size;
    const bool on_16 = shape.dim % width == 0 && on_16_bytes(arrays.k_cache, arrays.v_cache);
    const bool q_on_16 =
        shape.dim % width == 0 && on_16_bytes(arrays.q) && shape.q_row % width == 0 && shape.q_head % width == 0;
    launch("decode_attention", decode_kernel<T, dim>, dim3(static_cast<unsigned>(blocks)), threads,
           sizeof(Shared<T, dim>), queue, arrays, shape, on_16, q_on_16);
}

}  // namespace

void decode_attention(const void* q, const void* k_cache, const void* v_cache, const int32_t* page_table,
                      const int32_t* seq_lens, void* out, float* partial, const DecodeShape& shape, DType dtype,
                      int32_t* faults, Queue queue) {
    if (shape.rows == 0) return;
    const Arrays arrays = {q, k_cache, v_cache, page_table, seq_lens, out, partial, faults};
    visit(dtype, [&](auto zero) {
        using T = decltype(zero);
        if (shape.dim <= 64)
            start<T, 64>(arrays, shape, queue);
        else if (shape.dim <= 96)
            start<T, 96>(arrays, shape, queue);
        else if (shape.dim <= 128)
            start<T, 128>(arrays, shape, queue);
        else
            start<T, 256>(arrays, shape, queue);
        if (shape.splits > 1)
            launch("decode_attention", join_kernel<T>, dim3(static_cast<unsigned>(shape.rows * shape.heads)),
                   join_threads, sizeof(JoinShared), queue, arrays, shape);
    });
}

}  // namespace cuda
}  // namespace pyrlhf
