// Log-probability of given tokens and entropy of the next-token distribution from hidden states: the LM head's product
// and its softmax, forward and backward, without the logits.
//
// Logits are made a tile at a time and transposed: the vocabulary runs down a tile, 64 rows of hidden lie across it,
// one a lane. So softmax needs no sums across lanes, weight is read where it lies, and no row can touch another's bits.
//
// Forward: each tile leaves (maximum, sum, weighted sum) a row; those of the whole vocabulary are joined in order
// (online softmax, arXiv:1805.02867). Backward, a slab of the vocabulary at a time: tiles of logits are made again,
// become dz, the gradient of the logits, and are kept for the slab (in the weights' type, once for each product that
// reads them); then grad weight = dz^T hidden and grad hidden += dz weight. Four products in all, one forward and three
// backward.
//
// Threads share tiles, never a sum: every element of the logits and of the gradients is added up by one thread at a
// time in an order that the shapes fix, chains of depth_block units in registers and chain after chain in memory. So
// the bits depend neither on the number of threads nor, a row's, on the other rows.
#include <omp.h>

#include <cfloat>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/sizes.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

// The first n lanes of x.
template <typename T>
PYRLHF_INLINE void put(T* p, vf x, int n = W) {
    if (n == W)
        store(p, x, Whole{});
    else
        store(p, x, Part{n});
}
// A whole vector that nobody reads soon: a plain store would read the line that it overwrites.
template <typename T>
PYRLHF_INLINE void put_past_caches(T* p, vf x) {
    if (reinterpret_cast<uintptr_t>(p) % (W * sizeof(T)) == 0)
        stream(p, x);
    else
        put(p, x);
}

constexpr int64_t lanes = 64;         // what lies across a panel: rows of hidden, or columns of a gradient
constexpr int64_t tile_tokens = 128;  // vocabulary in one tile of logits
constexpr int64_t depth_block = 256;  // units summed in one chain
constexpr int64_t budget = int64_t{32} << 20;

// Hands out scratch memory piece by piece, on cache lines. Starting at 0 it only counts.
struct Carver {
    uintptr_t at;
    template <typename X>
    X* take(int64_t n) {
        const uintptr_t here = at;
        at += static_cast<uintptr_t>(round_up(n * static_cast<int64_t>(sizeof(X)), 64));
        return reinterpret_cast<X*>(here);
    }
};

// --- panels: matrices as tile.h's B wants them, [units along the sum][lanes], the last ones filled up with zeros ---

PYRLHF_INLINE float unit_of(const float* x, const float*) { return *x; }
// b may be null: the sum ends within the pair.
PYRLHF_INLINE pair unit_of(const bf16* a, const bf16* b) {
    return {static_cast<uint32_t>(a->bits) | (b ? static_cast<uint32_t>(b->bits) << 16 : 0)};
}

// Which row of hidden is the i-th in use.
PYRLHF_INLINE int64_t row_at(const int64_t* rows, int64_t i) { return rows ? rows[i] : i; }

// hidden^T: `count` <= lanes rows, from the `first` in use, side by side; the sum runs along dim.
template <typename T>
void pack_across(const LinearLogprobInputs& in, const int64_t* rows, int64_t first, int64_t count, Unit<T>* panel) {
    constexpr int64_t run = 16;
    const int64_t depth = units<T>(in.dim);
    for (int64_t k0 = 0; k0 < depth; k0 += run) {
        const int64_t end = least(k0 + run, depth);
        for (int64_t j = 0; j < lanes; ++j) {
            const T* row = static_cast<const T*>(in.hidden) + (j < count ? row_at(rows, first + j) * in.dim : 0);
            for (int64_t k = k0; k < end; ++k) {
                const T* x = row + k * per_unit<T>;
                const bool whole = (k + 1) * per_unit<T> <= in.dim;
                panel[k * lanes + j] = j < count ? unit_of(x, whole ? x + per_unit<T> - 1 : nullptr) : Unit<T>{};
            }
        }
    }
}

