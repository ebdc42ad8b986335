// Attention over packed ragged sequences, forward and backward, without a matrix of scores (FlashAttention,
// arXiv:2205.14135; the split into blocks as in FlashAttention-2, arXiv:2307.08691).
//
// A block of queries of one head meets the keys that it may see, a block of keys at a time. Scores are kept
// transposed, [key][query]: queries lie along the vector, so the maximum, the exponentials and the sum of a query need
// no step across lanes, and keys and values are read as they lie in memory. Blocks that a mask hides are not visited.
//
// Blocks are counted from the start of their own sequence (or prefix), and every sum has one order, so a result depends
// on its own sequence (and prefix) only: not on its neighbours, its place in memory or the number of threads.
//
// bfloat16: products of bfloat16 pairs summed in float32; probabilities and their gradients are rounded to bfloat16
// before they meet v, k and q, as the other implementations do.
#include <cmath>
#include <cstdlib>

#if defined(_OPENMP)
#    include <omp.h>
#endif

#include "cpu/kernels.h"
#include "cpu/sizes.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t query_block = 128;          // queries that meet
constexpr int64_t key_block = 64;             // keys at a time
constexpr int64_t chunk_rows = 2048;          // query rows a backward item, where a sequence is long
constexpr int64_t most_chunks = 8;            // items a group of sequences and a key head
constexpr int64_t budget = int64_t{8} << 20;  // bytes a thread of key and value gradients at a time
constexpr float lowest = -3.402823466e38f;
constexpr float log2_e = 1.44269504088896341f;
constexpr double ln_2 = 0.693147180559945309;

// The sizes that every block shares. Rows in scratch memory are filled with zeros up to `padded` elements.
template <typename T>
struct Sizes {
    int64_t dim, padded, row_units, depth, rows, vectors;
    explicit Sizes(int64_t d)
        : dim(d),
          padded(round_up(d, W * per_unit<T>)),
          row_units(padded / per_unit<T>),
          depth(units<T>(d)),
          rows(round_up(d, tile_rows)),
          vectors(divide_up(d, W)) {}
};

struct Span {
    int64_t start, end, prefix_start, prefix_end;
};

PYRLHF_INLINE Span span_of(const int32_t* cu_seqlens, const int32_t* prefix, int64_t s) {
    if (!prefix) return {cu_seqlens[s], cu_seqlens[s + 1], 0, 0};
    return {cu_seqlens[s], cu_seqlens[s + 1], prefix[2 * s], prefix[2 * s + 1]};
}

// A block of queries: `count` of them, the first is number `first` of its sequence.
struct Queries {
    int64_t first, count, vectors;
};

// A block of keys: packed rows from `row`; in its sequence the first is number `first`. `masked`: some of the queries
// must not see some of the keys.
struct Keys {
    int64_t row, first, count;
    bool masked;
};

PYRLHF_INLINE Queries queries_at(int64_t first, int64_t length) {
    const int64_t count = least(query_block, length - first);
    return {first, count, divide_up(count, W)};
}

// Calls visit(Keys) for every block of keys that these queries see, in order: the prefix, then their own sequence.
template <typename Visit>
PYRLHF_INLINE void each_block(const Span& span, const Queries& queries, const AttentionShape& shape, Visit visit) {
    for (int64_t at = span.prefix_start; at < span.prefix_end; at += key_block)
        visit(Keys{at, 0, least(key_block, span.prefix_end - at), false});
    const int64_t last_query = queries.first + queries.count - 1;
    const int64_t end = shape.causal ? last_query + 1 : span.end - span.start;
    const int64_t begin = most(0, queries.first - shape.window + 1) / key_block * key_block;
    for (int64_t at = begin; at < end; at += key_block) {
        const int64_t count = least(key_block, end - at);
        const bool masked = shape.causal && (at + count - 1 > queries.first || at < last_query - shape.window + 1);
        visit(Keys{span.start + at, at, count, masked});
    }
}

// The vectors of queries before this one see nothing of W keys from `key` on (number of the key in its sequence).
PYRLHF_INLINE int64_t first_vector(const Queries& queries, const Keys& keys, int64_t key) {
    if (!keys.masked || keys.first + key <= queries.first) return 0;
    return (keys.first + key - queries.first) / W;
}

// Whether the mask hides some of these keys from some query of vector v.
PYRLHF_INLINE bool hides(const Queries& queries, const Keys& keys, int64_t v, int64_t window) {
    const int64_t first = queries.first + v * W;
    return keys.masked && (keys.first + keys.count - 1 > first || keys.first < first + W - window);
}

// Which queries of vector v see key number `key` of their sequence.
PYRLHF_INLINE vi visible(const Queries& queries, int64_t v, int64_t key, int64_t window) {
    const vi ahead = lane_numbers() + static_cast<int32_t>(queries.first + v * W - key);  // of the key
    return (ahead >= 0) & (ahead < static_cast<int32_t>(least(window, INT32_MAX)));
}

// --- blocks in and out of scratch memory ---

