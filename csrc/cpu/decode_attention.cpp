// Attention of one new token a row over the keys and values of its sequence in the paged cache.
//
// An item is one row, one chunk of `key_chunk` tokens and a range of key heads. Block by block all heads look at the
// block's keys, a few tokens at a time and head by head within those; then the scores are softened, then the values are
// gathered in the same way. So the cache is read as it lies, and the hardware sees a stream that it can follow; what
// comes next is asked for a fixed distance ahead, across the ends of pages, blocks and items. The softmax is online;
// the chunks of a row are joined in order. Where several heads fit in a vector they lie in it side by side, as in the
// cache, and a chunk is one block. Chunks and blocks are counted from the start of the row's sequence, so a row's bits
// depend on its own length and tokens only. Scores, probabilities and sums are float32; places past a row's end are
// never read.
#include <omp.h>

#include <cstdlib>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/sizes.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t key_block = 128;  // tokens whose scores are softened together
constexpr int64_t key_chunk = 512;
constexpr int together = 4;               // tokens, and at most query heads, in registers at a time
constexpr int64_t ahead_bytes = 3 << 11;  // what is asked for before any of it is read
constexpr int64_t most_dim = 256;
constexpr int64_t line = 64;  // bytes
constexpr float lowest = -3.402823466e38f;
constexpr float log2_e = 1.44269504088896341f;

template <typename T>
struct Cache {
    const T *k, *v;
    const int32_t* pages;      // of this row
    int64_t page_size, token;  // elements of a token
    // The same, seen from a key head.
    Cache at_head(int64_t offset) const { return {k + offset, v + offset, pages, page_size, token}; }
};

// Where the tokens [first, first + count) lie, as offsets into k and v; count <= key_block.
template <typename T>
PYRLHF_INLINE void find_tokens(const Cache<T>& cache, int64_t first, int64_t count, int64_t* offsets) {
    int64_t page = first / cache.page_size, place = first % cache.page_size;
    for (int64_t j = 0; j < count; ++page, place = 0) {
        const int64_t at = (cache.pages[page] * cache.page_size + place) * cache.token;
        const int64_t end = least(count, j + cache.page_size - place);
        for (int64_t i = 0; j < end; ++i, ++j) offsets[j] = at + i * cache.token;
    }
}

template <typename T>
constexpr int64_t elements = sizeof(vi) / sizeof(T);  // in a vector of 32-bit units: floats, or pairs of bfloat16

// The units of `left` elements; the rest becomes zero.
template <typename T>
PYRLHF_INLINE vi load_some(const T* p, int64_t left) {
    vi out = {};
    if (left >= elements<T>)
        memcpy(&out, p, sizeof(out));
    else if (left > 0)
#if defined(PYRLHF_ISA_avx512) || defined(PYRLHF_ISA_avx512_bf16)
        out = (vi)_mm512_maskz_loadu_epi16((1u << (left * static_cast<int64_t>(sizeof(T) / 2))) - 1, p);
#else
        memcpy(&out, p, static_cast<size_t>(left) * sizeof(T));
#endif
    return out;
}
PYRLHF_INLINE vf multiply_units(vi a, vi b, vf c, const float*) { return multiply_add((vf)a, (vf)b, c); }
PYRLHF_INLINE vf multiply_units(vi a, vi b, vf c, const bf16*) { return multiply_add(a, b, c); }

template <typename T>
PYRLHF_INLINE vf load_channels(const T* row, int64_t left) {
    return left >= W ? load(row) : load(row, Part{static_cast<int>(left)});
}

// Tokens [first, end) of one row, against some key heads from `cache` on. Without tokens it is nothing to do.
template <typename T>
struct Item {
    int64_t row, head;  // the first query head
    int64_t partial;    // where its result goes
    Cache<T> cache;
    int64_t first, end;
};

// What one item keeps: for each of its query heads the scores of a block, the softmax so far and the weighted sum of
// values.
struct Work {
    vi* q;  // [heads][q_row] units
    int64_t q_row;
    float *scores, *highest, *total, *sums;  // [heads][key_block], [heads], [heads], [heads][sums_row]
    int64_t sums_row;
};

