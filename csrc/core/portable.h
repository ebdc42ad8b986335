// What host and device code share: the function attributes.
// always_inline is for the linker, not for speed: a shared inline function that is compiled once an instruction set
// would otherwise be merged into one copy, perhaps the AVX-512 one, on a CPU that lacks it.
#pragma once

#if defined(__CUDACC__)
#    define PYRLHF_HD __host__ __device__ __forceinline__
#else
#    define PYRLHF_HD inline __attribute__((always_inline))
#endif