// `count` rows of dim elements -> rows of size.row_units units, zeros behind them and in rows up to `filled`.
template <typename T, typename Unit>
PYRLHF_INLINE void load_rows(const T* from, int64_t stride, int64_t count, int64_t filled, const Sizes<T>& size,
                             Unit* to) {
    const int64_t whole = size.dim * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(vi));
    const int64_t vectors = size.row_units / W;
    const size_t rest = static_cast<size_t>(size.dim) * sizeof(T) % sizeof(vi);
    for (int64_t r = 0; r < count; ++r) {
        const char* in = reinterpret_cast<const char*>(from + r * stride);
        vi row;
        for (int64_t i = 0; i < whole; ++i) {
            memcpy(&row, in + i * static_cast<int64_t>(sizeof(vi)), sizeof(vi));
            store_units(to + r * size.row_units + i * W, row);
        }
        if (whole == vectors) continue;
        row = vi{};
        memcpy(&row, in + whole * static_cast<int64_t>(sizeof(vi)), rest);
        store_units(to + r * size.row_units + whole * W, row);
    }
    memset(to + count * size.row_units, 0, static_cast<size_t>((filled - count) * size.row_units) * sizeof(Unit));
}

PYRLHF_INLINE void negate(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = -x[i];
}
PYRLHF_INLINE void negate(pair* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i].bits ^= 0x80008000u;
}

// Rows r and r + 1 become one row of pairs, so that products can run along the rows: [count][D] -> [count / 2][D].
template <typename T>
PYRLHF_INLINE void pair_rows(const pair* rows, int64_t count, const Sizes<T>& size, pair* to) {
    for (int64_t r = 0; r < count; r += 2) {
        const bf16* even = reinterpret_cast<const bf16*>(rows + r * size.row_units);
        const bf16* odd = reinterpret_cast<const bf16*>(rows + (r + 1) * size.row_units);
        pair* out = to + r / 2 * size.padded;
        for (int64_t d = 0; d < size.padded; d += W) {
            store_units(out + d, (vi)((vu)load(even + d) >> 16) | (vi)load(odd + d));
        }
    }
}

template <typename T>
PYRLHF_INLINE void write_row(const float* from, int64_t n, T* to) {
    for_vectors(n, [&](int64_t d, auto used) PYRLHF_LAMBDA { store(to + d, load(from + d), used); });
}

// to[query] = from[.][query] * factors[query]: the sums of a block, [D][query_block] transposed, into rows of the
// result.
template <typename T>
PYRLHF_INLINE void write_transposed(float* from, const float* factors, const Queries& queries, const Sizes<T>& size,
                                    float* scratch, T* to, int64_t stride) {
    for (int64_t d = 0; d < size.dim; ++d)
        for (int64_t v = 0; v < queries.vectors; ++v)
            store(from + d * query_block + v * W, load(from + d * query_block + v * W) * load(factors + v * W));
    transpose(from, query_block, size.vectors * W, queries.vectors * W, scratch, size.padded);
    for (int64_t r = 0; r < queries.count; ++r) write_row(scratch + r * size.padded, size.dim, to + r * stride);
}

// --- scratch memory: one region a thread ---

struct Arena {
    char* at;
    template <typename Element>
    Element* take(int64_t n) {
        Element* out = reinterpret_cast<Element*>(at);
        at += round_up(n * static_cast<int64_t>(sizeof(Element)), 64);
        return out;
    }
};

PYRLHF_INLINE int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

PYRLHF_INLINE char* allocate(int64_t bytes) {
    return static_cast<char*>(aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64))));
}

// What every item reads.
template <typename T>
struct Tensors {
    const T *q, *k, *v;
    const AttentionShape& shape;
    Sizes<T> size;
    float factor;  // |scale| log2(e): scores count in powers of two
    int64_t group;
    Tensors(const void* q_, const void* k_, const void* v_, const AttentionShape& s)
        : q(static_cast<const T*>(q_)),
          k(static_cast<const T*>(k_)),
          v(static_cast<const T*>(v_)),
          shape(s),
          size(s.dim),
          factor(std::fabs(s.scale) * log2_e),
          group(s.heads / s.kv_heads) {}
    // Too little work for a second thread to pay.
    bool small() const { return shape.tokens * shape.heads * shape.dim < 16384; }
};

// q of a block as rows and, with the sign of the scale, transposed.
template <typename T, typename Unit>
PYRLHF_INLINE void load_queries(const Tensors<T>& in, const Span& span, int64_t head, const Queries& queries,
                                Unit* rows, Unit* transposed) {
    const Sizes<T>& size = in.size;
    const T* from = in.q + (span.start + queries.first) * in.shape.q_token + head * in.shape.q_head;
    load_rows(from, in.shape.q_token, queries.count, queries.vectors * W, size, rows);
    transpose(rows, size.row_units, queries.vectors * W, size.row_units, transposed, query_block);
    if (in.shape.scale < 0.0f) negate(transposed, size.row_units * query_block);
}

// scores[key][query], for the keys of one block; parts that a mask hides are left as they are.
template <typename T, typename Unit>
PYRLHF_INLINE void score(const Unit* keys_by_row, const Unit* transposed, const Queries& queries, const Keys& keys,
                         const Sizes<T>& size, float* scores) {
    const Strides at = {size.row_units, 1, query_block, query_block};
    const int64_t step = keys.masked ? W : key_block;
    for (int64_t j = 0; j < keys.count; j += step) {
        const int64_t v = first_vector(queries, keys, j), rows = least(step, round_up(keys.count - j, tile_rows));
        if (v < queries.vectors)
            multiply<Into::replace>(scores + j * query_block + v * W, keys_by_row + j * size.row_units,
                                    transposed + v * W, rows, queries.vectors - v, size.depth, at);
    }
}