// A block's keys, its values and the first `ahead` keys of what follows it, in the order in which they are read; where
// nothing follows, rows that have been read already.
template <typename T>
PYRLHF_INLINE void find_rows(const Item<T>& item, int64_t first, int64_t count, const Item<T>& next, int64_t ahead,
                             const T** rows) {
    int64_t offsets[key_block];
    find_tokens(item.cache, first, count, offsets);
    for (int64_t j = 0; j < count; ++j) {
        rows[j] = item.cache.k + offsets[j];
        rows[count + j] = item.cache.v + offsets[j];
    }
    const bool last = first + count == item.end;
    const Item<T>& source = last ? next : item;
    const int64_t follows = last ? next.first : first + count;
    const int64_t there = least(ahead, source.end - follows);
    if (there > 0) find_tokens(source.cache, follows, there, offsets);
    for (int64_t j = 0; j < ahead; ++j)
        rows[2 * count + j] = there > 0 ? source.cache.k + offsets[least(j, there - 1)] : rows[0];
}

// Asks for rows line by line, as they lie in memory: so the hardware follows them too. Any address is fine: a prefetch
// does not fault.
template <typename T>
struct Fetch {
    const T* const* rows;
    int64_t left, row_bytes;  // left: rows
    int64_t byte = 0;         // of the first of them
};
template <typename T>
PYRLHF_INLINE void ask(Fetch<T>& fetch, int64_t lines) {
    for (int64_t i = 0; i < lines && fetch.left > 0; ++i) {
        __builtin_prefetch(reinterpret_cast<const char*>(*fetch.rows) + fetch.byte);
        fetch.byte += line;
        if (fetch.byte >= fetch.row_bytes) fetch.byte = 0, ++fetch.rows, --fetch.left;
    }
}

// scores[h][i] = factor * q[h] . rows[i] for `count` rows; behind them it writes anything, up to `together` scores.
template <int H, typename T>
PYRLHF_INLINE void score(const T* const* rows, int64_t count, int64_t offset, int64_t dim, const vi* q, int64_t q_row,
                         float factor, float* scores) {
    const int64_t whole = dim / elements<T>;
    const T* row[together];
    for (int i = 0; i < together; ++i) row[i] = rows[least(i, count - 1)] + offset;
    vf sums[H][together] = {};
    for (int64_t u = 0; u < whole; ++u)
        for (int i = 0; i < together; ++i) {
            vi units;
            memcpy(&units, row[i] + u * elements<T>, sizeof(units));
            for (int h = 0; h < H; ++h) sums[h][i] = multiply_units(q[h * q_row + u], units, sums[h][i], row[i]);
        }
    if (const int64_t done = whole * elements<T>; done < dim)
        for (int i = 0; i < together; ++i) {
            const vi units = load_some(row[i] + done, dim - done);
            for (int h = 0; h < H; ++h) sums[h][i] = multiply_units(q[h * q_row + whole], units, sums[h][i], row[i]);
        }
    for (int h = 0; h < H; ++h) {
        const vf parts = sum_segments<together>([&](int i) PYRLHF_LAMBDA { return sums[h][i]; });
        const vf dots = sum_across_segments<together>(parts) * factor;
        memcpy(scores + h * key_block, &dots, together * sizeof(float));
    }
}

// Scores become probabilities relative to the highest score so far; returns what earlier sums must be multiplied by.
PYRLHF_INLINE float soften(float* scores, int64_t count, float& highest, float& total) {
    const int64_t padded = round_up(count, W);
    for (int64_t j = count; j < padded; ++j) scores[j] = lowest;
    vf tops = broadcast(highest);
    for (int64_t j = 0; j < padded; j += W) {
        const vf s = load(scores + j);
        tops = s > tops ? s : tops;
    }
    const float top = largest(tops);
    vf sums = {};
    for (int64_t j = 0; j < padded; j += W) {
        const vf p = exp2_small(load(scores + j) - top);
        store(scores + j, p);
        if (j + W <= count) sums += p;
    }
    float sum_of_all = sum_lanes(sums);
    for (int64_t j = count / W * W; j < count; ++j) sum_of_all += scores[j];
    const float shrink = exp2_small(broadcast(highest - top))[0];
    total = total * shrink + sum_of_all;
    highest = top;
    return shrink;
}