// Unit u of the rows of a matrix [rows, dim], for the panels of 64 columns each: the sum runs along the rows.
template <typename T>
void pack_down(const T* even, const T* odd, int64_t dim, int64_t u, int64_t depth, Unit<T>* panels) {
    for (int64_t d0 = 0; d0 < dim; d0 += lanes) {
        Unit<T>* out = panels + (d0 / lanes * depth + u) * lanes;
        const int64_t count = least(lanes, dim - d0);
        if (odd)
            for (int64_t j = 0; j < count; ++j) out[j] = unit_of(even + d0 + j, odd + d0 + j);
        else
            for (int64_t j = 0; j < count; ++j) out[j] = unit_of(even + d0 + j, nullptr);
        for (int64_t j = count; j < lanes; ++j) out[j] = Unit<T>{};
    }
}

template <typename U>
void product(float* c, const U* a, const U* b, int64_t rows, int64_t vectors, int64_t depth, const Strides& at) {
    multiply<Into::replace>(c, a, b, rows, vectors, least(depth, depth_block), at);
    for (int64_t k = depth_block; k < depth; k += depth_block)
        multiply<Into::add>(c, a + k * at.a_k, b + k * at.b_row, rows, vectors, least(depth - k, depth_block), at);
}

// --- a tile of logits, [tokens][lanes] ---

// Rows of an odd number of bfloat16 do not lie on pairs: they are copied, block by block.
PYRLHF_INLINE void odd_product(float*, const float*, const float*, int64_t, int64_t, int64_t) {}
void odd_product(float* tile, const bf16* weight, const pair* panel, int64_t tokens, int64_t vectors, int64_t dim) {
    alignas(64) pair block[tile_tokens * depth_block];
    const int64_t depth = units<bf16>(dim);
    for (int64_t k0 = 0; k0 < depth; k0 += depth_block) {
        const int64_t count = least(depth_block, depth - k0);
        for (int64_t c = 0; c < tokens; ++c)
            for (int64_t k = 0; k < count; ++k) {
                const bf16* x = weight + c * dim + 2 * (k0 + k);
                block[c * depth_block + k] = unit_of(x, 2 * (k0 + k) + 1 < dim ? x + 1 : nullptr);
            }
        const Strides at = {depth_block, 1, lanes, lanes};
        const pair* b = panel + k0 * lanes;
        if (k0 == 0)
            multiply<Into::replace>(tile, block, b, tokens, vectors, count, at);
        else
            multiply<Into::add>(tile, block, b, tokens, vectors, count, at);
    }
}

template <typename T>
void make_logits(const LinearLogprobInputs& in, int64_t first, int64_t tokens, const Unit<T>* panel, int64_t vectors,
                 float* tile) {
    const T* weight = static_cast<const T*>(in.weight) + first * in.dim;
    const int64_t depth = in.dim / per_unit<T>;
    if (depth * per_unit<T> == in.dim)
        product(tile, reinterpret_cast<const Unit<T>*>(weight), panel, tokens, vectors, depth,
                {depth, 1, lanes, lanes});
    else
        odd_product(tile, weight, panel, tokens, vectors, in.dim);
    if (!in.bias && in.temperature == 1.0f) return;
    for (int64_t c = 0; c < tokens; ++c) {
        const float bias = in.bias ? to_float(static_cast<const T*>(in.bias)[first + c]) : 0.0f;
        for (int64_t v = 0; v < vectors; ++v) {
            float* z = tile + c * lanes + v * W;
            store(z, (load(z) + bias) / in.temperature);
        }
    }
}

// --- forward ---

// Of some logits z of W rows: their maximum m, the sum of e^(z - m) and of e^(z - m) (z - m).
struct Stats {
    vf highest, total, weighted;
};

// z - m where e^(z - m) counts, finite where it is 0: 0 times infinity must not appear. NaN stays.
PYRLHF_INLINE vf below(vf z, vf m) {
    const vf x = z - m;
    return x < -104.0f ? broadcast(-104.0f) : x;
}

PYRLHF_INLINE Stats stats_of(const float* z, int64_t tokens) {
    Stats out = {broadcast(-FLT_MAX), {}, {}};
    for (int64_t c = 0; c < tokens; ++c) {
        const vf x = load(z + c * lanes);
        out.highest = x > out.highest ? x : out.highest;
    }
    for (int64_t c = 0; c < tokens; ++c) {
        const vf x = below(load(z + c * lanes), out.highest), e = exp_of_negative(x);
        out.total += e;
        out.weighted += e * x;
    }
    return out;
}

