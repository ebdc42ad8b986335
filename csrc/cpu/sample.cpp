// Sampling from rows of logits: temperature, top-k, top-p, min-p, and the log-prob under the distribution really drawn
// from.
//
// The draw is exact integer arithmetic, so every instruction set, thread count and the plain-PyTorch reference pick the
// same token. With z = (logit - max) / temperature, a token weighs w = floor(e^z 2^40); e^z is a fixed sequence of
// float32 operations (core/sample.h; this file is compiled without fused multiply-add). Weights
// sum exactly in 64 bits, the Philox draw u of (seed, id, position) points at floor(u * sum), and the first token whose
// running sum passes that point is the sample.
//
// Order the tokens by logit, equal ones by id. Each filter keeps a prefix of that order, so all filters together are
// one cut: the last kept (logit, id). A histogram of z finds the bin in which the cut lies; only that bin is sorted.
#include "core/sample.h"

#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

constexpr int64_t chunk = 1024;  // tokens a partial sum; also bounds the int32 lanes in `Weights`
constexpr int bins = 2048;       // of z in (-32, 0], 64 a unit; what lies below weighs nothing and shares the last
constexpr float infinity = __builtin_inff();

struct Cut {
    float logit = -infinity;
    int32_t id = INT32_MAX;
    float least_z = -infinity;  // min-p
    bool keeps_all() const { return logit == -infinity && id == INT32_MAX && least_z == -infinity; }
};

template <typename T>
struct Row {
    const T *logits, *next;  // next: of the row after it, which but for the last of a share is the same thread's
    int64_t vocab;
    float top;      // the largest logit
    float inverse;  // 1 / temperature
};

struct Candidate {
    float logit;
    int32_t id;
};

struct Scratch {
    uint32_t* counts;       // [bins]
    int64_t* masses;        // [bins]
    int64_t* chunks;        // [vocab / chunk + 1]
    Candidate* candidates;  // [2 * vocab]: the bin being sorted and the sort's other buffer
};

template <typename T>
PYRLHF_INLINE vf load_some(const T* p, int64_t left) {
    return left >= W ? load(p) : load_first(p, static_cast<int>(left), -infinity);
}

template <typename T>
PYRLHF_INLINE vf scaled(const Row<T>& row, vf logits) {
    return (logits - row.top) * row.inverse;
}

// w = high * 2^20 + low = floor(e^z 2^40), for z <= 0.
struct Weights {
    vi high, low;
};

// N vectors side by side. An exponential is a chain of some thirty operations: while one waits for the one before it,
// those of other vectors run.
template <int N>
struct Reals {
    vf x[N];
};
template <int N>
struct Integers {
    vi x[N];
};
template <int N>
PYRLHF_INLINE Reals<N> operator+(Reals<N> a, const Reals<N>& b) {
    for (int i = 0; i < N; ++i) a.x[i] += b.x[i];
    return a;
}
template <int N>
PYRLHF_INLINE Reals<N> operator-(Reals<N> a, const Reals<N>& b) {
    for (int i = 0; i < N; ++i) a.x[i] -= b.x[i];
    return a;
}
template <int N>
PYRLHF_INLINE Reals<N> operator*(Reals<N> a, const Reals<N>& b) {
    for (int i = 0; i < N; ++i) a.x[i] *= b.x[i];
    return a;
}
template <int N>
PYRLHF_INLINE Reals<N> operator+(Reals<N> a, float b) {
    for (int i = 0; i < N; ++i) a.x[i] += b;
    return a;
}
template <int N>
PYRLHF_INLINE Reals<N> operator*(Reals<N> a, float b) {
    for (int i = 0; i < N; ++i) a.x[i] *= b;
    return a;
}
template <int N>
PYRLHF_INLINE Integers<N> operator+(Integers<N> a, int b) {
    for (int i = 0; i < N; ++i) a.x[i] += b;
    return a;
}

