// Sampling from rows of logits on a GPU: the tokens of cpu/sample.cpp, whose definition is exact, in two reads of the
// logits and no sort.
//
// A row is cut into tiles of 4096 logits, and a block takes a few tiles, so that one row fills many processors and many
// rows fill them all. Weights are integers: whichever order they are added in, and atomically too, the sum is the same.
//   look   the largest logit of each part of a row. With filters also a histogram of logit / temperature, 32 bins a
//          unit. Bins are absolute and counted modulo `bins` below the part's own largest logit, for the row's is not
//          known yet.
//   plan   (with filters) one block a row joins the histograms. Top-k's bin follows from the counts. The mass of a bin
//          is estimated within 0.2 %, for a bin also adds up where in it its tokens lie, in eighths; so the tokens are
//          split in those surely kept, a few candidates, and those surely dropped.
//   weigh  exact weights: of each tile (what is surely kept), of the row, and the candidates in a list. The last block
//          of a row to come (a ticket) selects the cut among the candidates by radix on (logit, id), checks with the
//          exact sums that it lies there, and walks to the token at which the running kept weight passes the draw:
//          over the tiles, then inside one of them.
// Where there are too many candidates for the list, or the check fails, the last block reads the row in their stead.
#include <cfloat>

#include "core/sample.h"
#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

using Mass = unsigned long long;  // what atomicAdd takes; sums stay below 2^62

constexpr int threads = 256;
constexpr int warps = threads / warp_size;
constexpr int items = 16;  // logits a thread holds
constexpr int tile = threads * items;
constexpr int bins = 1024;          // of the 32 units below the largest; nothing further down weighs anything
constexpr int steps = 8;            // places that are told apart in a bin
constexpr int most_part_tiles = 4;  // so that the counts and the places of a part fit in 32 bits:
constexpr int place_bits = 17;      // 4 * 4096 * 7 < 2^17, 4 * 4096 < 2^15
constexpr float too_far = 0x1p26f;  // places beyond it are not counted: float has no bits for them
constexpr int list_size = 8192;     // candidates a row
constexpr int id_bits = 22;         // vocab <= 2^22
constexpr int digit_bits = 9;       // of a token's 54 bits in sampling order
constexpr int digits = 1 << digit_bits;
constexpr int most_tiles = (1 << id_bits) / tile + 1;
constexpr float infinity = __builtin_inff();

static_assert(bins % threads == 0 && digits % threads == 0);
static_assert((32 + id_bits) % digit_bits == 0);

// --- One logit ---

// A float whose operations round one by one, also where the compiler could fuse them.
struct Single {
    float x;
    Single() = default;
    PYRLHF_DEVICE Single(float value) : x(value) {}
};
PYRLHF_DEVICE Single operator+(Single a, Single b) { return __fadd_rn(a.x, b.x); }
PYRLHF_DEVICE Single operator-(Single a, Single b) { return __fsub_rn(a.x, b.x); }
PYRLHF_DEVICE Single operator*(Single a, Single b) { return __fmul_rn(a.x, b.x); }

struct One {
    using Real = Single;
    using Integer = int;
    static PYRLHF_DEVICE Single at_least(Single x, float low) { return fmaxf(x.x, low); }
    // 1.5 * 2^23 leaves no bits for a fraction; the integer is then in the low bits.
    static PYRLHF_DEVICE void round(Single x, Single& n, int& i) {
        const float shifted = __fadd_rn(x.x, 12582912.0f);
        n = __fsub_rn(shifted, 12582912.0f);
        i = __float_as_int(shifted) - 0x4B400000;
    }
    static PYRLHF_DEVICE Single power(int i) { return __uint_as_float(static_cast<uint32_t>(i + 127) << 23); }
};

// w = floor(e^z 2^40) = high * 2^20 + low. Adding 2^23 and rounding down leaves the integer in the low bits: cheaper
// than a conversion.
PYRLHF_DEVICE void weigh(float z, uint32_t& high, uint32_t& low) {
    constexpr uint32_t integers = 0x4B000000u;
    const float scaled = exp_2_20<One>(z).x;
    const float whole = __fadd_rz(scaled, 8388608.0f);
    const float rest = __fsub_rn(scaled, __fsub_rn(whole, 8388608.0f));
    high = __float_as_uint(whole) - integers;
    low = __float_as_uint(__fmaf_rz(rest, 1048576.0f, 8388608.0f)) - integers;
}

PYRLHF_DEVICE Mass joined(uint32_t high, uint32_t low) { return (Mass{high} << 20) + low; }

// Ascending is the order in which filters keep tokens: the larger logit first, then the lower id.
PYRLHF_DEVICE uint64_t order_of(float logit, int id) {
    return (uint64_t{descending_key(logit)} << id_bits) | static_cast<uint64_t>(id);
}
PYRLHF_DEVICE float logit_of(uint64_t order) { return logit_of_key(static_cast<uint32_t>(order >> id_bits)); }
PYRLHF_DEVICE int id_of(uint64_t order) { return static_cast<int>(order & ((1u << id_bits) - 1)); }

