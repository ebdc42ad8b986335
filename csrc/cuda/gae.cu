// Generalised advantage estimation on a GPU: A_t = delta_t + c A_{t+1}, c = gamma lambda, as scans of 128-token chunks.
//
// Chunks are counted from the sequence's own last token. A warp holds one: row j, lane l is the chunk's token 32 j + l
// from its end, so every access of a row is 32 neighbouring floats and no transposition is needed (wider accesses would
// need chunks that begin on 16 bytes, and then a sequence's bits would depend on where it lies). The rows are scanned
// by shuffles and joined as if nothing followed the chunk; then A of what follows, the carry, is added with its power
// of c. The recurrence has a constant factor, so the chain from chunk to chunk is one multiply-add:
// carry = (A of the chunk's first token, alone) + c^128 carry.
//
// That arithmetic is all there is, for either shape of the kernel: a warp a sequence where there are sequences enough
// to fill the GPU, a block a sequence where they are few and long. There each warp takes every 16th chunk, and the
// chain is walked by all of them alike from the 16 chunk ends in shared memory. So the bits of a sequence depend
// neither on the shape nor on the other sequences. Both shapes ask for two chunks ahead before they need the first: 2
// KiB in flight a warp, which leaves the memory busy at 16 warps a multiprocessor. A token is read once and written
// once, 16 bytes; the value after a row comes from the neighbouring lane.
//
// A sequence is not split over several blocks: a multiprocessor alone takes a sequence of 131,072 tokens in some tens
// of microseconds, and a chain through global memory would cost a reset of flags and a wait for other blocks at every
// call, for a case (fewer sequences than multiprocessors, each of millions of tokens) that training does not have.
//
// Each power of c is rounded once, from double: an error in c^128 would grow from chunk to chunk. Multiply-adds that
// decide bits are written out. Offsets that fall or leave 0..total are flagged, and their sequences left alone.
#include <type_traits>

#include "core/gae.h"
#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {
namespace {

constexpr int rows = 4;
constexpr int chunk = rows * warp_size;
constexpr int ahead = 2;  // chunks that a warp has asked for and not yet used

// Warps that share a sequence in the two shapes, and warps a block.
constexpr int alone = 1, alone_warps = 2;
constexpr int together = 16;
template <int sharing>
constexpr int warps = sharing == 1 ? alone_warps : sharing;
template <int sharing>
constexpr int threads = warps<sharing> * warp_size;

struct Decay {
    float step[5];      // c, c^2, c^4, c^8, c^16
    float reach[rows];  // c^(i + 1) for this lane's tokens i: how much of the carry reaches them
    float whole;        // c^chunk
};

PYRLHF_DEVICE Decay make_decay(float c, int lane) {
    Decay decay;
    double square = static_cast<double>(c), power = square;
#pragma unroll
    for (int bit = 0; bit < 5; ++bit) {
        decay.step[bit] = static_cast<float>(square);
        if (lane >> bit & 1) power *= square;
        square *= square;
    }
#pragma unroll
    for (int j = 0; j < rows; ++j) {
        decay.reach[j] = static_cast<float>(power);
        power *= square;
    }
    decay.whole = static_cast<float>((square * square) * (square * square));
    return decay;
}

// Pointers to the sequence's first token. Tokens are counted in int: offsets are int32.
struct Sequence {
    const float *rewards, *values;
    int length;
    float after;
};

struct Chunk {
    float reward[rows], value[rows];
    float next;  // the value after the chunk; lane 0's, and only where warps share a sequence
};

// Tokens before the sequence's first are 0: they come last in every scan, so what they give reaches nobody.
template <bool with_next>
PYRLHF_DEVICE Chunk load_chunk(const Sequence& of, int end, int lane) {
    Chunk out;
    const int t = end - 1 - lane;
#pragma unroll
    for (int j = 0; j < rows; ++j) {
        const bool inside = t >= warp_size * j;
        out.reward[j] = inside ? of.rewards[t - warp_size * j] : 0.0f;
        out.value[j] = inside ? of.values[t - warp_size * j] : 0.0f;
    }
    if constexpr (with_next) {
        out.next = of.after;
        if (lane == 0 && end > 0 && end < of.length) out.next = of.values[end];
    }
    return out;
}

// A of the chunk as if nothing followed it, from its TD errors.
PYRLHF_DEVICE void scan_chunk(float (&a)[rows], const Decay& decay, int lane) {
#pragma unroll
    for (int bit = 0; bit < 5; ++bit)
#pragma unroll
        for (int j = 0; j < rows; ++j) {
            const float later = __shfl_up_sync(all_lanes, a[j], 1u << bit);
            if (lane >= 1 << bit) a[j] = fmaf(decay.step[bit], later, a[j]);
        }
#pragma unroll
    for (int j = 1; j < rows; ++j) a[j] = fmaf(decay.reach[0], __shfl_sync(all_lanes, a[j - 1], warp_size - 1), a[j]);
}

struct Shared {
    float ends[2][together];  // of two rounds in turn: one barrier a round
};

// What enters this warp's chunk; carry moves on past the chunks of all the warps that share the sequence.
template <int sharing>
PYRLHF_DEVICE float walk_chain(float& carry, float end, float whole, int member, int lane, int round) {
    float entering = carry;
    if constexpr (sharing == 1) {
        carry = fmaf(whole, carry, end);
    } else {
        float (&ends)[together] = shared_memory<Shared>().ends[round % 2];
        if (lane == 0) ends[member] = end;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < sharing; ++w) {
            if (w == member) entering = carry;
            carry = fmaf(whole, carry, ends[w]);
        }
    }
    return entering;
}