// For core/sample.h.
template <int N>
struct Lanes {
    using Real = Reals<N>;
    using Integer = Integers<N>;
    PYRLHF_INLINE Real at_least(Real a, float low) {
        for (int i = 0; i < N; ++i) a.x[i] = a.x[i] < low ? broadcast(low) : a.x[i];
        return a;
    }
    PYRLHF_INLINE void round(const Real& a, Real& n, Integer& k) {
        for (int i = 0; i < N; ++i) {
            n.x[i] = round_small(a.x[i]);
            k.x[i] = __builtin_convertvector(n.x[i], vi);
        }
    }
    PYRLHF_INLINE Real power(const Integer& k) {
        Real out;
        for (int i = 0; i < N; ++i) out.x[i] = (vf)((k.x[i] + 127) << 23);
        return out;
    }
};

// Of N vectors, added up.
template <int N>
PYRLHF_INLINE Weights weigh(const Reals<N>& z) {
    const Reals<N> scaled = exp_2_20<Lanes<N>>(z);
    Weights out = {};
    for (int i = 0; i < N; ++i) {
        const vi high = __builtin_convertvector(scaled.x[i], vi);
        const vf rest = (scaled.x[i] - __builtin_convertvector(high, vf)) * 1048576.0f;
        out.high += high;
        out.low += __builtin_convertvector(rest, vi);
    }
    return out;
}
PYRLHF_INLINE Weights weigh(vf z) { return weigh(Reals<1>{{z}}); }

PYRLHF_INLINE int64_t total(vi high, vi low) { return (sum(high) << 20) + sum(low); }
PYRLHF_INLINE int64_t at_lane(const Weights& w, int j) { return (int64_t{w.high[j]} << 20) + w.low[j]; }

PYRLHF_INLINE vi lanes() {
    vi out = {};
    for (int j = 0; j < W; ++j) out[j] = j;
    return out;
}

template <typename T>
PYRLHF_INLINE Weights kept_weights(const Row<T>& row, const Cut& cut, int64_t at) {
    const vf logits = load_some(row.logits + at, row.vocab - at);
    const vf z = scaled(row, logits);
    const vi ids = lanes() + static_cast<int32_t>(at);
    const vi kept = ((logits > cut.logit) | ((logits == cut.logit) & (ids <= cut.id))) & (z >= cut.least_z);
    const Weights w = weigh(z);
    return {w.high & kept, w.low & kept};
}

PYRLHF_INLINE vi bins_of(vf z) {
    return __builtin_convertvector(z > -32.0f ? z * -64.0f : broadcast(static_cast<float>(bins - 1)), vi);
}

// The first bin in which the running total reaches `wanted`; `before` becomes the total of the bins above it.
template <typename Number>
PYRLHF_INLINE int bin_reaching(const Number* totals, int64_t wanted, int64_t& before) {
    before = 0;
    int bin = 0;
    while (bin < bins - 1 && before + static_cast<int64_t>(totals[bin]) < wanted) before += totals[bin++];
    return bin;
}

// Largest logit first, equal logits in the order they came (by id): a radix sort on the logit's bits is stable.
PYRLHF_INLINE void sort_candidates(Candidate* from, Candidate* other, int64_t n) {
    for (int shift = 0; shift < 32; shift += 8) {
        int64_t starts[257] = {};
        for (int64_t i = 0; i < n; ++i) ++starts[((descending_key(from[i].logit) >> shift) & 255) + 1];
        for (int digit = 0; digit < 256; ++digit) starts[digit + 1] += starts[digit];
        for (int64_t i = 0; i < n; ++i) other[starts[(descending_key(from[i].logit) >> shift) & 255]++] = from[i];
        Candidate* const swapped = from;
        from = other;
        other = swapped;
    }
}

// The tokens of one bin, sorted.
template <typename T>
PYRLHF_INLINE int64_t sorted_bin(const Row<T>& row, int bin, Candidate* out) {
    int64_t n = 0;
    for (int64_t at = 0; at < row.vocab; at += W) {
        const vf logits = load_some(row.logits + at, row.vocab - at);
        const vi inside = (bins_of(scaled(row, logits)) == bin) & (lanes() < static_cast<int32_t>(row.vocab - at));
        if (!any(inside)) continue;
        for (int j = 0; j < W; ++j)
            if (inside[j]) out[n++] = {logits[j], static_cast<int32_t>(at + j)};
    }
    sort_candidates(out, out + row.vocab, n);
    return n;
}

