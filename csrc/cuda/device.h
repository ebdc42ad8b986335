// What every kernel file stands on: how a kernel is launched, its shared memory, 16-byte accesses, 16-bit floats, and
// sums in a fixed order. Compiled by nvcc it is CUDA; compiled by a C++ compiler alone, tests/cuda/emulation stands in
// for CUDA. Kernels keep to what both know: shared memory through shared_memory<T>(), launches through launch(), no
// <<<>>>.
#pragma once

#if defined(__CUDACC__)
#    include <cuda_bf16.h>
#    include <cuda_fp16.h>
#    include <cuda_runtime.h>

#    include <stdexcept>
#    include <string>
#else
#    include "emulation.h"
#endif

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/faults.h"
#include "cuda/kernels.h"

#define PYRLHF_DEVICE __device__ __forceinline__

namespace pyrlhf {
namespace cuda {

constexpr int warp_size = 32;
constexpr uint32_t all_lanes = 0xFFFFFFFFu;

template <typename T>
PYRLHF_HD constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// --- Launching ---

#if defined(__CUDACC__)
inline void check(const char* op, cudaError_t error) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("pyrlhf ") + op + " (CUDA): " + cudaGetErrorString(error));
}

// The queue's device is current while this lives.
class OnDevice {
  public:
    OnDevice(const char* op, int device) : op_(op), device_(device) {
        check(op, cudaGetDevice(&before_));
        if (before_ != device_) check(op, cudaSetDevice(device_));
    }
    ~OnDevice() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    const char* op_;
    int device_, before_ = 0;
};

// Starts kernel(arguments...) on the queue, with that much dynamic shared memory (sizeof of what shared_memory<T>()
// gives). Throws std::runtime_error naming op if CUDA refuses; never waits for the device.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes, Queue queue,
            Arguments... arguments) {
    const OnDevice guard(op, queue.device);
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024)
        check(op, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared_bytes)));
    const auto start = [&](Parameters... given) {
        void* pointers[] = {&given...};
        check(op, cudaLaunchKernel(function, blocks, dim3(static_cast<unsigned>(threads)), pointers, shared_bytes,
                                   static_cast<cudaStream_t>(queue.stream)));
    };
    start(static_cast<Parameters>(arguments)...);
}

// Streaming multiprocessors of the queue's device.
inline int processors(Queue queue) {
    int count = 0;
    check("device query", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, queue.device));
    return count;
}

inline void fill_zero(const char* op, void* to, size_t bytes, Queue queue) {
    const OnDevice guard(op, queue.device);
    check(op, cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(queue.stream)));
}

// This block's dynamic shared memory, of which launch() was told the size. A kernel asks once, for one struct.
template <typename T>
PYRLHF_DEVICE T& shared_memory() {
    static_assert(alignof(T) <= 16, "dynamic shared memory begins on 16 bytes");
    extern __shared__ uint4 pyrlhf_shared[];
    return *reinterpret_cast<T*>(pyrlhf_shared);
}
#else
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes, Queue,
            Arguments... arguments) {
    emulation::launch(op, blocks, threads, shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline int processors(Queue) { return 4; }

inline void fill_zero(const char*, void* to, size_t bytes, Queue) { memset(to, 0, bytes); }

template <typename T>
T& shared_memory() {
    return *static_cast<T*>(emulation::shared_memory(sizeof(T)));
}
#endif

// --- Numbers ---

#if defined(__CUDACC__)
PYRLHF_DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
PYRLHF_DEVICE void from_float(float x, f16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }
PYRLHF_DEVICE void from_float(float x, bf16& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
inline float to_float(f16 x) { return emulation::half_to_float(x.bits); }
inline void from_float(float x, f16& out) { out.bits = emulation::float_to_half(x); }
inline void from_float(float x, bf16& out) { out.bits = emulation::float_to_bfloat16(x); }
#endif
PYRLHF_DEVICE void from_float(float x, float& out) { out = x; }
using pyrlhf::to_float;

template <typename T>
PYRLHF_DEVICE T rounded(float x) {
    T out;
    from_float(x, out);
    return out;
}

// Calls f with a value of the C++ type of a dtype code: visit(dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <typename F>
void visit(DType dtype, F&& f) {
    switch (dtype) {
        case DType::float32:
            return f(float{});
        case DType::bfloat16:
            return f(bf16{});
        case DType::float16:
            return f(f16{});
    }
}

// --- Memory ---

// 16 bytes of T, read and written in one access; the address is a multiple of 16.
template <typename T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};

template <typename T>
PYRLHF_DEVICE Pack<T> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T>*>(from);
}

template <typename T>
PYRLHF_DEVICE void store_pack(T* to, const Pack<T>& pack) {
    *reinterpret_cast<Pack<T>*>(to) = pack;
}

// Whether all of these lie on 16 bytes; null does.
template <typename... Pointers>
bool on_16_bytes(const Pointers*... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Copies 4, 8 or 16 bytes from global to shared memory without waiting; both addresses are multiples of that size.
// Where wanted is false the place is filled with zeros and nothing is read. close_async() ends a group of copies;
// wait_async<N>() waits until this thread has at most N groups under way. Other threads see the bytes after a barrier
// that follows the wait.
#if defined(__CUDACC__)
template <int bytes>
PYRLHF_DEVICE void copy_async(void* to, const void* from, bool wanted = true) {
    const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    const int size = wanted ? bytes : 0;
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(size) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(place), "l"(from), "r"(size), "n"(bytes)
                     : "memory");
    }
}
PYRLHF_DEVICE void close_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left>
PYRLHF_DEVICE void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}
#else
template <int bytes>
void copy_async(void* to, const void* from, bool wanted = true) {
    emulation::copy_later(to, from, wanted ? bytes : 0, wanted ? 0 : bytes);
}
inline void close_async() { emulation::close_copies(); }
template <int groups_left>
void wait_async() {
    emulation::wait_for_copies(groups_left);
}
#endif

PYRLHF_DEVICE void raise_fault(int32_t* faults, Fault fault) { faults[static_cast<int>(fault)] = 1; }

// --- Sums in a fixed order ---

template <typename T>
PYRLHF_DEVICE T warp_sum(T x) {
    for (int step = warp_size / 2; step > 0; step /= 2) x += __shfl_xor_sync(all_lanes, x, step);
    return x;
}

PYRLHF_DEVICE float warp_max(float x) {
    for (int step = warp_size / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(all_lanes, x, step));
    return x;
}

// The sum over the block, the same bits in every thread. All threads call it; scratch is free again when it returns.
template <int threads, typename T>
PYRLHF_DEVICE T block_sum(T x, T (&scratch)[threads / warp_size]) {
    x = warp_sum(x);
    if constexpr (threads > warp_size) {
        if (threadIdx.x % warp_size == 0) scratch[threadIdx.x / warp_size] = x;
        __syncthreads();
        x = scratch[0];
        for (int w = 1; w < threads / warp_size; ++w) x += scratch[w];
        __syncthreads();
    }
    return x;
}

}  // namespace cuda
}  // namespace pyrlhf