// sums[h] += sum over i of scores[h][i] * rows[i], for the N vectors of channels from d on.
template <int H, int N, typename T>
PYRLHF_INLINE void gather_channels(const T* const* rows, int64_t count, int64_t offset, int64_t left,
                                   const float* scores, float* sums, int64_t sums_row) {
    vf total[H][N];
    for (int h = 0; h < H; ++h)
        for (int n = 0; n < N; ++n) total[h][n] = load(sums + h * sums_row + n * W);
    for (int64_t i = 0; i < count; ++i) {
        const T* row = rows[i] + offset;
        vf values[N];
        for (int n = 0; n < N; ++n)
            values[n] = n + 1 < N || left >= N * W ? load(row + n * W) : load_channels(row + n * W, left - n * W);
        for (int h = 0; h < H; ++h)
            for (int n = 0; n < N; ++n) total[h][n] += values[n] * scores[h * key_block + i];
    }
    for (int h = 0; h < H; ++h)
        for (int n = 0; n < N; ++n) store(sums + h * sums_row + n * W, total[h][n]);
}

template <int H, typename T>
PYRLHF_INLINE void gather(const T* const* rows, int64_t count, int64_t offset, int64_t dim, const float* scores,
                          float* sums, int64_t sums_row) {
    int64_t d = 0;
    for (; dim - d > (tile_vectors - 1) * W; d += tile_vectors * W)
        gather_channels<H, tile_vectors>(rows, count, offset + d, dim - d, scores, sums + d, sums_row);
    for (; dim - d > W; d += 2 * W) gather_channels<H, 2>(rows, count, offset + d, dim - d, scores, sums + d, sums_row);
    for (; dim - d > 0; d += W) gather_channels<H, 1>(rows, count, offset + d, dim - d, scores, sums + d, sums_row);
}

// f(h, how many) for the query heads [0, group) of a key head, up to `together` at once.
template <typename F>
PYRLHF_INLINE void for_query_heads(int64_t group, F f) {
    int64_t h = 0;
    for (; group - h >= together; h += together) f(h, std::integral_constant<int, together>{});
    if (group - h == 1) f(h, std::integral_constant<int, 1>{});
    if (group - h == 2) f(h, std::integral_constant<int, 2>{});
    if (group - h == 3) f(h, std::integral_constant<int, 3>{});
}

// The scores of a block relative to the highest so far, and the sums of the blocks before it as well.
PYRLHF_INLINE void soften_all(int64_t heads, int64_t count, const Work& work) {
    for (int64_t h = 0; h < heads; ++h) {
        const float shrink = soften(work.scores + h * key_block, count, work.highest[h], work.total[h]);
        float* const sums = work.sums + h * work.sums_row;
        for (int64_t d = 0; d < work.sums_row; d += W) store(sums + d, load(sums + d) * shrink);
    }
}

template <typename T>
PYRLHF_INLINE void attend_tokens(const Item<T>& item, const Item<T>& next, int64_t kv_heads, int64_t group, int64_t dim,
                                 float factor, const Work& work) {
    const int64_t row_bytes = kv_heads * dim * static_cast<int64_t>(sizeof(T));
    // Rows. Of those that are read together, head by head, the last must have been asked for with the first.
    const int64_t ahead = least(key_block, together - 1 + divide_up(ahead_bytes, row_bytes));
    const int64_t lines = divide_up(together * divide_up(row_bytes, line), kv_heads);  // to ask for at a time
    const T* rows[3 * key_block];
    for (int64_t first = item.first, count; first < item.end; first += count) {
        // Blocks end at multiples of key_block.
        count = least(item.end - first, key_block - first % key_block);
        find_rows(item, first, count, next, ahead, rows);
        Fetch<T> fetch = {rows + ahead, 2 * count, row_bytes};
        // Every key head, within it its query heads, for a few tokens after the other.
        const auto for_tokens = [&](const T* const* from, auto f) PYRLHF_LAMBDA {
            for (int64_t j = 0; j < count; j += together)
                for (int64_t head = 0; head < kv_heads; ++head) {
                    ask(fetch, lines);
                    for_query_heads(group, [&](int64_t h, auto heads) PYRLHF_LAMBDA {
                        f(from + j, least(together, count - j), head * dim, head * group + h, heads,
                          work.scores + (head * group + h) * key_block + j);
                    });
                }
        };
        for_tokens(rows, [&](const T* const* keys, int64_t n, int64_t offset, int64_t h, auto heads,
                             float* scores) PYRLHF_LAMBDA {
            score<heads.value>(keys, n, offset, dim, work.q + h * work.q_row, work.q_row, factor, scores);
        });
        soften_all(kv_heads * group, count, work);
        for_tokens(rows + count, [&](const T* const* values, int64_t n, int64_t offset, int64_t h, auto heads,
                                     const float* scores) PYRLHF_LAMBDA {
            gather<heads.value>(values, n, offset, dim, scores, work.sums + h * work.sums_row, work.sums_row);
        });
    }
}