PYRLHF_INLINE Stats join(const Stats& a, const Stats& b) {
    const vf highest = a.highest > b.highest ? a.highest : b.highest;
    const vf da = below(a.highest, highest), db = below(b.highest, highest);
    const vf ea = exp_of_negative(da), eb = exp_of_negative(db);
    return {highest, ea * a.total + eb * b.total, ea * (a.weighted + da * a.total) + eb * (b.weighted + db * b.total)};
}

template <typename T>
struct Forward {
    int64_t chunk;        // rows at a time, a multiple of lanes
    int64_t tile_groups;  // the vocabulary is cut in this many runs of
    int64_t group;        // this many tiles
    Unit<T>* panels;      // [chunk / lanes][units of dim][lanes]: hidden^T
    float* stats;         // [tile_groups][chunk / lanes][3][lanes]
    int64_t bytes;

    Forward(int64_t rows, int64_t dim, int64_t vocab, void* scratch) {
        const int64_t tiles = divide_up(vocab, tile_tokens);
        group = divide_up(tiles, 256);
        tile_groups = divide_up(tiles, group);
        const int64_t row_bytes = 4 * (units<T>(dim) + 3 * tile_groups);
        chunk = lanes * most(1, least(divide_up(rows, lanes), budget / row_bytes / lanes));
        Carver carve = {reinterpret_cast<uintptr_t>(scratch)};
        panels = carve.take<Unit<T>>(chunk * units<T>(dim));
        stats = carve.take<float>(tile_groups * chunk * 3);
        bytes = static_cast<int64_t>(carve.at - reinterpret_cast<uintptr_t>(scratch));
    }
    float* stats_at(int64_t g, int64_t panel) const { return stats + (g * (chunk / lanes) + panel) * 3 * lanes; }
};

// The statistics of one group of tiles for the rows of one panel; the targets' logits go where their log-probs will be.
template <typename T>
void measure(const LinearLogprobInputs& in, const Forward<T>& at, int64_t g, int64_t panel, int64_t first_row,
             int64_t rows, float* logprob) {
    alignas(64) float tile[tile_tokens * lanes];
    const int64_t vectors = divide_up(rows, W), end = least((g + 1) * at.group * tile_tokens, in.vocab);
    float* out = at.stats_at(g, panel);
    for (int64_t first = g * at.group * tile_tokens; first < end; first += tile_tokens) {
        const int64_t tokens = least(tile_tokens, end - first);
        make_logits<T>(in, first, tokens, at.panels + panel * units<T>(in.dim) * lanes, vectors, tile);
        for (int64_t v = 0; v < vectors; ++v) {
            float* to = out + v * W;
            Stats stats = stats_of(tile + v * W, tokens);
            if (first != g * at.group * tile_tokens)
                stats = join({load(to), load(to + lanes), load(to + 2 * lanes)}, stats);
            store(to, stats.highest);
            store(to + lanes, stats.total);
            store(to + 2 * lanes, stats.weighted);
        }
        for (int64_t j = 0; j < rows; ++j) {
            const int64_t c = in.targets[first_row + j] - first;
            if (0 <= c && c < tokens) logprob[first_row + j] = tile[c * lanes + j];
        }
    }
}

template <typename T>
void conclude(const Forward<T>& at, int64_t panel, int64_t rows, float* logprob, float* entropy, float* lse) {
    for (int64_t v = 0; v < divide_up(rows, W); ++v) {
        Stats all = {broadcast(-FLT_MAX), {}, {}};
        for (int64_t g = 0; g < at.tile_groups; ++g) {
            const float* from = at.stats_at(g, panel) + v * W;
            all = join(all, {load(from), load(from + lanes), load(from + 2 * lanes)});
        }
        for (int64_t j = v * W, lane = 0; j < least(rows, (v + 1) * W); ++j, ++lane) {
            const float log_total = std::log(all.total[lane]);
            logprob[j] = (logprob[j] - all.highest[lane]) - log_total;
            entropy[j] = log_total - all.weighted[lane] / all.total[lane];
            lse[j] = all.highest[lane] + log_total;
        }
    }
}

