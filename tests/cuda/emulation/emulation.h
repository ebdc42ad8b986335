// CUDA without a GPU: what csrc/cuda needs of it, in plain C++, so that a sanitizer sees every access.
//
// The blocks of a grid run one after another. The threads of a block are fibers: each runs until it meets the others,
// at a barrier, a vote, a shuffle or a matrix product, and then waits. Who goes first is shuffled anew each time by a
// seed (PYRLHF_EMULATION_SEED), and between two barriers every other warp, by lot, stays behind until the rest can go
// no further: code that needs a barrier it does not have reads what was not written yet, or was overwritten. Shared
// memory is an allocation of its own, exactly as large as the launch said, and starts as NaN (integers: -1). Copies
// with cp.async arrive when they are waited for, not before. What would hang or be undefined on a GPU (a barrier that
// some threads never reach, lanes of one warp in different shuffles) is a std::runtime_error.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};

// Those of the fiber that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// Runs kernel() for every thread of every block, in the caller's own thread.
void launch(const char* op, dim3 blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);

// The block's shared memory; bytes must be what the launch gave.
void* shared_memory(size_t bytes);

// Where a thread waits, for the report and to see that all wait at the same place.
struct Place {
    const char* file;
    int line;
};

enum class Vote { none, any, all, count };

// Waits for the whole block; gives how many threads said true, or whether any or all did.
int block_barrier(Vote vote, bool mine, Place place);

// Waits for the lanes of mask, then runs exchange once: given and found have an entry for each of 32 lanes, null for
// those outside the mask.
using Exchange = void (*)(const void* const* given, void* const* found);
void warp_exchange(uint32_t mask, const void* given, void* found, Exchange exchange, Place place);

// cp.async: a copy that is done when its group is waited for.
void copy_later(void* to, const void* from, size_t bytes, size_t zeros);
void close_copies();
void wait_for_copies(int groups_left);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

template <typename T, int From(int lane, int argument, int width)>
T shuffle(uint32_t mask, T x, int argument, int width, Place place) {
    struct Given {
        T x;
        int argument, width;
    } given{x, argument, width};
    T out = x;
    warp_exchange(
        mask, &given, &out,
        [](const void* const* all, void* const* found) {
            for (int lane = 0; lane < 32; ++lane) {
                if (!found[lane]) continue;
                const Given& mine = *static_cast<const Given*>(all[lane]);
                const int from = From(lane, mine.argument, mine.width);
                // A lane outside the mask has nothing to give: NaN, or -1.
                if (all[from]) {
                    *static_cast<T*>(found[lane]) = static_cast<const Given*>(all[from])->x;
                } else {
                    memset(found[lane], 0xFF, sizeof(T));
                }
            }
        },
        place);
    return out;
}

inline int from_lane(int lane, int source, int width) { return lane / width * width + source % width; }
inline int from_up(int lane, int step, int width) { return lane % width < step ? lane : lane - step; }
inline int from_down(int lane, int step, int width) { return lane % width + step >= width ? lane : lane + step; }
inline int from_xor(int lane, int bits, int width) {
    const int other = lane ^ bits;
    return other / width > lane / width ? lane : other;
}

template <typename To, typename From>
To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    memcpy(&out, &x, sizeof(out));
    return out;
}

uint32_t ballot(uint32_t mask, bool mine, Place place);

}  // namespace emulation

#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_HERE) { emulation::block_barrier(emulation::Vote::none, true, {file, line}); }
inline int __syncthreads_or(int x, EMULATION_HERE) {
    return emulation::block_barrier(emulation::Vote::any, x != 0, {file, line});
}
inline int __syncthreads_and(int x, EMULATION_HERE) {
    return emulation::block_barrier(emulation::Vote::all, x != 0, {file, line});
}
inline int __syncthreads_count(int x, EMULATION_HERE) {
    return emulation::block_barrier(emulation::Vote::count, x != 0, {file, line});
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, EMULATION_HERE) {
    emulation::warp_exchange(mask, nullptr, nullptr, nullptr, {file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, int x, EMULATION_HERE) {
    return emulation::ballot(mask, x != 0, {file, line});
}
inline int __any_sync(uint32_t mask, int x, EMULATION_HERE) { return __ballot_sync(mask, x, file, line) != 0; }
inline int __all_sync(uint32_t mask, int x, EMULATION_HERE) { return __ballot_sync(mask, x, file, line) == mask; }

template <typename T>
T __shfl_sync(uint32_t mask, T x, int source, int width = 32, EMULATION_HERE) {
    return emulation::shuffle<T, emulation::from_lane>(mask, x, source, width, {file, line});
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T x, unsigned step, int width = 32, EMULATION_HERE) {
    return emulation::shuffle<T, emulation::from_up>(mask, x, static_cast<int>(step), width, {file, line});
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T x, unsigned step, int width = 32, EMULATION_HERE) {
    return emulation::shuffle<T, emulation::from_down>(mask, x, static_cast<int>(step), width, {file, line});
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T x, int bits, int width = 32, EMULATION_HERE) {
    return emulation::shuffle<T, emulation::from_xor>(mask, x, bits, width, {file, line});
}

#undef EMULATION_HERE

// Blocks run in turn and fibers switch only where they wait, so an atomic is a plain update.
template <typename T>
T atomicAdd(T* at, T x) {
    const T before = *at;
    *at = before + x;
    return before;
}
template <typename T>
T atomicMax(T* at, T x) {
    const T before = *at;
    if (x > before) *at = x;
    return before;
}
template <typename T>
T atomicMin(T* at, T x) {
    const T before = *at;
    if (x < before) *at = x;
    return before;
}
template <typename T>
T atomicOr(T* at, T x) {
    const T before = *at;
    *at = before | x;
    return before;
}
template <typename T>
T atomicExch(T* at, T x) {
    const T before = *at;
    *at = x;
    return before;
}
template <typename T>
T atomicCAS(T* at, T expected, T x) {
    const T before = *at;
    if (before == expected) *at = x;
    return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __ldg(const T* at) {
    return *at;
}
template <typename T>
T __ldcs(const T* at) {
    return *at;
}
template <typename T>
T __ldcg(const T* at) {
    return *at;
}
template <typename T>
void __stcs(T* at, T x) {
    *at = x;
}

template <typename T>
T max(T a, T b) {
    return a > b ? a : b;
}
template <typename T>
T min(T a, T b) {
    return a < b ? a : b;
}

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
float __fadd_rz(float a, float b);
float __fmaf_rz(float a, float b, float c);
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline uint32_t __float_as_uint(float x) { return emulation::same_bits<uint32_t>(x); }
inline int __float_as_int(float x) { return emulation::same_bits<int>(x); }
inline float __uint_as_float(uint32_t x) { return emulation::same_bits<float>(x); }
inline float __int_as_float(int x) { return emulation::same_bits<float>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<uint32_t>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}