template <typename T>
PYRLHF_INLINE void begin_work(const T* q, int64_t q_head, int64_t heads, int64_t dim, const Work& work) {
    for (int64_t h = 0; h < heads; ++h) {
        for (int64_t u = 0; u < work.q_row; ++u)
            work.q[h * work.q_row + u] = load_some(q + h * q_head + u * elements<T>, dim - u * elements<T>);
        work.highest[h] = lowest;
        work.total[h] = 0.0f;
    }
    memset(work.sums, 0, static_cast<size_t>(heads * work.sums_row) * sizeof(float));
}

// --- Heads of D channels, W / D of them in a vector ---

// Against one vector of key heads from item.cache on, the query heads that are the `member`-th of their key head. The
// item's tokens are one block; `offsets` tells where they lie, padded with the last one's to a multiple of D.
template <int D, typename T>
PYRLHF_INLINE void attend_side_by_side(const Cache<T>& cache, const int64_t* offsets, int64_t count, vf q,
                                       float* highest, float* total, float* sums) {
    vf scores[key_chunk / D], top = broadcast(lowest), sum = {}, channels[2] = {};
    const int64_t vectors = divide_up(count, D);
    for (int64_t n = 0; n < vectors; ++n) {
        const auto products = [&](int i) PYRLHF_LAMBDA { return load(cache.k + offsets[n * D + i]) * q; };
        const vf dots = sum_segments<D>(products);
        scores[n] = (lane_numbers() & (D - 1)) < static_cast<int32_t>(count - n * D) ? dots : broadcast(lowest);
        top = scores[n] > top ? scores[n] : top;
    }
    top = largest_of_segment<D>(top);
    for (int64_t n = 0; n < vectors; ++n) {
        const vf p = exp2_small(scores[n] - top);
        sum += p;
        for (int i = 0; i < D; ++i) channels[i % 2] += load(cache.v + offsets[n * D + i]) * spread<D>(p, i);
    }
    store(highest, top);
    store(total, sum_of_segment<D>(sum));
    store(sums, channels[0] + channels[1]);
}

template <int D, typename T>
PYRLHF_INLINE void attend_vectors(const Item<T>& item, const T* q, int64_t q_head, int64_t kv_heads, int64_t group,
                                  float factor, const Work& work) {
    const int64_t count = item.end - item.first;
    int64_t offsets[key_chunk + D];
    for (int64_t j = 0; j < count; j += key_block)
        find_tokens(item.cache, item.first + j, least(key_block, count - j), offsets + j);
    for (int i = 0; i < D; ++i) offsets[count + i] = offsets[count - 1];
    for (int64_t first = 0; first < kv_heads; first += W / D)
        for (int64_t member = 0; member < group; ++member) {
            float queries[W], highest[W], total[W], sums[W];
            for (int64_t lane = 0; lane < W; lane += D) {
                const T* const from = q + ((first + lane / D) * group + member) * q_head;
                store(queries + lane, load(from, Part{D}) * factor, Part{D});
            }
            attend_side_by_side<D>(item.cache.at_head(first * D), offsets, count, load(queries), highest, total, sums);
            for (int64_t lane = 0; lane < W; lane += D) {
                const int64_t head = (first + lane / D) * group + member;
                work.highest[head] = highest[lane];
                work.total[head] = total[lane];
                store(work.sums + head * work.sums_row, load(sums + lane, Part{D}));
            }
        }
}

template <typename T>
PYRLHF_INLINE void write_result(const float* sums, float factor, int64_t dim, T* out) {
    for_vectors(dim, [&](int64_t d, auto used) PYRLHF_LAMBDA { store(out + d, load(sums + d) * factor, used); });
}