// sums[d][query] meets rows_by_key^T @ weights, the product along the keys of one block; both hold units along the
// keys. Under a mask, two vectors of queries at a time stop at the last key that they see.
template <Into into, typename T, typename Unit>
PYRLHF_INLINE void along_keys(float* sums, const Unit* rows_by_key, const Unit* weights, const Queries& queries,
                              const Keys& keys, const Sizes<T>& size, const float* factors = nullptr) {
    for (int64_t v = 0, step; v < queries.vectors; v += step) {
        const int64_t seen = keys.masked ? queries.first + (v + 2) * W - keys.first : keys.count;
        step = seen < keys.count ? least(2, queries.vectors - v) : queries.vectors - v;
        multiply<into>(sums + v * W, rows_by_key, weights + v * W, size.rows, step,
                       units<T>(most(0, least(keys.count, seen))), Strides{1, size.padded, query_block, query_block},
                       factors_from<into>(factors, v * W));
    }
}

// --- forward ---

template <typename T>
struct ForwardScratch {
    using Unit = typename UnitOf<T>::type;
    Unit *rows, *transposed, *keys, *values, *weights;
    float *scores, *sums, *highest, *total, *factors;
    explicit ForwardScratch(const Sizes<T>& size, char* memory) {
        Arena arena{memory};
        rows = arena.take<Unit>(query_block * size.row_units);
        transposed = arena.take<Unit>(size.row_units * query_block);
        keys = arena.take<Unit>(query_block * size.row_units);
        values = arena.take<Unit>(query_block / per_unit<T> * size.padded);
        weights = arena.take<Unit>(query_block * query_block);
        scores = arena.take<float>(query_block * most(key_block, size.padded));
        sums = arena.take<float>(size.padded * query_block);
        highest = arena.take<float>(query_block);
        total = arena.take<float>(query_block);
        factors = arena.take<float>(query_block);
    }
    static int64_t bytes(const Sizes<T>& size) { return 4 * query_block * (6 * size.padded + 2 * query_block + 32); }
};

// Puts the probabilities of vector v in place of its scores, [key][query] as units along the keys.
PYRLHF_INLINE void put_weights(float* weights, int64_t key, int64_t v, vf even, vf odd) {
    store(weights + key * query_block + v * W, even);
    store(weights + (key + 1) * query_block + v * W, odd);
}
PYRLHF_INLINE void put_weights(pair* weights, int64_t key, int64_t v, vf even, vf odd) {
    store_units(weights + key / 2 * query_block + v * W, to_pairs(even, odd));
}

// One step of the online softmax for vector v of the queries: scores become probabilities relative to the new maximum;
// factors is what earlier sums must be multiplied by.
template <bool masked, typename Unit>
__attribute__((noinline)) void soften(float* scores, Unit* weights, const Queries& queries, const Keys& keys, int64_t v,
                                      float factor, int64_t window, float* highest, float* total, float* factors) {
    float* column = scores + v * W;
    vf top = broadcast(lowest);
    for (int64_t j = 0; j < keys.count; ++j) {
        vf s = load(column + j * query_block);
        if (masked) s = visible(queries, v, keys.first + j, window) ? s : broadcast(lowest);
        top = s > top ? s : top;
    }
    top = top * factor;
    const vf before = load(highest + v * W);
    top = before > top ? before : top;
    const vf shrink = exp2_small(before - top);
    vf sum = load(total + v * W) * shrink;
    const auto probability = [&](int64_t j) PYRLHF_LAMBDA {
        const vf p = exp2_small(load(column + j * query_block) * factor - top);
        return masked ? (visible(queries, v, keys.first + j, window) ? p : vf{}) : p;
    };
    int64_t j = 0;
    for (; j + 2 <= keys.count; j += 2) {
        const vf even = probability(j), odd = probability(j + 1);
        sum += even;
        sum += odd;
        put_weights(weights, j, v, even, odd);
    }
    if (j < keys.count) {
        const vf even = probability(j);
        sum += even;
        put_weights(weights, j, v, even, vf{});
    }
    store(highest + v * W, top);
    store(total + v * W, sum);
    store(factors + v * W, shrink);
}

// v of a block: rows for float32, pairs along the keys for bfloat16.
PYRLHF_INLINE void load_values(const Tensors<float>& in, const Keys& keys, int64_t kv_head, float*, float* to) {
    const float* from = in.v + keys.row * in.shape.v_token + kv_head * in.shape.v_head;
    load_rows(from, in.shape.v_token, keys.count, keys.count, in.size, to);
}
PYRLHF_INLINE void load_values(const Tensors<bf16>& in, const Keys& keys, int64_t kv_head, pair* rows, pair* to) {
    const bf16* from = in.v + keys.row * in.shape.v_token + kv_head * in.shape.v_head;
    load_rows(from, in.shape.v_token, keys.count, round_up(keys.count, 2), in.size, rows);
    pair_rows(rows, keys.count, in.size, to);
}