template <typename T>
void forward(const LinearLogprobInputs& in, float* logprob, float* entropy, float* lse, void* scratch, int threads) {
    const Forward<T> at(in.rows, in.dim, in.vocab, scratch);
    for (int64_t first = 0; first < in.rows; first += at.chunk) {
        const int64_t rows = least(at.chunk, in.rows - first), panels = divide_up(rows, lanes);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t p = 0; p < panels; ++p)
            pack_across<T>(in, nullptr, first + p * lanes, least(lanes, rows - p * lanes),
                           at.panels + p * units<T>(in.dim) * lanes);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < at.tile_groups * panels; ++i) {
            const int64_t p = i % panels;
            measure<T>(in, at, i / panels, p, first + p * lanes, least(lanes, rows - p * lanes), logprob);
        }
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t row = first + p * lanes;
            conclude<T>(at, p, least(lanes, rows - p * lanes), logprob + row, entropy + row, lse + row);
        }
    }
}

// --- backward ---

template <typename T>
struct Backward {
    int64_t slab;           // vocabulary at a time, a multiple of tile_tokens
    int64_t chunk, chunks;  // rows at a time, a multiple of lanes
    int64_t dz_stride;      // elements between two tokens of dz_down
    Unit<T>* across;        // [chunk / lanes][units of dim][lanes]: hidden^T, for the logits
    Unit<T>* hidden_down;   // [dim / lanes][units of chunk][lanes]: hidden, for the weight's gradient
    Unit<T>* weight_down;   // [dim / lanes][units of slab][lanes]: weight, for hidden's gradient
    T* dz_down;             // [slab][dz_stride]: units along the rows
    Unit<T>* dz_across;     // [chunk / lanes][units of slab][lanes]: units along the vocabulary
    float* given;           // [chunk / lanes][4][lanes]: lse, entropy and both upstream gradients over the temperature
    float* bias_sums;       // [chunk / lanes][slab][W]
    double* bias_total;     // [slab]
    float* weight_sums;     // [slab][dim], where there is more than one chunk
    int64_t bytes;

    Backward(int64_t rows, int64_t dim, int64_t vocab, void* scratch) {
        const int64_t padded = divide_up(dim, lanes) * lanes;
        slab = most(1, least(8, (int64_t{8} << 20) / (4 * padded * tile_tokens))) * tile_tokens;
        slab = least(slab, divide_up(vocab, tile_tokens) * tile_tokens);
        const int64_t row_bytes =
            4 * units<T>(dim) + static_cast<int64_t>(sizeof(T)) * (padded + 2 * slab) + 16 + 4 * W * slab / lanes;
        chunks = most(1, divide_up(rows, most(1, budget / row_bytes / lanes) * lanes));
        chunk = most(1, divide_up(divide_up(rows, chunks), lanes)) * lanes;
        dz_stride = chunk + 2 * lanes;  // not a power of 2: the tokens' rows would share few cache sets
        Carver carve = {reinterpret_cast<uintptr_t>(scratch)};
        across = carve.take<Unit<T>>(chunk * units<T>(dim));
        hidden_down = carve.take<Unit<T>>(padded * units<T>(chunk));
        weight_down = carve.take<Unit<T>>(padded * units<T>(slab));
        dz_down = carve.take<T>(slab * dz_stride);
        dz_across = carve.take<Unit<T>>(chunk * units<T>(slab));
        given = carve.take<float>(4 * chunk);
        bias_sums = carve.take<float>(chunk / lanes * slab * W);
        bias_total = carve.take<double>(slab);
        weight_sums = carve.take<float>(chunks > 1 ? slab * dim : 0);
        bytes = static_cast<int64_t>(carve.at - reinterpret_cast<uintptr_t>(scratch));
    }
};

// The part of the work that is done at a time.
struct Piece {
    int64_t first_row, rows;      // of the rows in use
    int64_t first_token, tokens;  // of the vocabulary
    bool first_chunk, last_chunk, first_slab, last_slab;
    int64_t panels() const { return divide_up(rows, lanes); }
    int64_t rows_in(int64_t panel) const { return least(lanes, rows - panel * lanes); }
};

