// What csrc/cpu/simd.h and tile.h offer to the kernels, as a table a test can call. building_blocks.cpp is compiled
// once an instruction set, as the kernels are, and the tests once: no code that they share may need an instruction set.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace core_tests {

// A product's strides, in elements; the same as the kernels' own.
struct TileStrides {
    int64_t a_row, a_k, b_row, c_row;
};

// Into in csrc/cpu/tile.h.
enum { into_replace, into_add, into_scale_and_add };

// Pointers to `width` lanes, or as said. A pair of bfloat16 is an integer here.
struct BuildingBlocks {
    int width, tile_rows, tile_vectors;

    void (*multiply)(int into, float* c, const float* a, const float* b, int64_t rows, int64_t vectors, int64_t depth,
                     const TileStrides& at, const float* factors);
    void (*multiply_pairs)(int into, float* c, const uint32_t* a, const uint32_t* b, int64_t rows, int64_t vectors,
                           int64_t depth, const TileStrides& at, const float* factors);
    void (*to_pairs)(const float* even, const float* odd, uint32_t* pairs);
    void (*store_rounded)(const float* from, pyrlhf::bf16* to);
    void (*exp2_small)(const float* from, float* to);
    void (*zip)(const uint32_t* a, const uint32_t* b, uint32_t* to);  // to[2 * width]
    void (*transpose_square)(const uint32_t* from, uint32_t* to);     // [width][width]
    void (*transpose)(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row);
    void (*transpose_pairs)(const uint32_t* from, int64_t from_row, int64_t rows, int64_t columns, uint32_t* to,
                            int64_t to_row);
};

}  // namespace core_tests

// Constants, so that nothing runs before an instruction set is chosen.
#define BUILDING_BLOCKS_OF(isa)                              \
    namespace pyrlhf {                                       \
    namespace isa {                                          \
    extern const core_tests::BuildingBlocks building_blocks; \
    }                                                        \
    }
BUILDING_BLOCKS_OF(generic)
BUILDING_BLOCKS_OF(avx2)
BUILDING_BLOCKS_OF(avx512)
BUILDING_BLOCKS_OF(avx512_bf16)
#undef BUILDING_BLOCKS_OF