template <typename T>
PYRLHF_INLINE void attend_block(const Tensors<T>& in, const Span& span, int64_t head, const Queries& queries,
                                const ForwardScratch<T>& scratch, T* out, float* lse) {
    const Sizes<T>& size = in.size;
    const AttentionShape& shape = in.shape;
    const int64_t kv_head = head / in.group;
    load_queries(in, span, head, queries, scratch.rows, scratch.transposed);
    memset(scratch.sums, 0, static_cast<size_t>(size.padded * query_block) * sizeof(float));
    for (int64_t i = 0; i < query_block; ++i) scratch.highest[i] = lowest, scratch.total[i] = 0.0f;
    each_block(span, queries, shape, [&](const Keys& keys) {
        const T* from = in.k + keys.row * shape.k_token + kv_head * shape.k_head;
        load_rows(from, shape.k_token, keys.count, round_up(keys.count, tile_rows), size, scratch.keys);
        score(scratch.keys, scratch.transposed, queries, keys, size, scratch.scores);
        for (int64_t v = 0; v < queries.vectors; ++v) {
            if (hides(queries, keys, v, shape.window))
                soften<true>(scratch.scores, scratch.weights, queries, keys, v, in.factor, shape.window,
                             scratch.highest, scratch.total, scratch.factors);
            else
                soften<false>(scratch.scores, scratch.weights, queries, keys, v, in.factor, shape.window,
                              scratch.highest, scratch.total, scratch.factors);
        }
        load_values(in, keys, kv_head, scratch.rows, scratch.values);
        along_keys<Into::scale_and_add>(scratch.sums, scratch.values, scratch.weights, queries, keys, size,
                                        scratch.factors);
    });
    for (int64_t i = 0; i < query_block; ++i) {
        const float total = scratch.total[i];
        scratch.factors[i] = 1.0f / total;
        if (i < queries.count)
            lse[i] = static_cast<float>(
                (static_cast<double>(scratch.highest[i]) + std::log2(static_cast<double>(total))) * ln_2);
    }
    write_transposed(scratch.sums, scratch.factors, queries, size, scratch.scores, out, shape.heads * shape.dim);
}

template <typename T>
bool forward(const Tensors<T>& in, const int32_t* cu_seqlens, const int32_t* prefix, T* out, float* lse, int threads) {
    const AttentionShape& shape = in.shape;
    int64_t blocks = 0;
    for (int64_t s = 0; s < shape.sequences; ++s) blocks += divide_up(cu_seqlens[s + 1] - cu_seqlens[s], query_block);
    const int64_t region = round_up(ForwardScratch<T>::bytes(in.size), 64);
    // Per block of queries: its sequence, and how many blocks come before that sequence.
    int64_t* const owners = static_cast<int64_t*>(malloc(static_cast<size_t>(2 * blocks + 1) * sizeof(int64_t)));
    char* const memory = allocate(region * threads);
    if (!owners || !memory) {
        free(owners);
        free(memory);
        return false;
    }
    for (int64_t s = 0, at = 0; s < shape.sequences; ++s) {
        const int64_t before = at, count = divide_up(cu_seqlens[s + 1] - cu_seqlens[s], query_block);
        for (; at < before + count; ++at) {
            owners[2 * at] = s;
            owners[2 * at + 1] = before;
        }
    }
    // Heads of a sequence come one after the other, its longest blocks first: keys stay in cache, cores end together.
#pragma omp parallel num_threads(in.small() ? 1 : threads)
    {
        const ForwardScratch<T> scratch(in.size, memory + region * thread_number());
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < blocks * shape.heads; ++item) {
            const int64_t s = owners[2 * (item / shape.heads)], before = owners[2 * (item / shape.heads) + 1];
            const Span span = span_of(cu_seqlens, prefix, s);
            const int64_t length = span.end - span.start, count = divide_up(length, query_block);
            const int64_t local = item - before * shape.heads, head = local / count;
            const int64_t first = (count - 1 - local % count) * query_block;
            const Queries queries = queries_at(first, length);
            attend_block(in, span, head, queries, scratch,
                         out + ((span.start + first) * shape.heads + head) * shape.dim,
                         lse + head * shape.tokens + span.start + first);
        }
    }
    free(owners);
    free(memory);
    return true;
}

// --- backward ---
//
// An item is a chunk of the query blocks of a group of sequences and one key head: it owns the gradients of its
// queries, and adds those of the keys into a buffer of its own. Sequences that a prefix ties together form a group. The
// chunks of a group are added in order; how many there are depends on the group alone.

// Products that run along the queries (or the keys) want pairs along them; float32 takes the rows as they are.
template <typename T>
PYRLHF_INLINE float* along_rows(float* rows, int64_t, const Sizes<T>&, float*) {
    return rows;
}
template <typename T>
PYRLHF_INLINE pair* along_rows(pair* rows, int64_t count, const Sizes<T>& size, pair* to) {
    pair_rows(rows, count, size, to);
    return to;
}

// Probabilities and gradients of scores, as the three products want them.
template <typename Unit>
struct Weights {
    Unit* by_query;       // [key][query_block] units along the queries: probabilities
    Unit* grad_by_query;  // the same of the scores' gradients
    Unit* grad_by_key;    // [key / elements][query_block] units along the keys
};