template <typename T>
void pack_rows(const LinearLogprobInputs& in, const LinearLogprobGradients& grads, const Backward<T>& at,
               const Piece& piece, int64_t panel) {
    const int64_t count = piece.rows_in(panel), first = piece.first_row + panel * lanes;
    pack_across<T>(in, grads.rows, first, count, at.across + panel * units<T>(in.dim) * lanes);
    for (int64_t j = 0; j < count; j += per_unit<T>) {
        const T* hidden = static_cast<const T*>(in.hidden);
        const T* even = hidden + grads.rows[first + j] * in.dim;
        const T* odd =
            j + per_unit<T> - 1 < count ? hidden + grads.rows[first + j + per_unit<T> - 1] * in.dim : nullptr;
        pack_down<T>(even, odd, in.dim, (panel * lanes + j) / per_unit<T>, units<T>(at.chunk), at.hidden_down);
    }
    float* given = at.given + panel * 4 * lanes;
    for (int64_t j = 0; j < lanes; ++j) {
        const int64_t row = j < count ? grads.rows[first + j] : 0;
        given[j] = j < count ? grads.lse[row] : FLT_MAX;  // of no row: probability 0
        given[lanes + j] = j < count ? grads.entropy[row] : 0.0f;
        given[2 * lanes + j] = j < count ? grads.by_logprob[row] / in.temperature : 0.0f;
        given[3 * lanes + j] = j < count ? grads.by_entropy[row] / in.temperature : 0.0f;
    }
}

template <typename T>
void pack_tokens(const LinearLogprobInputs& in, const Backward<T>& at, const Piece& piece, int64_t tile) {
    const T* weight = static_cast<const T*>(in.weight) + piece.first_token * in.dim;
    for (int64_t c = tile * tile_tokens; c < least((tile + 1) * tile_tokens, piece.tokens); c += per_unit<T>) {
        const T* odd = c + per_unit<T> - 1 < piece.tokens ? weight + (c + per_unit<T> - 1) * in.dim : nullptr;
        pack_down<T>(weight + c * in.dim, odd, in.dim, c / per_unit<T>, units<T>(at.slab), at.weight_down);
    }
}

// z becomes (onehot - p) * by_logprob - p * (log p + entropy) * by_entropy.
template <typename T>
void differentiate(const LinearLogprobInputs& in, const LinearLogprobGradients& grads, const Backward<T>& at,
                   const Piece& piece, int64_t panel, int64_t first, int64_t tokens, float* tile) {
    const float* given = at.given + panel * 4 * lanes;
    const int64_t rows = piece.rows_in(panel);
    for (int64_t v = 0; v < divide_up(rows, W); ++v) {
        const vf lse = load(given + v * W), entropy = load(given + lanes + v * W);
        const vf by_logprob = load(given + 2 * lanes + v * W), by_entropy = load(given + 3 * lanes + v * W);
        for (int64_t c = 0; c < tokens; ++c) {
            float* z = tile + c * lanes + v * W;
            const vf log_p = below(load(z), lse);
            store(z, -exp_of_negative(log_p) * (by_logprob + by_entropy * (log_p + entropy)));
        }
    }
    for (int64_t j = 0; j < rows; ++j) {
        const int64_t c = in.targets[grads.rows[piece.first_row + panel * lanes + j]] - first;
        if (0 <= c && c < tokens) tile[c * lanes + j] += given[2 * lanes + j];
    }
}

PYRLHF_INLINE void keep_across(float* out, const float* even, const float*) { store(out, load(even)); }
PYRLHF_INLINE void keep_across(pair* out, const float* even, const float* odd) {
    store_units(out, to_pairs(load(even), odd ? load(odd) : vf{}));
}

// One tile of dz: made, then kept in both orders, and summed over the rows for the bias.
template <typename T>
void make_dz(const LinearLogprobInputs& in, const LinearLogprobGradients& grads, const Backward<T>& at,
             const Piece& piece, int64_t panel, int64_t offset) {
    alignas(64) float tile[tile_tokens * lanes];
    const int64_t vectors = divide_up(piece.rows_in(panel), W), tokens = least(tile_tokens, piece.tokens - offset);
    const int64_t first = piece.first_token + offset;
    make_logits<T>(in, first, tokens, at.across + panel * units<T>(in.dim) * lanes, vectors, tile);
    differentiate<T>(in, grads, at, piece, panel, first, tokens, tile);
    if (grads.weight)
        for (int64_t c = 0; c < tokens; ++c)
            for (int64_t v = 0; v < vectors; ++v)
                put(at.dz_down + (offset + c) * at.dz_stride + panel * lanes + v * W, load(tile + c * lanes + v * W));
    if (grads.hidden)
        for (int64_t c = 0; c < tokens; c += per_unit<T>)
            for (int64_t v = 0; v < vectors; ++v) {
                const float* even = tile + c * lanes + v * W;
                const int64_t unit = panel * units<T>(at.slab) + (offset + c) / per_unit<T>;
                keep_across(at.dz_across + unit * lanes + v * W, even, c + 1 < tokens ? even + lanes : nullptr);
            }
    if (grads.bias)
        for (int64_t c = 0; c < tokens; ++c) {
            vf sums = {};
            for (int64_t v = 0; v < vectors; ++v) sums += load(tile + c * lanes + v * W);
            store(at.bias_sums + (panel * at.slab + offset + c) * W, sums);
        }
}