// --- Rows, and what is known of them ---

struct Options {
    float inverse;   // 1 / temperature
    float fineness;  // places a unit of logit: 32 bins a unit of z, `steps` places a bin
    int top_k;       // 0: not filtered
    double top_p;    // 1: not filtered
    float least_z;   // min-p; -infinity: not filtered
    uint64_t seed;
    bool greedy;
};

struct Sizes {
    int64_t rows, row_stride;
    int vocab, tiles, part_tiles, parts;
};

struct State {
    Mass total, above;  // of all tokens, of those surely kept (min-p apart)
    uint32_t candidates, finished;
    int first_top;  // the lowest id of a largest logit
    // The plan: places >= above_from are surely kept (NaN: none), those below candidates_from are dropped.
    float candidates_from, above_from;
    uint32_t count_above;
    uint32_t by_count, by_mass;
};

struct Scratch {
    State* states;         // [rows]
    float* tops;           // [rows, parts]; NaN: NaN or +infinity is there
    Mass* tile_masses;     // [rows, tiles]
    uint32_t* histograms;  // [rows, parts, bins], with filters
    uint64_t* lists;       // [rows, list_size], with filters: orders
};

template <typename T>
struct Row {
    const T* logits;
    int vocab;
    int before;  // logits by which the row begins after a multiple of 16 bytes; tiles begin there
};

template <typename T>
PYRLHF_DEVICE Row<T> row_at(const T* logits, int64_t row, const Sizes& sizes) {
    const T* first = logits + row * sizes.row_stride;
    return {first, sizes.vocab, static_cast<int>(reinterpret_cast<uintptr_t>(first) % 16 / sizeof(T))};
}

// The id of this thread's item of a tile; -1 and less, or vocab and more, where the row has none.
template <typename T>
PYRLHF_DEVICE int id_at(const Row<T>& row, int tile_index, int item) {
    constexpr int size = Pack<T>::size;
    return tile_index * tile + (item / size * threads + static_cast<int>(threadIdx.x)) * size + item % size -
           row.before;
}

// This thread's logits of a tile, -infinity where there are none.
template <typename T>
PYRLHF_DEVICE void load_tile(const Row<T>& row, int tile_index, float (&x)[items]) {
    constexpr int size = Pack<T>::size;
#pragma unroll
    for (int k = 0; k < items; k += size) {
        const int id = id_at(row, tile_index, k);
        if (id >= 0 && id + size <= row.vocab) {
            const Pack<T> pack = load_pack(row.logits + id);
#pragma unroll
            for (int e = 0; e < size; ++e) x[k + e] = to_float(pack.at[e]);
        } else {
#pragma unroll
            for (int e = 0; e < size; ++e) {
                const bool there = id + e >= 0 && id + e < row.vocab;
                x[k + e] = there ? to_float(row.logits[id + e]) : -infinity;
            }
        }
    }
}

// Where on the absolute scale of bins a logit lies, in steps: look and weigh multiply alike, so they agree.
PYRLHF_DEVICE float place_of(float logit, float fineness) { return __fmul_rn(logit, fineness); }
PYRLHF_DEVICE bool countable(float place) { return fabsf(place) < too_far; }
PYRLHF_DEVICE int bin_at(float place) { return __float2int_rd(place) >> 3; }
PYRLHF_DEVICE float begin_of(int bin) { return static_cast<float>(bin * steps); }
static_assert(steps == 1 << 3);

// --- Within a block ---

PYRLHF_DEVICE float block_max(float x, float (&scratch)[warps]) {
    x = warp_max(x);
    if (threadIdx.x % warp_size == 0) scratch[threadIdx.x / warp_size] = x;
    __syncthreads();
    for (int w = 0; w < warps; ++w) x = fmaxf(x, scratch[w]);
    __syncthreads();
    return x;
}

// The sum over this thread and those before it.
template <typename N>
PYRLHF_DEVICE N block_scan(N x, N (&scratch)[warps]) {
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    for (int step = 1; step < warp_size; step *= 2) {
        const N other = __shfl_up_sync(all_lanes, x, step);
        if (lane >= step) x += other;
    }
    if (lane == warp_size - 1) scratch[warp] = x;
    __syncthreads();
    N before = 0;
    for (int w = 0; w < warp; ++w) before += scratch[w];
    __syncthreads();
    return before + x;
}

// NaN: the row is bad.
PYRLHF_DEVICE float row_top(const float* tops, int parts, float (&scratch)[warps]) {
    float top = -infinity;
    bool bad = false;
    for (int part = threadIdx.x; part < parts; part += threads) {
        bad |= tops[part] != tops[part];
        top = fmaxf(top, tops[part]);
    }
    top = block_max(top, scratch);
    return __syncthreads_or(bad) || top == -infinity ? __uint_as_float(0x7FC00000u) : top;
}