PYRLHF_INLINE void put_gradients(const Weights<float>& to, int64_t key, int64_t v, const vf (&p)[2],
                                 const vf (&grad)[2]) {
    for (int i = 0; i < 2; ++i) {
        store(to.by_query + (key + i) * query_block + v * W, p[i]);
        store(to.grad_by_query + (key + i) * query_block + v * W, grad[i]);
    }
}
PYRLHF_INLINE void put_gradients(const Weights<pair>& to, int64_t key, int64_t v, const vf (&p)[2],
                                 const vf (&grad)[2]) {
    for (int i = 0; i < 2; ++i) {
        store(reinterpret_cast<bf16*>(to.by_query + (key + i) * query_block / 2) + v * W, p[i], Whole{});
        store(reinterpret_cast<bf16*>(to.grad_by_query + (key + i) * query_block / 2) + v * W, grad[i], Whole{});
    }
    store_units(to.grad_by_key + key / 2 * query_block + v * W, to_pairs(grad[0], grad[1]));
}

template <typename T>
struct BackwardScratch {
    using Unit = typename UnitOf<T>::type;
    Unit *queries, *queries_transposed, *queries_along, *grads, *grads_transposed, *grads_along;
    Unit *keys, *keys_along, *values;
    Weights<Unit> weights;
    float *scores, *grad_weights, *grad_queries, *rows, *lse, *delta, *factors;
    explicit BackwardScratch(const Sizes<T>& size, char* memory) {
        Arena arena{memory};
        for (Unit** each : {&queries, &queries_transposed, &queries_along, &grads, &grads_transposed, &grads_along,
                            &keys, &keys_along, &values})
            *each = arena.take<Unit>(query_block * size.padded);
        scores = arena.take<float>(query_block * query_block);
        grad_weights = arena.take<float>(query_block * query_block);
        set_weights(arena);
        grad_queries = arena.take<float>(size.padded * query_block);
        rows = arena.take<float>(size.padded * query_block);
        for (float** each : {&lse, &delta, &factors}) *each = arena.take<float>(query_block);
    }
    void set_weights(Arena& arena);
    static int64_t bytes(const Sizes<T>& size) { return 4 * query_block * (11 * size.padded + 4 * query_block + 32); }
};

template <>
void BackwardScratch<float>::set_weights(Arena&) {
    weights = {scores, grad_weights, grad_weights};  // in place
}
template <>
void BackwardScratch<bf16>::set_weights(Arena& arena) {
    for (pair** each : {&weights.by_query, &weights.grad_by_query, &weights.grad_by_key})
        *each = arena.take<pair>(query_block * query_block / 2);
}

// sum over d of grad[d] * out[d]: what the softmax takes off each gradient of a query's scores.
template <typename T>
PYRLHF_INLINE float dot(const T* a, const T* b, int64_t n) {
    vf sums = {};
    int64_t d = 0;
    for (; d + W <= n; d += W) sums = load(a + d) * load(b + d) + sums;
    float out = static_cast<float>(sum(sums));
    for (; d < n; ++d) out += to_float(a[d]) * to_float(b[d]);
    return out;
}

// The buffer of an item: gradients of the keys and values of its group, [tokens][padded] each.
struct KeyGrads {
    float *k, *v;
};

template <typename T>
struct Gradients {
    const T *out, *grad_out;  // [tokens, heads, dim]
    const float* lse;         // [heads, tokens]
    T *grad_q, *grad_k, *grad_v;
};

// Probabilities and the gradients of scores, of vector v of the queries.
template <bool masked, typename Unit>
__attribute__((noinline)) void differentiate(const float* scores, const float* grad_weights, const Queries& queries,
                                             const Keys& keys, int64_t v, float factor, int64_t window,
                                             const float* lse, const float* delta, const Weights<Unit>& to) {
    const vf base = load(lse + v * W), less = load(delta + v * W);
    for (int64_t j = 0; j < keys.count; j += 2) {
        vf p[2], grad[2];
        for (int i = 0; i < 2; ++i) {
            const int64_t at = (j + i) * query_block + v * W;
            p[i] = exp2_small(load(scores + at) * factor - base);
            grad[i] = p[i] * (load(grad_weights + at) - less);
            if (!masked && j + i < keys.count) continue;
            const vi seen = j + i < keys.count ? visible(queries, v, keys.first + j + i, window) : vi{};
            p[i] = seen ? p[i] : vf{};
            grad[i] = seen ? grad[i] : vf{};
        }
        put_gradients(to, j, v, p, grad);
    }
}

// Adds what the queries of a block owe to one block of keys.
template <typename T>
PYRLHF_INLINE void add_key_grads(const Queries& queries, const Keys& keys, const BackwardScratch<T>& scratch,
                                 const Sizes<T>& size, float* grad_k, float* grad_v) {
    constexpr int e = per_unit<T>;
    const Strides at = {query_block / e, 1, size.padded, size.padded};
    const int64_t step = keys.masked ? W : key_block;
    for (int64_t j = 0; j < keys.count; j += step) {
        const int64_t skipped = first_vector(queries, keys, j) * W / e, rows = least(step, keys.count - j);
        const int64_t depth = units<T>(queries.count) - skipped, from = j * (query_block / e) + skipped;
        if (depth <= 0) continue;
        multiply<Into::add>(grad_v + j * size.padded, scratch.weights.by_query + from,
                            scratch.grads_along + skipped * size.padded, rows, size.vectors, depth, at);
        multiply<Into::add>(grad_k + j * size.padded, scratch.weights.grad_by_query + from,
                            scratch.queries_along + skipped * size.padded, rows, size.vectors, depth, at);
    }
}