template <typename T>
PYRLHF_INLINE int64_t weight_of(const Row<T>& row, float logit) {
    return at_lane(weigh(scaled(row, broadcast(logit))), 0);
}

template <typename T>
PYRLHF_INLINE void count_bins(const Row<T>& row, uint32_t* counts) {
    memset(counts, 0, bins * sizeof(uint32_t));
    int32_t bin[W];
    for (int64_t at = 0; at < row.vocab; at += W) {
        const vi found = bins_of(scaled(row, load_some(row.logits + at, row.vocab - at)));
        memcpy(bin, &found, sizeof(bin));
        const int n = row.vocab - at < W ? static_cast<int>(row.vocab - at) : W;
        for (int j = 0; j < n; ++j) ++counts[bin[j]];
    }
}

// The weight of each bin and of all, without the tokens after the cut.
template <typename T>
PYRLHF_INLINE int64_t weigh_bins(const Row<T>& row, const Cut& cut, int64_t* masses) {
    memset(masses, 0, bins * sizeof(int64_t));
    int64_t mass = 0;
    int32_t bin[W], high[W], low[W];
    for (int64_t at = 0; at < row.vocab; at += W) {
        const vi found = bins_of(scaled(row, load_some(row.logits + at, row.vocab - at)));
        const Weights w = kept_weights(row, cut, at);
        if (!any(w.high | w.low)) continue;
        memcpy(bin, &found, sizeof(bin));
        memcpy(high, &w.high, sizeof(high));
        memcpy(low, &w.low, sizeof(low));
        for (int j = 0; j < W; ++j) {
            const int64_t weight = (int64_t{high[j]} << 20) + low[j];
            masses[bin[j]] += weight;
            mass += weight;
        }
    }
    return mass;
}

template <typename T>
PYRLHF_INLINE void cut_top_k(const Row<T>& row, int64_t k, Scratch& scratch, Cut& cut) {
    int64_t before;
    const int bin = bin_reaching(scratch.counts, k, before);
    sorted_bin(row, bin, scratch.candidates);
    const Candidate& last = scratch.candidates[k - before - 1];
    cut.logit = last.logit;
    cut.id = last.id;
}

// Keeps tokens until their running weight first reaches top_p of the mass, that token included. The cut so far holds.
template <typename T>
PYRLHF_INLINE void cut_top_p(const Row<T>& row, double top_p, int64_t mass, Scratch& scratch, Cut& cut) {
    const int64_t wanted = top_p_target(top_p, mass);
    int64_t running;
    const int bin = bin_reaching(scratch.masses, wanted, running);
    const int64_t n = sorted_bin(row, bin, scratch.candidates);
    int64_t last = -1;
    do {
        ++last;
        running += weight_of(row, scratch.candidates[last].logit);
    } while (running < wanted && last + 1 < n);
    cut.logit = scratch.candidates[last].logit;
    cut.id = scratch.candidates[last].id;
}

template <typename T>
PYRLHF_INLINE Cut find_cut(const Row<T>& row, const SampleOptions& options, Scratch& scratch) {
    Cut cut;
    const bool by_count = options.top_k > 0 && options.top_k < row.vocab, by_mass = options.top_p < 1.0;
    if (by_count) {
        count_bins(row, scratch.counts);
        cut_top_k(row, options.top_k, scratch, cut);
    }
    if (by_mass) cut_top_p(row, options.top_p, weigh_bins(row, cut, scratch.masses), scratch, cut);
    cut.least_z = options.log_min_p;
    return cut;
}

PYRLHF_INLINE void add_to(Weights& sum, const Weights& more) {
    sum.high += more.high;
    sum.low += more.low;
}

// The weights of the tokens [first, first + chunk) added up; past the end of the row there is -infinity, which weighs
// nothing.
template <typename T>
PYRLHF_INLINE int64_t chunk_mass(const Row<T>& row, int64_t first) {
    constexpr int N = 4;
    const int64_t last = first + chunk < row.vocab ? first + chunk : row.vocab;
    Weights sum = {};
    int64_t at = first;
    for (; at + N * W <= last; at += N * W) {
        Reals<N> z;
        for (int i = 0; i < N; ++i) z.x[i] = scaled(row, load(row.logits + at + i * W));
        add_to(sum, weigh(z));
    }
    for (; at < last; at += W) add_to(sum, weigh(scaled(row, load_some(row.logits + at, row.vocab - at))));
    return total(sum.high, sum.low);
}