// --- look ---

template <bool filtered>
struct LookShared {
    float floats[warps];
    uint32_t histogram[filtered ? bins : 4];
};

template <typename T, bool filtered>
__global__ void __launch_bounds__(threads, 4) look(const T* logits, Options options, Sizes sizes, Scratch scratch) {
    auto& shared = shared_memory<LookShared<filtered>>();
    const int64_t index = blockIdx.x / sizes.parts;
    const int part = static_cast<int>(blockIdx.x % sizes.parts);
    const Row<T> row = row_at(logits, index, sizes);
    if (part == 0 && threadIdx.x == 0) {
        State& state = scratch.states[index];
        state.total = state.above = 0;
        state.candidates = state.finished = 0;
        state.first_top = row.vocab;
    }
    if constexpr (filtered)
        for (int i = threadIdx.x; i < bins; i += threads) shared.histogram[i] = 0;

    float top = -infinity;
    bool bad = false, counting = false;
    int top_bin = 0;
    const int last = min(sizes.tiles, (part + 1) * sizes.part_tiles);
    for (int t = part * sizes.part_tiles; t < last; ++t) {
        float x[items];
        load_tile(row, t, x);
#pragma unroll
        for (int i = 0; i < items; ++i) {
            bad |= !(x[i] <= FLT_MAX);
            top = fmaxf(top, x[i]);
        }
        if constexpr (filtered) {
            top = block_max(top, shared.floats);
            const float top_place = place_of(top, options.fineness);
            if (!countable(top_place)) continue;
            const int bin = bin_at(top_place);
            if (counting && bin > top_bin) {  // the bins that leave the window below become those that enter above
                const int moved = min(bin - top_bin, bins);
                for (int i = threadIdx.x; i < moved; i += threads) shared.histogram[(bin - i) & (bins - 1)] = 0;
                __syncthreads();
            }
            top_bin = bin;
            counting = true;
            const float lowest = begin_of(bin - bins + 1);
#pragma unroll
            for (int i = 0; i < items; ++i) {
                const float place = place_of(x[i], options.fineness);
                if (!(place >= lowest && place < too_far)) continue;
                const int step = __float2int_rd(place);
                atomicAdd(&shared.histogram[(step >> 3) & (bins - 1)],
                          (1u << place_bits) | static_cast<uint32_t>(step & (steps - 1)));
            }
        }
    }
    if constexpr (!filtered) top = block_max(top, shared.floats);
    bad = __syncthreads_or(bad);
    const int64_t here = index * sizes.parts + part;
    if (threadIdx.x == 0) scratch.tops[here] = bad ? __uint_as_float(0x7FC00000u) : top;
    if constexpr (filtered) {
        uint32_t* const histogram = scratch.histograms + here * bins;
        for (int i = threadIdx.x; i < bins; i += threads) histogram[i] = shared.histogram[i];
    }
}

// --- plan ---

struct PlanShared {
    float floats[warps];
    uint32_t integers[warps];
    uint32_t counts[bins];  // of the bin so many below the row's largest, and of those above it
    float masses[bins];
    int k_bin, first_bin, last_bin;
};