// A block of queries: its own gradient is written, those of its keys are added to `own` and `prefix`, which start with
// the first key of its sequence and of its prefix.
template <typename T>
PYRLHF_INLINE void differentiate_block(const Tensors<T>& in, const Gradients<T>& grads, const Span& span, int64_t head,
                                       const Queries& queries, BackwardScratch<T> scratch, const KeyGrads& own,
                                       const KeyGrads& prefix) {
    const Sizes<T>& size = in.size;
    const AttentionShape& shape = in.shape;
    const int64_t kv_head = head / in.group, row = span.start + queries.first;
    const int64_t stride = shape.heads * shape.dim, at_block = row * stride + head * shape.dim;
    load_queries(in, span, head, queries, scratch.queries, scratch.queries_transposed);
    load_rows(grads.grad_out + at_block, stride, queries.count, queries.vectors * W, size, scratch.grads);
    transpose(scratch.grads, size.row_units, queries.vectors * W, size.row_units, scratch.grads_transposed,
              query_block);
    scratch.queries_along = along_rows(scratch.queries, queries.count, size, scratch.queries_along);
    scratch.grads_along = along_rows(scratch.grads, queries.count, size, scratch.grads_along);
    for (int64_t i = 0; i < query_block; ++i) {
        const bool real = i < queries.count;
        const int64_t at = at_block + i * stride;
        scratch.lse[i] =
            real ? static_cast<float>(static_cast<double>(grads.lse[head * shape.tokens + row + i]) / ln_2) : 0.0f;
        scratch.delta[i] = real ? dot(grads.grad_out + at, grads.out + at, size.dim) : 0.0f;
        scratch.factors[i] = shape.scale;
    }
    memset(scratch.grad_queries, 0, static_cast<size_t>(size.padded * query_block) * sizeof(float));
    each_block(span, queries, shape, [&](const Keys& keys) {
        const int64_t filled = round_up(keys.count, tile_rows);
        load_rows(in.k + keys.row * shape.k_token + kv_head * shape.k_head, shape.k_token, keys.count, filled, size,
                  scratch.keys);
        load_rows(in.v + keys.row * shape.v_token + kv_head * shape.v_head, shape.v_token, keys.count, filled, size,
                  scratch.values);
        score(scratch.keys, scratch.queries_transposed, queries, keys, size, scratch.scores);
        score(scratch.values, scratch.grads_transposed, queries, keys, size, scratch.grad_weights);
        for (int64_t v = 0; v < queries.vectors; ++v) {
            if (hides(queries, keys, v, shape.window))
                differentiate<true>(scratch.scores, scratch.grad_weights, queries, keys, v, in.factor, shape.window,
                                    scratch.lse, scratch.delta, scratch.weights);
            else
                differentiate<false>(scratch.scores, scratch.grad_weights, queries, keys, v, in.factor, shape.window,
                                     scratch.lse, scratch.delta, scratch.weights);
        }
        const bool in_prefix = keys.row < span.start || keys.row >= span.end;
        const KeyGrads& to = in_prefix ? prefix : own;
        const int64_t offset = (keys.row - (in_prefix ? span.prefix_start : span.start)) * size.padded;
        add_key_grads(queries, keys, scratch, size, to.k + offset, to.v + offset);
        along_keys<Into::add>(scratch.grad_queries, along_rows(scratch.keys, keys.count, size, scratch.keys_along),
                              scratch.weights.grad_by_key, queries, keys, size);
    });
    write_transposed(scratch.grad_queries, scratch.factors, queries, size, scratch.rows, grads.grad_q + at_block,
                     stride);
}

// Groups of sequences that a prefix ties together.
struct Groups {
    int64_t count;
    int32_t* order;         // [sequences]: sequences, group by group
    int32_t* starts;        // [count + 1]: where each group starts in `order`
    int32_t* numbers;       // [sequences]: the group of each
    int64_t* bases;         // [sequences]: the first row of a sequence in its group's buffers
    int64_t* prefix_bases;  // [sequences]: that of its prefix
    int64_t* tokens;        // [count]
    int64_t* blocks;        // [count]: blocks of queries of one head
};

PYRLHF_INLINE int32_t root_of(int32_t* parents, int32_t s) {
    while (parents[s] != s) s = parents[s] = parents[parents[s]];
    return s;
}

// The last sequence that starts at or before packed row `row`, and is not empty.
PYRLHF_INLINE int64_t sequence_at(const int32_t* cu_seqlens, int64_t sequences, int64_t row) {
    int64_t low = 0, high = sequences;  // cu_seqlens[low] <= row < cu_seqlens[high]
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (cu_seqlens[middle] <= row ? low : high) = middle;
    }
    return low;
}