// n numbers of a product join the sums so far (unless they are the first), or (the last) become the result. For float32
// sums and result are one array. A result of another thread's or of nobody's caches is better written past them.
template <bool past_caches, typename T>
void settle(const float* product, int64_t n, float* sums, T* result, bool first, bool last) {
    for (int64_t j = 0; j < n; j += W) {
        const int count = static_cast<int>(least(W, n - j));
        vf x = load(product + j);
        if (!first) x += count == W ? load(sums + j) : load_first(sums + j, count, 0.0f);
        if (!last)
            put(sums + j, x, count);
        else if (past_caches && count == W)
            put_past_caches(result + j, x);
        else
            put(result + j, x, count);
    }
}

// Columns d0 to d0 + 63 of the weight's gradient, for one tile of the vocabulary.
template <typename T>
void weight_gradient(const LinearLogprobInputs& in, const LinearLogprobGradients& grads, const Backward<T>& at,
                     const Piece& piece, int64_t offset, int64_t d0) {
    alignas(64) float tile[tile_tokens * lanes];
    const int64_t tokens = least(tile_tokens, piece.tokens - offset), columns = least(lanes, in.dim - d0);
    product(tile, reinterpret_cast<const Unit<T>*>(at.dz_down + offset * at.dz_stride),
            at.hidden_down + d0 * units<T>(at.chunk), tokens, divide_up(columns, W), units<T>(piece.rows),
            {at.dz_stride / per_unit<T>, 1, lanes, lanes});
    for (int64_t c = 0; c < tokens; ++c)
        settle<true>(tile + c * lanes, columns, at.weight_sums + (offset + c) * in.dim + d0,
                     static_cast<T*>(grads.weight) + (piece.first_token + offset + c) * in.dim + d0, piece.first_chunk,
                     piece.last_chunk);
}

// Columns d0 to d0 + 63 of hidden's gradient, for the rows of one panel: what this slab of the vocabulary adds.
template <typename T>
void hidden_gradient(const LinearLogprobInputs& in, const LinearLogprobGradients& grads, const Backward<T>& at,
                     const Piece& piece, int64_t panel, int64_t d0) {
    alignas(64) float tile[lanes * lanes];
    const int64_t rows = piece.rows_in(panel), columns = least(lanes, in.dim - d0);
    product(tile, at.dz_across + panel * units<T>(at.slab) * lanes, at.weight_down + d0 * units<T>(at.slab), rows,
            divide_up(columns, W), units<T>(piece.tokens), {1, lanes, lanes, lanes});
    for (int64_t j = 0; j < rows; ++j) {
        const int64_t to = grads.rows[piece.first_row + panel * lanes + j] * in.dim + d0;
        settle<false>(tile + j * lanes, columns, grads.hidden_sums + to, static_cast<T*>(grads.hidden) + to,
                      piece.first_slab, piece.last_slab);
    }
}

template <typename T>
void bias_gradient(const LinearLogprobGradients& grads, const Backward<T>& at, const Piece& piece, int64_t offset) {
    for (int64_t c = offset; c < least(offset + tile_tokens, piece.tokens); ++c) {
        double total = piece.first_chunk ? 0.0 : at.bias_total[c];
        for (int64_t p = 0; p < piece.panels(); ++p) total += sum(load(at.bias_sums + (p * at.slab + c) * W));
        at.bias_total[c] = total;
        if (piece.last_chunk)
            put(static_cast<T*>(grads.bias) + piece.first_token + c, broadcast(static_cast<float>(total)), 1);
    }
}

