// The tensor cores' product of 16-bit floats, D = A B + C with A 16 x 16, B 16 x 8, C and D 16 x 8 in float32, and the
// loads that lay out its operands. A warp calls each function together. What a lane holds, g = lane / 4, t = lane % 4,
// a register being two 16-bit floats, the lower half first (PTX ISA, "mma.m16n8k16"):
//   A  a[0] = (g, 2t..2t+1)   a[1] = (g + 8, 2t..2t+1)   a[2] = (g, 2t+8..2t+9)   a[3] = (g + 8, 2t+8..2t+9)
//   B  b[0] = (2t..2t+1, g)   b[1] = (2t+8..2t+9, g)
//   C  c[0], c[1] = (g, 2t..2t+1)   c[2], c[3] = (g + 8, 2t..2t+1)
#pragma once

#include "cuda/device.h"

namespace pyrlhf {
namespace cuda {

template <typename T>
PYRLHF_DEVICE float low_half(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair & 0xFFFFu)});
}
template <typename T>
PYRLHF_DEVICE float high_half(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// Registers of four 8 x 8 matrices of 16-bit floats: register i of a lane holds (lane / 4, 2 (lane % 4)..+1) of matrix
// i, or of its transpose.
struct Matrices {
    uint32_t x[4];
};

// Two floats as 16-bit floats in one register: rounded_pair(low, high, T{}). mma: c += a b.
#if defined(__CUDACC__)
PYRLHF_DEVICE uint32_t rounded_pair(float low, float high, bf16) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
PYRLHF_DEVICE uint32_t rounded_pair(float low, float high, f16) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
PYRLHF_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PYRLHF_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Lane 8 i + r names row r of matrix i: 16 bytes in shared memory, on a multiple of 16.
template <bool transposed = false>
PYRLHF_DEVICE Matrices load_matrices(const void* row) {
    Matrices m;
    const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m.x[0]), "=r"(m.x[1]), "=r"(m.x[2]), "=r"(m.x[3])
                     : "r"(place)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(m.x[0]), "=r"(m.x[1]), "=r"(m.x[2]), "=r"(m.x[3])
                     : "r"(place)
                     : "memory");
    return m;
}
#else
template <typename T>
uint32_t rounded_pair(float low, float high, T) {
    return uint32_t{rounded<T>(low).bits} | uint32_t{rounded<T>(high).bits} << 16;
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T, const char* file = __builtin_FILE(),
         int line = __builtin_LINE()) {
    struct Given {
        uint32_t a[4], b[2];
        float c[4];
    } given = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    emulation::warp_exchange(
        all_lanes, &given, &c,
        [](const void* const* all, void* const* found) {
            const auto of = [&](int lane) -> const Given& { return *static_cast<const Given*>(all[lane]); };
            const auto half = [](uint32_t pair, int which) { return which ? high_half<T>(pair) : low_half<T>(pair); };
            float product[16][8];
            for (int m = 0; m < 16; ++m)
                for (int n = 0; n < 8; ++n) {
                    float sum = of(m % 8 * 4 + n / 2).c[m / 8 * 2 + n % 2];
                    for (int k = 0; k < 16; ++k) {
                        const float x = half(of(m % 8 * 4 + k % 8 / 2).a[m / 8 + k / 8 * 2], k % 2);
                        sum += x * half(of(n * 4 + k % 8 / 2).b[k / 8], k % 2);
                    }
                    product[m][n] = sum;
                }
            for (int lane = 0; lane < warp_size; ++lane)
                for (int i = 0; i < 4; ++i)
                    static_cast<float*>(found[lane])[i] = product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        },
        {file, line});
}

template <bool transposed = false>
Matrices load_matrices(const void* row, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    // The lane reads its own row, so that a sanitizer sees an access outside.
    const Pack<uint16_t> mine = load_pack(static_cast<const uint16_t*>(row));
    Matrices m;
    emulation::warp_exchange(all_lanes, &mine, &m,
                             [](const void* const* all, void* const* found) {
                                 const auto element = [&](int matrix, int r, int c) {
                                     return uint32_t{static_cast<const Pack<uint16_t>*>(all[matrix * 8 + r])->at[c]};
                                 };
                                 for (int lane = 0; lane < warp_size; ++lane)
                                     for (int i = 0; i < 4; ++i) {
                                         const int r = lane / 4, c = lane % 4 * 2;
                                         const uint32_t low = transposed ? element(i, c, r) : element(i, r, c);
                                         const uint32_t high = transposed ? element(i, c + 1, r) : element(i, r, c + 1);
                                         static_cast<Matrices*>(found[lane])->x[i] = low | high << 16;
                                     }
                             },
                             {file, line});
    return m;
}
#endif

}  // namespace cuda
}  // namespace pyrlhf