// `parents` has room for one number a sequence.
PYRLHF_INLINE void group_sequences(const int32_t* cu_seqlens, const int32_t* prefix, int64_t sequences,
                                   int32_t* parents, Groups& groups) {
    for (int32_t s = 0; s < sequences; ++s) parents[s] = s;
    for (int32_t s = 0; prefix && s < sequences; ++s) {
        const Span span = span_of(cu_seqlens, prefix, s);
        if (span.start == span.end) continue;
        for (int64_t row = span.prefix_start; row < span.prefix_end;) {
            const int64_t other = sequence_at(cu_seqlens, sequences, row);
            const int32_t a = root_of(parents, s), b = root_of(parents, static_cast<int32_t>(other));
            parents[a > b ? a : b] = a > b ? b : a;  // the root is a group's first sequence
            row = cu_seqlens[other + 1];
        }
    }
    // Roots become numbers of groups, in order; then a counting sort.
    groups.count = 0;
    for (int32_t s = 0; s < sequences; ++s) {
        const int32_t root = root_of(parents, s);
        if (root == s) {
            groups.starts[groups.count] = 0;
            groups.tokens[groups.count] = groups.blocks[groups.count] = 0;
            groups.numbers[s] = static_cast<int32_t>(groups.count++);
        }
        const int32_t group = groups.numbers[s] = groups.numbers[root];
        const int64_t length = cu_seqlens[s + 1] - cu_seqlens[s];
        ++groups.starts[group];
        groups.bases[s] = groups.tokens[group];
        groups.tokens[group] += length;
        groups.blocks[group] += divide_up(length, query_block);
    }
    int32_t filled = 0;
    for (int64_t g = 0; g < groups.count; ++g) filled += groups.starts[g];
    groups.starts[groups.count] = filled;
    for (int64_t g = groups.count - 1; g >= 0; --g) groups.starts[g] = groups.starts[g + 1] - groups.starts[g];
    for (int64_t g = 0; g < groups.count; ++g) parents[g] = groups.starts[g];  // from here on the next free place
    for (int32_t s = 0; s < sequences; ++s) groups.order[parents[groups.numbers[s]]++] = s;
    for (int64_t s = 0; s < sequences; ++s) {
        groups.prefix_bases[s] = 0;
        const Span span = span_of(cu_seqlens, prefix, s);
        if (span.prefix_start == span.prefix_end || span.start == span.end) continue;
        const int64_t other = sequence_at(cu_seqlens, sequences, span.prefix_start);
        groups.prefix_bases[s] = groups.bases[other] + span.prefix_start - cu_seqlens[other];
    }
}

// What the items of one group and key head need: a range of chunks, and where their buffers start.
struct Share {
    int64_t group, kv_head, chunks, offset;
};

PYRLHF_INLINE int64_t chunks_of(const Groups& groups, int64_t g, int64_t heads) {
    const int64_t blocks = groups.blocks[g] * heads;
    return most(1, least(most_chunks, divide_up(blocks * query_block, chunk_rows)));
}

// The blocks of queries of one chunk of a share, in order: sequences, their heads, their blocks.
template <typename T>
PYRLHF_INLINE void differentiate_chunk(const Tensors<T>& in, const Gradients<T>& grads, const int32_t* cu_seqlens,
                                       const int32_t* prefix, const Groups& groups, const Share& share, int64_t chunk,
                                       const BackwardScratch<T>& scratch, float* buffer) {
    const int64_t rows = groups.tokens[share.group], padded = in.size.padded;
    float* const grad_k = buffer + 2 * chunk * rows * padded;
    float* const grad_v = grad_k + rows * padded;
    memset(grad_k, 0, static_cast<size_t>(2 * rows * padded) * sizeof(float));
    const int64_t blocks = groups.blocks[share.group] * in.group;
    const int64_t begin = blocks * chunk / share.chunks, end = blocks * (chunk + 1) / share.chunks;
    int64_t at = 0;
    for (int32_t i = groups.starts[share.group]; i < groups.starts[share.group + 1]; ++i) {
        const int64_t s = groups.order[i];
        const Span span = span_of(cu_seqlens, prefix, s);
        const int64_t length = span.end - span.start, count = divide_up(length, query_block);
        const KeyGrads own = {grad_k + groups.bases[s] * padded, grad_v + groups.bases[s] * padded};
        const KeyGrads shared = {grad_k + groups.prefix_bases[s] * padded, grad_v + groups.prefix_bases[s] * padded};
        for (int64_t local = most(0, begin - at); local < least(count * in.group, end - at); ++local)
            differentiate_block(in, grads, span, share.kv_head * in.group + local / count,
                                queries_at(local % count * query_block, length), scratch, own, shared);
        at += count * in.group;
    }
}

// Adds the chunks of a share and writes the gradients of its keys and values.
template <typename T>
PYRLHF_INLINE void write_key_grads(const Tensors<T>& in, const Gradients<T>& grads, const int32_t* cu_seqlens,
                                   const Groups& groups, const Share& share, const float* buffer) {
    const int64_t rows = groups.tokens[share.group], padded = in.size.padded;
    alignas(64) float sums[256 + W];
    for (int32_t i = groups.starts[share.group]; i < groups.starts[share.group + 1]; ++i) {
        const int64_t s = groups.order[i];
        for (int64_t t = cu_seqlens[s]; t < cu_seqlens[s + 1]; ++t) {
            const float* from = buffer + (groups.bases[s] + t - cu_seqlens[s]) * padded;
            const int64_t to = (t * in.shape.kv_heads + share.kv_head) * in.shape.dim;
            for (int which = 0; which < 2; ++which, from += rows * padded) {
                const float factor = which ? 1.0f : in.shape.scale;
                for (int64_t d = 0; d < in.size.vectors * W; d += W) {
                    vf total = load(from + d);
                    for (int64_t c = 1; c < share.chunks; ++c) total += load(from + 2 * c * rows * padded + d);
                    store(sums + d, total * factor);
                }
                write_row(sums, in.shape.dim, (which ? grads.grad_v : grads.grad_k) + to);
            }
        }
    }
}