// Of those that are kept.
template <typename T>
PYRLHF_INLINE int64_t chunk_mass(const Row<T>& row, int64_t first, const Cut& cut) {
    const int64_t last = first + chunk < row.vocab ? first + chunk : row.vocab;
    Weights sum = {};
    for (int64_t at = first; at < last; at += W) add_to(sum, kept_weights(row, cut, at));
    return total(sum.high, sum.low);
}

// Asks for the same tokens of the next row, into the second-level cache: exponentials leave the memory time for them.
template <typename T>
PYRLHF_INLINE void ask_for_next(const Row<T>& row, int64_t first) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t at = first; at < first + chunk; at += line) __builtin_prefetch(row.next + at, 0, 2);
}

template <typename T>
PYRLHF_INLINE int64_t sum_chunks(const Row<T>& row, const Cut& cut, int64_t* chunks) {
    const bool all = cut.keeps_all();
    int64_t sum_of_all = 0;
    for (int64_t first = 0, c = 0; first < row.vocab; first += chunk, ++c) {
        ask_for_next(row, first);
        sum_of_all += chunks[c] = all ? chunk_mass(row, first) : chunk_mass(row, first, cut);
    }
    return sum_of_all;
}

// The first token whose running weight exceeds `point`.
template <typename T>
PYRLHF_INLINE int64_t token_at(const Row<T>& row, const Cut& cut, const int64_t* chunks, int64_t point) {
    int64_t c = 0, running = 0;
    while (running + chunks[c] <= point) running += chunks[c++];
    for (int64_t at = c * chunk;; at += W) {
        const Weights w = kept_weights(row, cut, at);
        for (int j = 0; j < W; ++j) {
            running += at_lane(w, j);
            if (running > point) return at + j;
        }
    }
}

// The largest logit; false if the row holds NaN, +infinity or nothing above -infinity.
template <typename T>
PYRLHF_INLINE bool find_top(Row<T>& row) {
    constexpr int together = 4;  // each waits for the one before it
    vf tops[together];
    for (vf& top : tops) top = broadcast(-infinity);
    vi bad = {};
    const auto look = [&](vf x, vf& top) PYRLHF_LAMBDA {
        bad |= x != x;
        top = x > top ? x : top;
    };
    int64_t at = 0;
    for (; at + together * W <= row.vocab; at += together * W)
        for (int i = 0; i < together; ++i) look(load(row.logits + at + i * W), tops[i]);
    for (; at < row.vocab; at += W) look(load_some(row.logits + at, row.vocab - at), tops[0]);
    for (const vf& top : tops) tops[0] = top > tops[0] ? top : tops[0];
    row.top = largest(tops[0]);
    return !any(bad) && row.top > -infinity && row.top < infinity;
}

template <typename T>
PYRLHF_INLINE int64_t first_top(const Row<T>& row) {
    for (int64_t i = 0;; ++i)
        if (to_float(row.logits[i]) == row.top) return i;
}

template <typename T>
PYRLHF_INLINE float logprob_of(const Row<T>& row, int64_t token, int64_t mass) {
    const float z = (to_float(row.logits[token]) - row.top) * row.inverse;
    return sampled_logprob_of(z, mass);
}

template <typename T>
PYRLHF_INLINE void sample_row(Row<T> row, const SampleOptions& options, uint64_t id, uint64_t position,
                              Scratch& scratch, int64_t& token, float& logprob) {
    const bool greedy = options.inverse_temperature == 0.0f;
    row.inverse = greedy ? 1.0f : options.inverse_temperature;
    const Cut cut = greedy ? Cut{} : find_cut(row, options, scratch);
    const int64_t mass = sum_chunks(row, cut, scratch.chunks);
    if (greedy) {
        token = first_top(row);
    } else {
        token = token_at(row, cut, scratch.chunks, drawn_point(options.seed, id, position, mass));
    }
    logprob = logprob_of(row, token, mass);
}