// The results of a row's heads from the partial results of its chunks, in order: `partials` is [chunks][heads][2 +
// sums_row].
template <typename T>
PYRLHF_INLINE void join_chunks(const float* partials, int64_t chunks, int64_t heads, int64_t dim, int64_t sums_row,
                               T* out) {
    for (int64_t head = 0; head < heads; ++head) {
        float sums[most_dim + tile_vectors * W] = {}, highest = lowest, total = 0.0f;
        for (int64_t c = 0; c < chunks; ++c) {
            const float* const from = partials + (c * heads + head) * (2 + sums_row);
            const float top = from[0] > highest ? from[0] : highest;
            const float before = exp2_small(broadcast(highest - top))[0];
            const float now = exp2_small(broadcast(from[0] - top))[0];
            for (int64_t d = 0; d < sums_row; d += W)
                store(sums + d, load(sums + d) * before + load(from + 2 + d) * now);
            total = total * before + from[1] * now;
            highest = top;
        }
        write_result(sums, chunks == 0 ? 0.0f : 1.0f / total, dim, out + head * dim);
    }
}

// Key heads that share a vector in attend_vectors; 0 where it is not for these.
PYRLHF_INLINE int64_t heads_side_by_side(const DecodeShape& shape) {
    const bool fits = shape.dim >= 4 && shape.dim <= W && W % shape.dim == 0;
    return fits && shape.kv_heads % (W / shape.dim) == 0 ? W / shape.dim : 0;
}

// The first and the last chunk of a row that sees `window` of `length` tokens.
struct Chunks {
    int64_t first_token, begin, end;
    Chunks(int64_t length, int64_t window)
        : first_token(most(0, length - window)), begin(first_token / key_chunk), end(divide_up(length, key_chunk)) {
        if (first_token == length) begin = end;
    }
};