template <typename T>
bool backward(const Tensors<T>& in, const Gradients<T>& grads, const int32_t* cu_seqlens, const int32_t* prefix,
              int threads) {
    const AttentionShape& shape = in.shape;
    const int64_t n = shape.sequences, region = round_up(BackwardScratch<T>::bytes(in.size), 64);
    char* const plan = allocate((6 * 64 + 4 * (4 * n + 8) + 8 * 4 * (n + 1)));
    if (!plan) return false;
    Arena arena{plan};
    int32_t* const parents = arena.take<int32_t>(n + 1);
    Groups groups;
    groups.order = arena.take<int32_t>(n);
    groups.starts = arena.take<int32_t>(n + 1);
    groups.numbers = arena.take<int32_t>(n);
    for (int64_t** each : {&groups.bases, &groups.prefix_bases, &groups.tokens, &groups.blocks})
        *each = arena.take<int64_t>(n);
    group_sequences(cu_seqlens, prefix, n, parents, groups);

    const int64_t shares = groups.count * shape.kv_heads;
    const auto floats_of = [&](int64_t g) {
        return 2 * chunks_of(groups, g, in.group) * groups.tokens[g] * in.size.padded;
    };
    int64_t total = 0, largest = 0, items = 0;
    for (int64_t g = 0; g < groups.count; ++g) {
        total += floats_of(g) * shape.kv_heads;
        largest = most(largest, floats_of(g));
        items += chunks_of(groups, g, in.group) * shape.kv_heads;
    }
    const int64_t room = most(largest, least(total, threads * budget / static_cast<int64_t>(sizeof(float))));
    float* const buffers = reinterpret_cast<float*>(allocate(room * static_cast<int64_t>(sizeof(float)) + 64));
    char* const memory = allocate(region * threads);
    Share* const plans = static_cast<Share*>(malloc(static_cast<size_t>(shares + 1) * sizeof(Share)));
    int64_t* const work = static_cast<int64_t*>(malloc(static_cast<size_t>(2 * items + 1) * sizeof(int64_t)));
    const bool ready = buffers && memory && plans && work;
    for (int64_t done = 0; ready && done < shares;) {
        // As many shares as there is room for.
        int64_t next = done, used = 0, todo = 0;
        for (; next < shares; ++next) {
            const int64_t g = next / shape.kv_heads;
            if (used + floats_of(g) > room) break;
            plans[next] = {g, next % shape.kv_heads, chunks_of(groups, g, in.group), used};
            used += floats_of(g);
            for (int64_t c = plans[next].chunks - 1; c >= 0; --c, ++todo) {
                work[2 * todo] = next;
                work[2 * todo + 1] = c;
            }
        }
#pragma omp parallel num_threads(in.small() ? 1 : threads)
        {
            const BackwardScratch<T> scratch(in.size, memory + region * thread_number());
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < todo; ++item) {
                const Share& share = plans[work[2 * item]];
                float* const buffer = buffers + share.offset;
                differentiate_chunk(in, grads, cu_seqlens, prefix, groups, share, work[2 * item + 1], scratch, buffer);
                if (share.chunks == 1) write_key_grads(in, grads, cu_seqlens, groups, share, buffer);
            }
#pragma omp for schedule(dynamic)
            for (int64_t p = done; p < next; ++p)
                if (plans[p].chunks > 1)
                    write_key_grads(in, grads, cu_seqlens, groups, plans[p], buffers + plans[p].offset);
        }
        done = next;
    }
    for (void* each : {static_cast<void*>(plan), static_cast<void*>(buffers), static_cast<void*>(memory),
                       static_cast<void*>(plans), static_cast<void*>(work)})
        free(each);
    return ready;
}

template <typename T>
bool attention_of(const void* q, const void* k, const void* v, const int32_t* cu_seqlens, const int32_t* prefix,
                  void* out, float* lse, const AttentionShape& shape, int threads) {
    return forward<T>({q, k, v, shape}, cu_seqlens, prefix, static_cast<T*>(out), lse, threads);
}

template <typename T>
bool attention_backward_of(const AttentionGrads& g, const void* q, const void* k, const void* v,
                           const int32_t* cu_seqlens, const int32_t* prefix, const AttentionShape& shape, int threads) {
    const Gradients<T> grads = {
        static_cast<const T*>(g.out), static_cast<const T*>(g.grad_out), g.lse,
        static_cast<T*>(g.grad_q),    static_cast<T*>(g.grad_k),         static_cast<T*>(g.grad_v)};
    return backward<T>({q, k, v, shape}, grads, cu_seqlens, prefix, threads);
}

}  // namespace

bool attention(const void* q, const void* k, const void* v, const int32_t* cu_seqlens, const int32_t* prefix, void* out,
               float* lse, const AttentionShape& shape, DType dtype, int threads) {
    const auto run = dtype == DType::bfloat16 ? &attention_of<bf16> : &attention_of<float>;
    return run(q, k, v, cu_seqlens, prefix, out, lse, shape, threads);
}

bool attention_backward(const AttentionGrads& grads, const void* q, const void* k, const void* v,
                        const int32_t* cu_seqlens, const int32_t* prefix, const AttentionShape& shape, DType dtype,
                        int threads) {
    const auto run = dtype == DType::bfloat16 ? &attention_backward_of<bf16> : &attention_backward_of<float>;
    return run(grads, q, k, v, cu_seqlens, prefix, shape, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