template <typename T>
PYRLHF_INLINE Row<T> row_at(const T* logits, int64_t b, int64_t rows, int64_t vocab, int64_t row_stride) {
    const T* const at = logits + b * row_stride;
    return {at, b + 1 < rows ? at + row_stride : at, vocab, 0.0f, 0.0f};
}

template <typename T>
int64_t sample_rows(const T* logits, const int64_t* ids, const int64_t* positions, const SampleOptions& options,
                    int64_t rows, int64_t vocab, int64_t row_stride, int64_t* tokens, float* logprobs, int threads) {
    int64_t first_bad = rows;
    const bool alone = rows * vocab < 8192;
#pragma omp parallel num_threads(alone ? 1 : threads) reduction(min : first_bad)
    {
        const int64_t chunks = vocab / chunk + 1;
        const size_t bytes = bins * (sizeof(int64_t) + sizeof(uint32_t)) +
                             static_cast<size_t>(chunks) * sizeof(int64_t) +
                             2 * static_cast<size_t>(vocab) * sizeof(Candidate);
        char* memory = static_cast<char*>(malloc(bytes));  // untouched pages cost nothing where no filter is on
        Scratch scratch;
        scratch.masses = reinterpret_cast<int64_t*>(memory);
        scratch.chunks = scratch.masses + bins;
        scratch.candidates = reinterpret_cast<Candidate*>(scratch.chunks + chunks);
        scratch.counts = reinterpret_cast<uint32_t*>(scratch.candidates + 2 * vocab);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows; ++b) {
            Row<T> row = row_at(logits, b, rows, vocab, row_stride);
            if (memory && find_top(row))
                sample_row(row, options, static_cast<uint64_t>(ids[b]), static_cast<uint64_t>(positions[b]), scratch,
                           tokens[b], logprobs[b]);
            else if (b < first_bad)
                first_bad = b;
        }
        free(memory);
    }
    return first_bad == rows ? -1 : first_bad;
}

template <typename T>
int64_t score_rows(const T* logits, const int64_t* tokens, float inverse, int64_t rows, int64_t vocab,
                   int64_t row_stride, float* logprobs, int threads) {
    int64_t first_bad = rows;
    const bool alone = rows * vocab < 8192;
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : threads) reduction(min : first_bad)
    for (int64_t b = 0; b < rows; ++b) {
        Row<T> row = row_at(logits, b, rows, vocab, row_stride);
        if (find_top(row)) {
            row.inverse = inverse == 0.0f ? 1.0f : inverse;
            int64_t mass = 0;
            for (int64_t first = 0; first < vocab; first += chunk) {
                ask_for_next(row, first);
                mass += chunk_mass(row, first);
            }
            logprobs[b] = logprob_of(row, tokens[b], mass);
        } else if (b < first_bad) {
            first_bad = b;
        }
    }
    return first_bad == rows ? -1 : first_bad;
}

}  // namespace

int64_t sampled_logprob(const void* logits, DType dtype, const int64_t* tokens, float inverse_temperature, int64_t rows,
                        int64_t vocab, int64_t row_stride, float* logprobs, int threads) {
    if (dtype == DType::bfloat16)
        return score_rows(static_cast<const bf16*>(logits), tokens, inverse_temperature, rows, vocab, row_stride,
                          logprobs, threads);
    return score_rows(static_cast<const float*>(logits), tokens, inverse_temperature, rows, vocab, row_stride, logprobs,
                      threads);
}

int64_t sample(const void* logits, DType dtype, const int64_t* ids, const int64_t* positions,
               const SampleOptions& options, int64_t rows, int64_t vocab, int64_t row_stride, int64_t* tokens,
               float* logprobs, int threads) {
    if (dtype == DType::bfloat16)
        return sample_rows(static_cast<const bf16*>(logits), ids, positions, options, rows, vocab, row_stride, tokens,
                           logprobs, threads);
    return sample_rows(static_cast<const float*>(logits), ids, positions, options, rows, vocab, row_stride, tokens,
                       logprobs, threads);
}

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