// f(i, j) for a thread's part of a grid. Each thread has the same number of rows to itself, so that what it wrote of a
// row in one step is what it reads and writes in the next ones, and stays in its caches; what is left over is cut
// finer.
template <typename F>
PYRLHF_INLINE void share(int64_t rows, int64_t columns, F f) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), own = rows / threads;
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = own * thread; i < own * (thread + 1); ++i) f(i, j);
    const int64_t left = (rows - own * threads) * columns;
    for (int64_t k = left * thread / threads; k < left * (thread + 1) / threads; ++k)
        f(own * threads + k / columns, k % columns);
}

// What every thread of a team does for one piece.
template <typename T>
void one_piece(const LinearLogprobInputs& in, const LinearLogprobGradients& grads, const Backward<T>& at,
               const Piece& piece) {
    const int64_t panels = piece.panels(), tiles = divide_up(piece.tokens, tile_tokens),
                  across = divide_up(in.dim, lanes);
    if (at.chunks > 1 || piece.first_slab) {
        share(panels, 1, [&](int64_t p, int64_t) { pack_rows<T>(in, grads, at, piece, p); });
#pragma omp barrier
    }
    share(panels, tiles, [&](int64_t p, int64_t i) { make_dz<T>(in, grads, at, piece, p, i * tile_tokens); });
    if (grads.hidden && piece.first_chunk)
        share(tiles, 1, [&](int64_t i, int64_t) { pack_tokens<T>(in, at, piece, i); });
#pragma omp barrier
    if (grads.weight)
        share(across, tiles,
              [&](int64_t d, int64_t i) { weight_gradient<T>(in, grads, at, piece, i * tile_tokens, d * lanes); });
    end_of_streams();
    if (grads.hidden)
        share(panels, across, [&](int64_t p, int64_t d) { hidden_gradient<T>(in, grads, at, piece, p, d * lanes); });
    if (grads.bias) share(tiles, 1, [&](int64_t i, int64_t) { bias_gradient<T>(grads, at, piece, i * tile_tokens); });
#pragma omp barrier
}

template <typename T>
void backward(const LinearLogprobInputs& in, LinearLogprobGradients grads, void* scratch, int threads) {
    const Backward<T> at(grads.row_count, in.dim, in.vocab, scratch);
    if (sizeof(T) == sizeof(float)) grads.hidden_sums = static_cast<float*>(grads.hidden);
#pragma omp parallel num_threads(threads)
    for (int64_t token = 0; token < in.vocab; token += at.slab)
        for (int64_t k = 0; k < at.chunks; ++k) {
            const int64_t tokens = least(at.slab, in.vocab - token), rows = grads.row_count - k * at.chunk;
            one_piece<T>(in, grads, at,
                         {k * at.chunk, least(at.chunk, rows), token, tokens, k == 0, k + 1 == at.chunks, token == 0,
                          token + tokens == in.vocab});
        }
}

// One thread where the products are too small to share.
PYRLHF_INLINE int threads_for(int64_t rows, const LinearLogprobInputs& in, int threads) {
    return rows * in.dim * in.vocab < (int64_t{1} << 20) ? 1 : threads;
}

}  // namespace

int64_t linear_logprob_scratch(DType dtype, int64_t rows, int64_t dim, int64_t vocab, bool backwards) {
    const bool wide = dtype == DType::float32;
    if (backwards)
        return wide ? Backward<float>(rows, dim, vocab, nullptr).bytes
                    : Backward<bf16>(rows, dim, vocab, nullptr).bytes;
    return wide ? Forward<float>(rows, dim, vocab, nullptr).bytes : Forward<bf16>(rows, dim, vocab, nullptr).bytes;
}

void linear_logprob(const LinearLogprobInputs& in, float* logprob, float* entropy, float* lse, void* scratch,
                    int threads) {
    const auto run = in.dtype == DType::float32 ? forward<float> : forward<bf16>;
    run(in, logprob, entropy, lse, scratch, threads_for(in.rows, in, threads));
}

void linear_logprob_backward(const LinearLogprobInputs& in, const LinearLogprobGradients& grads, void* scratch,
                             int threads) {
    const auto run = in.dtype == DType::float32 ? backward<float> : backward<bf16>;
    run(in, grads, scratch, threads_for(grads.row_count, in, threads));
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