template <typename T>
bool decode(const T* q, const T* k_cache, const T* v_cache, const int32_t* page_table, const int32_t* seq_lens, T* out,
            const DecodeShape& shape, int threads) {
    const int64_t group = shape.heads / shape.kv_heads, dim = shape.dim;
    const int64_t sums_row = round_up(dim, tile_vectors * W);
    const int64_t q_row = divide_up(dim, elements<T>);
    int64_t items = 0, tokens = 0;
    bool joined = false;  // some row is not one chunk
    for (int64_t b = 0; b < shape.rows; ++b) {
        const Chunks chunks(seq_lens[b], shape.window);
        items += chunks.end - chunks.begin;
        joined |= chunks.end - chunks.begin != 1;
        tokens += seq_lens[b] - chunks.first_token;
    }
    // A partial result, [heads][2 + sums_row] floats, a chunk of a row: its highest score, its total, its sums.
    const int64_t partial = sums_row + 2;
    int64_t* const list =
        static_cast<int64_t*>(malloc(static_cast<size_t>(2 * items + shape.rows + 1) * sizeof(int64_t)));
    float* const partials =
        static_cast<float*>(malloc(static_cast<size_t>(items * shape.heads * partial + 1) * sizeof(float)));
    // Where there are few chunks, their key heads are shared out too: no bit depends on that.
    const int64_t beside = heads_side_by_side(shape);
    const int64_t parts = items < 4 * threads ? shape.kv_heads / most(1, beside) : 1, part = shape.kv_heads / parts;
    const int64_t heads = part * group;                           // query heads of an item
    const int64_t floats = q_row * W + sums_row + key_block + 2;  // of Work, a head
    // A thread's own: how many of its items have been taken, on a cache line of its own, then its Work.
    const int64_t region = line + round_up(heads * floats * static_cast<int64_t>(sizeof(float)), line);
    char* const memory = static_cast<char*>(aligned_alloc(line, static_cast<size_t>(region * threads)));
    const bool ready = list && partials && memory;
    int64_t* const starts = list + 2 * items;  // [rows + 1]: the first item of each row
    if (ready) {
        int64_t at = 0;
        for (int64_t b = 0; b < shape.rows; ++b) {
            starts[b] = at;
            const Chunks chunks(seq_lens[b], shape.window);
            for (int64_t c = chunks.begin; c < chunks.end; ++c, ++at) {
                list[2 * at] = b;
                list[2 * at + 1] = c;
            }
        }
        starts[shape.rows] = at;
        for (int t = 0; t < threads; ++t) *reinterpret_cast<int64_t*>(memory + t * region) = 0;
        const float factor = shape.scale * log2_e;
        // Each thread takes the items of its own share, then of others': a count that all of them take from would
        // travel between the cores.
        const auto take_number = [&]() PYRLHF_LAMBDA {
            const int sharing = omp_get_num_threads(), self = omp_get_thread_num();
            for (int i = 0, t = self; i < sharing; ++i, t = t + 1 < sharing ? t + 1 : 0) {
                int64_t& taken = *reinterpret_cast<int64_t*>(memory + t * region);
                int64_t n;
#pragma omp atomic capture
                n = taken++;
                n += items * parts * t / sharing;
                if (n < items * parts * (t + 1) / sharing) return n;
            }
            return items * parts;
        };
        const auto take_item = [&]() PYRLHF_LAMBDA {
            const int64_t n = take_number();
            if (n == items * parts) return Item<T>{shape.rows, 0, 0, {}, 0, 0};
            const int64_t at = n / parts, kv_head = n % parts * part, b = list[2 * at], c = list[2 * at + 1];
            const Cache<T> cache = {k_cache, v_cache, page_table + b * shape.max_pages, shape.page_size,
                                    shape.kv_heads * dim};
            return Item<T>{b,
                           kv_head * group,
                           at * shape.heads + kv_head * group,
                           cache.at_head(kv_head * dim),
                           most(Chunks(seq_lens[b], shape.window).first_token, c * key_chunk),
                           least(seq_lens[b], (c + 1) * key_chunk)};
        };
#pragma omp parallel num_threads(tokens* shape.heads* dim < 65536 ? 1 : threads)
        {
            char* const own = memory + region * omp_get_thread_num() + line;
            Work work;
            work.q = reinterpret_cast<vi*>(own);
            work.q_row = q_row;
            work.sums = reinterpret_cast<float*>(own + heads * q_row * static_cast<int64_t>(sizeof(vi)));
            work.sums_row = sums_row;
            work.scores = work.sums + heads * sums_row;
            work.highest = work.scores + heads * key_block;
            work.total = work.highest + heads;
            Item<T> next = take_item();
            while (next.row < shape.rows) {
                const Item<T> item = next;
                next = take_item();
                const T* const from = q + item.row * shape.q_row + item.head * shape.q_head;
                if (beside) {
                    if constexpr (W >= 16)
                        if (dim == 16) attend_vectors<16>(item, from, shape.q_head, part, group, factor, work);
                    if constexpr (W >= 8)
                        if (dim == 8) attend_vectors<8>(item, from, shape.q_head, part, group, factor, work);
                    if (dim == 4) attend_vectors<4>(item, from, shape.q_head, part, group, factor, work);
                } else {
                    begin_work(from, shape.q_head, heads, dim, work);
                    attend_tokens(item, next, part, group, dim, factor, work);
                }
                const bool whole = starts[item.row + 1] - starts[item.row] == 1;
                for (int64_t h = 0; h < heads; ++h) {
                    const float* const sums = work.sums + h * sums_row;
                    float* const to = partials + (item.partial + h) * partial;
                    if (whole) {
                        write_result(sums, 1.0f / work.total[h], dim,
                                     out + (item.row * shape.heads + item.head + h) * dim);
                    } else {
                        to[0] = work.highest[h];
                        to[1] = work.total[h];
                        memcpy(to + 2, sums, static_cast<size_t>(sums_row) * sizeof(float));
                    }
                }
            }
            if (joined) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
                for (int64_t b = 0; b < shape.rows; ++b)
                    if (starts[b + 1] - starts[b] != 1)
                        join_chunks(partials + starts[b] * shape.heads * partial, starts[b + 1] - starts[b],
                                    shape.heads, dim, sums_row, out + b * shape.heads * dim);
            }
        }
    }
    free(list);
    free(partials);
    free(memory);
    return ready;
}

}  // namespace

bool decode_attention(const void* q, const void* k_cache, const void* v_cache, const int32_t* page_table,
                      const int32_t* seq_lens, void* out, const DecodeShape& shape, DType dtype, int threads) {
    if (dtype == DType::bfloat16)
        return decode(static_cast<const bf16*>(q), static_cast<const bf16*>(k_cache), static_cast<const bf16*>(v_cache),
                      page_table, seq_lens, static_cast<bf16*>(out), shape, threads);
    return decode(static_cast<const float*>(q), static_cast<const float*>(k_cache), static_cast<const float*>(v_cache),
                  page_table, seq_lens, static_cast<float*>(out), shape, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