template <int sharing>
__global__ void __launch_bounds__(threads<sharing>, sharing == 1 ? 16 : 1)
    gae_kernel(const float* __restrict__ rewards, const float* __restrict__ values,
               const int32_t* __restrict__ cu_seqlens, const float* __restrict__ bootstrap,
               float* __restrict__ advantages, float* __restrict__ returns, int64_t sequences, int64_t total,
               float gamma, float c, int32_t* faults) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
    const int member = warp % sharing;
    if (blockIdx.x == 0 && threadIdx.x == 0 && (cu_seqlens[0] != 0 || cu_seqlens[sequences] != total))
        raise_fault(faults, Fault::gae_cu_seqlens);
    const int64_t s = int64_t{blockIdx.x} * (warps<sharing> / sharing) + warp / sharing;
    if (s >= sequences) return;
    const int64_t first = cu_seqlens[s], last = cu_seqlens[s + 1];
    if (first < 0 || last < first || last > total) {
        raise_fault(faults, Fault::gae_cu_seqlens);
        return;
    }
    const Sequence sequence = {rewards + first, values + first, static_cast<int>(last - first),
                               bootstrap ? bootstrap[s] : 0.0f};
    advantages += first;
    returns += first;
    const Decay decay = make_decay(c, lane);

    constexpr int stride = sharing * chunk;
    int round_end = sequence.length;  // of the first warp's chunk; of this one's below
    Chunk asked[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k)
        asked[k] = load_chunk<(sharing > 1)>(sequence, round_end - k * stride - member * chunk, lane);

    float carry = 0.0f, next = sequence.after;
    while (round_end > 0) {
#pragma unroll
        for (int k = 0; k < ahead; ++k) {
            if (round_end <= 0) break;
            const Chunk now = asked[k];
            const int end = round_end - member * chunk;
            if constexpr (sharing > 1) next = now.next;
            float a[rows];
#pragma unroll
            for (int j = 0; j < rows; ++j) {
                // The value a token later in time: the lane below has it, lane 31 of the row before has lane 0's.
                const float later = __shfl_sync(all_lanes, now.value[j], (lane + warp_size - 1) % warp_size);
                a[j] = td_error(now.reward[j], now.value[j], lane > 0 ? later : next, gamma);
                next = later;
            }
            asked[k] = load_chunk<(sharing > 1)>(sequence, end - ahead * stride, lane);

            scan_chunk(a, decay, lane);
            const float chunk_end = __shfl_sync(all_lanes, a[rows - 1], warp_size - 1);
            const float entering = walk_chain<sharing>(carry, chunk_end, decay.whole, member, lane, k);
            const int t = end - 1 - lane;
#pragma unroll
            for (int j = 0; j < rows; ++j) {
                if (t < warp_size * j) continue;
                const float advantage = fmaf(decay.reach[j], entering, a[j]);
                advantages[t - warp_size * j] = advantage;
                returns[t - warp_size * j] = advantage + now.value[j];
            }
            round_end -= stride;
        }
    }
}

// Few sequences leave most of the GPU idle with a warp each, unless they are so short that a block would idle too.
bool warps_fill_the_gpu(int64_t sequences, int64_t total, Queue queue) {
    return sequences >= 8 * int64_t{processors(queue)} || total <= sequences * 4 * chunk;
}

template <int sharing, typename... Arguments>
void start(int64_t sequences, Queue queue, Arguments... arguments) {
    const int64_t blocks = max(int64_t{1}, ceil_div(sequences, int64_t{warps<sharing> / sharing}));
    launch("gae", gae_kernel<sharing>, dim3(static_cast<unsigned>(blocks)), threads<sharing>,
           sharing > 1 ? sizeof(Shared) : 0, queue, arguments...);
}

}  // namespace

void gae(const float* rewards, const float* values, const int32_t* cu_seqlens, const float* bootstrap,
         float* advantages, float* returns, int64_t sequences, int64_t total, float gamma, float lam, int32_t* faults,
         Queue queue) {
    if (sequences == 0 && total == 0) return;
    const auto with = [&](auto sharing) {
        start<decltype(sharing)::value>(sequences, queue, rewards, values, cu_seqlens, bootstrap, advantages, returns,
                                        sequences, total, gamma, gamma * lam, faults);
    };
    if (warps_fill_the_gpu(sequences, total, queue)) {
        with(std::integral_constant<int, alone>{});
    } else {
        with(std::integral_constant<int, together>{});
    }
}

}  // namespace cuda
}  // namespace pyrlhf