// Running sums over `bins` values in shared memory.
template <typename N>
PYRLHF_DEVICE void run_sums(N (&values)[bins], N (&scratch)[warps]) {
    constexpr int each = bins / threads;
    N sum = 0;
    for (int i = 0; i < each; ++i) sum += values[threadIdx.x * each + i];
    const N reached = block_scan(sum, scratch);
    N after = 0;
    for (int i = each - 1; i >= 0; --i) {
        const N value = values[threadIdx.x * each + i];
        values[threadIdx.x * each + i] = reached - after;
        after += value;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(threads) plan(Options options, Sizes sizes, Scratch scratch) {
    PlanShared& shared = shared_memory<PlanShared>();
    const int64_t index = blockIdx.x;
    const float* const tops = scratch.tops + index * sizes.parts;
    const uint32_t* const histograms = scratch.histograms + index * sizes.parts * bins;
    State& state = scratch.states[index];
    const float top = row_top(tops, sizes.parts, shared.floats);
    const float top_place = place_of(top, options.fineness);
    if (!countable(top_place)) {  // a bad row, or numbers too large to count: weigh looks at every token
        if (threadIdx.x == 0) {
            state.candidates = list_size + 1;  // no list
            state.candidates_from = -infinity;
            state.above_from = __uint_as_float(0x7FC00000u);
            state.count_above = 0;
            state.by_count = options.top_k > 0;
            state.by_mass = options.top_p < 1.0;
        }
        return;
    }
    const int top_bin = bin_at(top_place);
    for (int below = threadIdx.x; below < bins; below += threads) {
        const int bin = top_bin - below;
        uint32_t count = 0, places = 0;
        for (int part = 0; part < sizes.parts; ++part) {
            const float part_place = place_of(tops[part], options.fineness);
            if (!countable(part_place) || bin > bin_at(part_place)) continue;
            const uint32_t found = histograms[int64_t{part} * bins + (bin & (bins - 1))];
            count += found >> place_bits;
            places += found & ((1u << place_bits) - 1);
        }
        const float place = begin_of(bin) + 0.5f - top_place;
        const float middle = place + static_cast<float>(places) / static_cast<float>(max(count, 1u));
        shared.counts[below] = count;
        shared.masses[below] = static_cast<float>(count) * __expf(middle * (1.0f / (32 * steps)));
    }
    if (threadIdx.x == 0) shared.k_bin = shared.first_bin = shared.last_bin = bins;
    __syncthreads();
    run_sums(shared.counts, shared.integers);
    run_sums(shared.masses, shared.floats);

    const auto wanted_count = static_cast<uint32_t>(options.top_k);
    if (options.top_k > 0)
        for (int b = threadIdx.x; b < bins; b += threads)
            if (shared.counts[b] >= wanted_count) atomicMin(&shared.k_bin, b);
    __syncthreads();
    // Fewer than top_k tokens with any weight: nothing that weighs is dropped by top_k.
    const int k_bin = shared.k_bin;
    const bool by_count = k_bin < bins, by_mass = options.top_p < 1.0;
    if (by_mass) {
        const float least = !by_count ? shared.masses[bins - 1] : k_bin > 0 ? shared.masses[k_bin - 1] : 0.0f;
        const float most = shared.masses[by_count ? k_bin : bins - 1];
        const auto part = static_cast<float>(options.top_p);
        // What lies above the cut, the share s of the whole, is estimated within 1 +- 1/512, and so is the rest: their
        // ratio is within 1 +- (1 - s) / 256. The rest is for how tokens lie within a step, and for rounding.
        const float slack = 1.00002f + 0.0041f * static_cast<float>(1.0 - options.top_p);
        for (int b = threadIdx.x; b < bins; b += threads) {
            if (shared.masses[b] * slack >= part * least) atomicMin(&shared.first_bin, b);
            if (shared.masses[b] >= part * most * slack) atomicMin(&shared.last_bin, b);
        }
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    const int last_bin = by_count ? k_bin : min(shared.last_bin, bins - 1);
    const int first_bin = by_mass ? min(shared.first_bin, last_bin) : last_bin;
    const bool none = !by_count && !by_mass;
    state.candidates_from = none ? -infinity : begin_of(top_bin - last_bin);
    state.above_from = none ? -infinity : begin_of(top_bin - first_bin + 1);
    state.count_above = first_bin > 0 ? shared.counts[first_bin - 1] : 0;
    state.by_count = by_count;
    state.by_mass = by_mass;
}

// --- weigh ---

struct WeighShared {
    float floats[warps];
    Mass sums[warps];
    Mass tile_masses[most_tiles];
    Mass masses[digits];
    uint32_t counts[digits];
    uint64_t order;
    Mass before;
    int digit;
    bool last;
};

// The tokens that a cut may fall on: a list of orders, or where there is none every token of the row in these places.
template <typename T>
struct Candidates {
    Row<T> row;
    float fineness;
    const uint64_t* list;
    int count;
    float from, above_from;

    // Calls f(there, order) on whole warps.
    template <typename F>
    PYRLHF_DEVICE void each(F f) const {
#pragma unroll 1
        for (int first = 0; first < count; first += threads) {
            const int i = first + static_cast<int>(threadIdx.x);
            bool there = i < count;
            uint64_t order = 0;
            if (there && list) order = __ldcg(&list[i]);
            if (there && !list) {
                const float logit = to_float(row.logits[i]);
                const float place = place_of(logit, fineness);
                there = place >= from && !(place >= above_from);
                order = order_of(logit, i);
            }
            f(there, order);
        }
    }
};

PYRLHF_DEVICE Mass weight_of(float z) {
    uint32_t high, low;
    weigh(z, high, low);
    return joined(high, low);
}

// at[index] += x of every lane that is there, and counts[index] += 1 (counts may be null). Indices that many lanes
// share are added up in the warp first.
PYRLHF_DEVICE void add_at(Mass* at, uint32_t* counts, int index, Mass x, bool there) {
    const int lane = threadIdx.x % warp_size;
    uint32_t waiting = __ballot_sync(all_lanes, there);
#pragma unroll 1
    for (int round = 0; round < 2 && waiting; ++round) {
        const int leader = __ffs(static_cast<int>(waiting)) - 1;
        const int shared_index = __shfl_sync(all_lanes, index, leader);
        const bool same = there && index == shared_index;
        const uint32_t mates = __ballot_sync(all_lanes, same);
        const Mass sum = warp_sum(same ? x : Mass{0});
        if (lane == leader) {
            atomicAdd(&at[index], sum);
            if (counts) atomicAdd(&counts[index], static_cast<uint32_t>(__popc(mates)));
        }
        there = there && !same;
        waiting &= ~mates;
    }
    if (there) {
        atomicAdd(&at[index], x);
        if (counts) atomicAdd(&counts[index], 1u);
    }
}

// The order of the candidate at which the running measure (1 a token, or its weight) of those up to `limit` reaches
// `wanted`, which it does.
template <typename T, typename Measure>
PYRLHF_DEVICE uint64_t select(const Candidates<T>& candidates, Measure measure, uint64_t limit, Mass wanted,
                              WeighShared& shared) {
    constexpr int each = digits / threads;
    uint64_t prefix = 0;
#pragma unroll 1
    for (int shift = 32 + id_bits - digit_bits; shift >= 0; shift -= digit_bits) {
        for (int i = threadIdx.x; i < digits; i += threads) {
            shared.masses[i] = 0;
            shared.counts[i] = 0;
        }
        if (threadIdx.x == 0) shared.digit = 0;
        __syncthreads();
        candidates.each([&](bool there, uint64_t order) {
            there = there && order <= limit && order >> (shift + digit_bits) == prefix;
            const Mass x = there ? measure(order) : 0;
            add_at(shared.masses, shared.counts, static_cast<int>(order >> shift & (digits - 1)), x, there);
        });
        __syncthreads();
        Mass sum = 0;
        for (int i = 0; i < each; ++i) sum += shared.masses[threadIdx.x * each + i];
        Mass running = block_scan(sum, shared.sums) - sum;
        for (int i = 0; i < each; ++i) {
            const int digit = static_cast<int>(threadIdx.x) * each + i;
            const Mass reached = running + shared.masses[digit];
            if (running < wanted && reached >= wanted) {
                shared.digit = digit;
                shared.before = running;
            }
            running = reached;
        }
        __syncthreads();
        prefix = prefix << digit_bits | static_cast<uint64_t>(shared.digit);
        wanted -= shared.before;
        const bool alone = shared.counts[shared.digit] == 1;
        __syncthreads();
        if (!alone || shift == 0) continue;
        candidates.each([&](bool there, uint64_t order) {
            if (there && order <= limit && order >> shift == prefix) shared.order = order;
        });
        __syncthreads();
        return shared.order;
    }
    return prefix;
}

// What is kept: places from above_from on, and candidates up to the cut.
struct Kept {
    float candidates_from, above_from;
    uint64_t cut;
};

// Finds the cut, and adds the candidates that it leaves to the masses of their tiles.
template <typename T>
PYRLHF_DEVICE Kept cut_candidates(const Row<T>& row, const Options& options, const State& state, const uint64_t* list,
                                  const Sizes& sizes, float top, WeighShared& shared) {
    const auto z_of = [&](uint64_t order) { return __fmul_rn(__fsub_rn(logit_of(order), top), options.inverse); };
    const auto weight = [&](uint64_t order) { return weight_of(z_of(order)); };
    const uint32_t listed = __ldcg(&state.candidates);
    const Mass total = __ldcg(&state.total);
    const bool by_count = state.by_count, by_mass = state.by_mass, fits = listed <= list_size;
    Candidates<T> candidates = {row,
                                options.fineness,
                                fits ? list : nullptr,
                                fits ? static_cast<int>(listed) : row.vocab,
                                state.candidates_from,
                                state.above_from};
    Mass above = __ldcg(&state.above);
    uint32_t count_above = state.count_above;
    uint64_t cut = ~uint64_t{0};
    for (;;) {
        cut = ~uint64_t{0};
        if (by_count)
            cut = select(
                candidates, [](uint64_t) { return Mass{1}; }, cut,
                Mass{static_cast<uint32_t>(options.top_k) - count_above}, shared);
        if (!by_mass) break;
        Mass mass = 0;
        candidates.each([&](bool there, uint64_t order) { mass += there && order <= cut ? weight(order) : 0; });
        mass = block_sum<threads>(mass, shared.sums);
        const auto wanted =
            static_cast<Mass>(top_p_target(options.top_p, static_cast<int64_t>(by_count ? above + mass : total)));
        if (above < wanted && wanted <= above + mass) {
            cut = select(candidates, weight, cut, wanted - above, shared);
            break;
        }
        // The estimate was wrong: any token may be the last one kept.
        candidates = {row, options.fineness, nullptr, row.vocab, -infinity, __uint_as_float(0x7FC00000u)};
        above = 0;
        count_above = 0;
        for (int t = threadIdx.x; t < sizes.tiles; t += threads) shared.tile_masses[t] = 0;
        __syncthreads();
    }
    candidates.each([&](bool there, uint64_t order) {
        there = there && order <= cut && z_of(order) >= options.least_z;
        add_at(shared.tile_masses, nullptr, (id_of(order) + row.before) / tile, there ? weight(order) : 0, there);
    });
    __syncthreads();
    return {candidates.from, candidates.above_from, cut};
}

// The first token whose running kept weight exceeds `point`, or -1 in the threads that have not found it. tile_masses
// are of this row, in shared memory.
template <typename T>
PYRLHF_DEVICE int token_at(const Row<T>& row, const Options& options, const Kept& kept, Mass point, float top,
                           const Sizes& sizes, WeighShared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int each = (sizes.tiles + threads - 1) / threads;
    const int first_tile = min(thread * each, sizes.tiles), last_tile = min(first_tile + each, sizes.tiles);
    Mass sum = 0;
    for (int t = first_tile; t < last_tile; ++t) sum += shared.tile_masses[t];
    Mass running = block_scan(sum, shared.sums) - sum;
    for (int t = first_tile; t < last_tile; ++t) {
        const Mass reached = running + shared.tile_masses[t];
        if (running <= point && reached > point) {
            shared.digit = t;
            shared.before = running;
        }
        running = reached;
    }
    __syncthreads();
    const int first = shared.digit * tile + thread * items - row.before;
    const auto weight = [&](int id) -> Mass {
        if (id < 0 || id >= row.vocab) return 0;
        const float logit = to_float(row.logits[id]);
        const float place = place_of(logit, options.fineness), z = __fmul_rn(__fsub_rn(logit, top), options.inverse);
        const bool chosen =
            place >= kept.above_from || (place >= kept.candidates_from && order_of(logit, id) <= kept.cut);
        return chosen && z >= options.least_z ? weight_of(z) : 0;
    };
    sum = 0;
#pragma unroll 1
    for (int i = 0; i < items; ++i) sum += weight(first + i);
    running = shared.before + block_scan(sum, shared.sums) - sum;
    if (running > point || running + sum <= point) return -1;
#pragma unroll 1
    for (int i = 0; i < items; ++i) {
        running += weight(first + i);
        if (running > point) return first + i;
    }
    return -1;
}

template <typename T, bool filtered>
__global__ void __launch_bounds__(threads, 4)
    weigh_rows(const T* logits, const int64_t* ids, const int64_t* positions, Options options, Sizes sizes,
               Scratch scratch, int64_t* tokens, const int64_t* scored, float* logprobs, int32_t* faults) {
    WeighShared& shared = shared_memory<WeighShared>();
    const int64_t index = blockIdx.x / sizes.parts;
    const int part = static_cast<int>(blockIdx.x % sizes.parts);
    const Row<T> row = row_at(logits, index, sizes);
    const int first = part * sizes.part_tiles, last = min(sizes.tiles, first + sizes.part_tiles);
    float x[items];
    load_tile(row, first, x);  // on its way while the row's largest logit is found
    State& state = scratch.states[index];
    Mass* const tile_masses = scratch.tile_masses + index * sizes.tiles;
    uint64_t* const list = scratch.lists + index * list_size;
    const float top = row_top(scratch.tops + index * sizes.parts, sizes.parts, shared.floats);
    if (top != top) {
        if (part == 0 && threadIdx.x == 0) {
            if (!scored) tokens[index] = -1;
            logprobs[index] = top;
            raise_fault(faults, Fault::sample_logits);
        }
        return;
    }
    const float candidates_from = filtered ? state.candidates_from : -infinity;
    const float above_from = filtered ? state.above_from : -infinity;
    const bool all_weigh = !filtered || (state.by_mass && !state.by_count);

    Mass total = 0, above = 0;
    for (int t = first; t < last; ++t) {
        Mass kept = 0;
        uint32_t kept_surely = 0, found = 0;  // bit i: x[i] is; x[i] is a candidate
        if constexpr (filtered) {
#pragma unroll
            for (int i = 0; i < items; ++i) {
                const float place = place_of(x[i], options.fineness);
                const bool is_above = place >= above_from;
                kept_surely |= is_above ? 1u << i : 0;
                found |= place >= candidates_from && !is_above ? 1u << i : 0;
            }
        }
        if (all_weigh || kept_surely) {
            uint32_t high = 0, low = 0, all_high = 0, all_low = 0, above_high = 0, above_low = 0;
#pragma unroll
            for (int i = 0; i < items; ++i) {
                const float z = __fmul_rn(__fsub_rn(x[i], top), options.inverse);
                uint32_t h, l;
                weigh(z, h, l);
                const bool is_kept = z >= options.least_z;
                if constexpr (filtered) {
                    const bool is_above = kept_surely >> i & 1;
                    all_high += h;
                    all_low += l;
                    above_high += is_above ? h : 0;
                    above_low += is_above ? l : 0;
                    high += is_above && is_kept ? h : 0;
                    low += is_above && is_kept ? l : 0;
                } else {
                    high += is_kept ? h : 0;
                    low += is_kept ? l : 0;
                }
            }
            kept = joined(high, low);
            total += joined(all_high, all_low);
            above += joined(above_high, above_low);
        }
        if constexpr (!filtered) {
            if (options.greedy) {
#pragma unroll
                for (int i = 0; i < items; ++i)
                    if (x[i] == top) atomicMin(&state.first_top, id_at(row, t, i));
            }
        }
        kept = block_sum<threads>(kept, shared.sums);
        if (threadIdx.x == 0) tile_masses[t] = kept;
        if constexpr (filtered) {
            if (__any_sync(all_lanes, found != 0)) {
                const int lane = threadIdx.x % warp_size;
                const auto mine = static_cast<uint32_t>(__popc(found));
                uint32_t place = mine;
                for (int step = 1; step < warp_size; step *= 2) {
                    const uint32_t other = __shfl_up_sync(all_lanes, place, step);
                    if (lane >= step) place += other;
                }
                uint32_t start = 0;
                if (lane == warp_size - 1) start = atomicAdd(&state.candidates, place);
                place += __shfl_sync(all_lanes, start, warp_size - 1) - mine;
                for (; found && place < list_size; found &= found - 1, ++place) {
                    const int id = id_at(row, t, __ffs(static_cast<int>(found)) - 1);
                    list[place] = order_of(to_float(row.logits[id]), id);
                }
            }
        }
        if (t + 1 < last) load_tile(row, t + 1, x);
    }
    if constexpr (filtered) {
        total = block_sum<threads>(total, shared.sums);
        above = block_sum<threads>(above, shared.sums);
        if (threadIdx.x == 0) {
            atomicAdd(&state.total, total);
            atomicAdd(&state.above, above);
        }
    }

    // The last block of the row goes on. What others wrote is read past this processor's own cache.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.last = atomicAdd(&state.finished, 1u) == static_cast<uint32_t>(sizes.parts) - 1;
    __syncthreads();
    if (!shared.last) return;
    __threadfence();
    for (int t = threadIdx.x; t < sizes.tiles; t += threads) shared.tile_masses[t] = __ldcg(&tile_masses[t]);
    __syncthreads();
    Kept kept = {-infinity, -infinity, ~uint64_t{0}};
    if constexpr (filtered)
        if (state.by_count || state.by_mass) kept = cut_candidates(row, options, state, list, sizes, top, shared);
    Mass mass = 0;
    for (int t = threadIdx.x; t < sizes.tiles; t += threads) mass += shared.tile_masses[t];
    mass = block_sum<threads>(mass, shared.sums);

    int64_t token = -1;
    if (scored || options.greedy) {
        if (threadIdx.x != 0) return;
        token = scored ? scored[index] : __ldcg(&state.first_top);
        if (token < 0 || token >= row.vocab) {
            logprobs[index] = __uint_as_float(0x7FC00000u);
            raise_fault(faults, Fault::sampled_logprob_tokens);
            return;
        }
    } else {
        const int64_t point = drawn_point(options.seed, static_cast<uint64_t>(ids[index]),
                                          static_cast<uint64_t>(positions[index]), static_cast<int64_t>(mass));
        token = token_at(row, options, kept, static_cast<Mass>(point), top, sizes, shared);
        if (token < 0) return;
    }
    const float z = __fmul_rn(__fsub_rn(to_float(row.logits[token]), top), options.inverse);
    if (!scored) tokens[index] = token;
    logprobs[index] = sampled_logprob_of(z, static_cast<int64_t>(mass));
}

__global__ void philox_kernel(const uint32_t* words, uint32_t* drawn) {
    const uint32_t* const w = words + 6 * threadIdx.x;
    const Philox found = pyrlhf::philox4x32({{w[0], w[1], w[2], w[3]}}, w[4], w[5]);
    for (int i = 0; i < 4; ++i) drawn[4 * threadIdx.x + i] = found.word[i];
}

// --- Launching ---

Sizes sizes_of(int64_t rows, int64_t vocab, int64_t row_stride, Queue queue) {
    Sizes sizes = {rows, row_stride, static_cast<int>(vocab), 0, 0, 0};
    sizes.tiles = ceil_div(sizes.vocab + 7, tile);  // a row begins up to 7 places after a multiple of 16 bytes
    const int64_t fill = 8 * processors(queue);     // blocks that keep the device busy, its last wave included
    const int64_t wanted = rows * sizes.tiles / fill;
    sizes.part_tiles = static_cast<int>(wanted < 1 ? 1 : wanted > most_part_tiles ? most_part_tiles : wanted);
    // Long rows: few parts make a short plan.
    if (sizes.tiles > 64) sizes.part_tiles = most_part_tiles;
    sizes.parts = ceil_div(sizes.tiles, sizes.part_tiles);
    return sizes;
}

// Where each array begins in the scratch memory; gives the bytes of all.
int64_t lay_out(const Sizes& sizes, bool filtered, char* memory, Scratch& scratch) {
    int64_t bytes = 0;
    const auto take = [&](int64_t count, int64_t size) {
        char* const begin = memory + bytes;
        bytes += ceil_div(count * size, int64_t{16}) * 16;
        return begin;
    };
    const int64_t parts = sizes.rows * sizes.parts, filters = filtered ? 1 : 0;
    scratch.states = reinterpret_cast<State*>(take(sizes.rows, sizeof(State)));
    scratch.tops = reinterpret_cast<float*>(take(parts, sizeof(float)));
    scratch.tile_masses = reinterpret_cast<Mass*>(take(sizes.rows * sizes.tiles, sizeof(Mass)));
    scratch.histograms = reinterpret_cast<uint32_t*>(take(filters * parts * bins, sizeof(uint32_t)));
    scratch.lists = reinterpret_cast<uint64_t*>(take(filters * sizes.rows * list_size, sizeof(uint64_t)));
    return bytes;
}

template <typename T, bool filtered>
void run(const char* op, const T* logits, const int64_t* ids, const int64_t* positions, const Options& options,
         const Sizes& sizes, void* memory, int64_t* tokens, const int64_t* scored, float* logprobs, int32_t* faults,
         Queue queue) {
    Scratch scratch;
    lay_out(sizes, filtered, static_cast<char*>(memory), scratch);
    const dim3 parts(static_cast<unsigned>(sizes.rows * sizes.parts)), rows(static_cast<unsigned>(sizes.rows));
    launch(op, look<T, filtered>, parts, threads, sizeof(LookShared<filtered>), queue, logits, options, sizes, scratch);
    if (filtered) launch(op, plan, rows, threads, sizeof(PlanShared), queue, options, sizes, scratch);
    launch(op, weigh_rows<T, filtered>, parts, threads, sizeof(WeighShared), queue, logits, ids, positions, options,
           sizes, scratch, tokens, scored, logprobs, faults);
}

bool is_filtered(int64_t top_k, double top_p, int64_t vocab) { return (top_k > 0 && top_k < vocab) || top_p < 1.0; }

}  // namespace

int64_t sample_scratch(int64_t rows, int64_t vocab, int64_t top_k, double top_p, Queue queue) {
    Scratch scratch;
    return lay_out(sizes_of(rows, vocab, vocab, queue), is_filtered(top_k, top_p, vocab), nullptr, scratch);
}

void sample(const void* logits, DType dtype, const int64_t* ids, const int64_t* positions, int64_t rows, int64_t vocab,
            int64_t row_stride, uint64_t seed, float inverse_temperature, int64_t top_k, double top_p, float log_min_p,
            void* scratch, int64_t* tokens, float* logprobs, int32_t* faults, Queue queue) {
    if (rows == 0) return;
    const bool greedy = inverse_temperature == 0.0f, filtered = !greedy && is_filtered(top_k, top_p, vocab);
    Options options = {};
    options.inverse = greedy ? 1.0f : inverse_temperature;
    options.fineness = options.inverse * (32 * steps);
    options.top_k = top_k < vocab ? static_cast<int>(top_k) : 0;
    options.top_p = top_p;
    options.least_z = greedy ? -infinity : log_min_p;
    options.seed = seed;
    options.greedy = greedy;
    const Sizes sizes = sizes_of(rows, vocab, row_stride, queue);
    visit(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto f = filtered ? run<T, true> : run<T, false>;
        f("sample", static_cast<const T*>(logits), ids, positions, options, sizes, scratch, tokens, nullptr, logprobs,
          faults, queue);
    });
}

void sampled_logprob(const void* logits, DType dtype, const int64_t* tokens, int64_t rows, int64_t vocab,
                     int64_t row_stride, float inverse_temperature, void* scratch, float* logprobs, int32_t* faults,
                     Queue queue) {
    if (rows == 0) return;
    Options options = {};
    options.inverse = inverse_temperature == 0.0f ? 1.0f : inverse_temperature;
    options.top_p = 1.0;
    options.least_z = -infinity;
    const Sizes sizes = sizes_of(rows, vocab, row_stride, queue);
    visit(dtype, [&](auto zero) {
        using T = decltype(zero);
        run<T, false>("sampled_logprob", static_cast<const T*>(logits), nullptr, nullptr, options, sizes, scratch,
                      nullptr, tokens, logprobs, faults, queue);
    });
}

void philox4x32(const uint32_t* words, uint32_t* drawn, int64_t count, Queue queue) {
    launch("philox4x32", philox_kernel, dim3(1), static_cast<int>(count), 0, queue, words, drawn);
}

}  // namespace cuda
}  // namespace pyrlhf
