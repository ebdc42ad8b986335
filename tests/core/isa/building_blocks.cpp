#include "building_blocks.h"

#include "cpu/tile.h"

namespace pyrlhf {
namespace PYRLHF_ISA {
namespace {

vi load_lanes(const uint32_t* p) {
    vi out;
    memcpy(&out, p, sizeof(out));
    return out;
}

template <typename Unit, typename Lane>
void multiply_any(int into, float* c, const Lane* a, const Lane* b, int64_t rows, int64_t vectors, int64_t depth,
                  const core_tests::TileStrides& s, const float* factors) {
    const Strides at = {s.a_row, s.a_k, s.b_row, s.c_row};
    const Unit* const left = reinterpret_cast<const Unit*>(a);
    const Unit* const right = reinterpret_cast<const Unit*>(b);
    if (into == core_tests::into_replace) multiply<Into::replace>(c, left, right, rows, vectors, depth, at);
    if (into == core_tests::into_add) multiply<Into::add>(c, left, right, rows, vectors, depth, at);
    if (into == core_tests::into_scale_and_add)
        multiply<Into::scale_and_add>(c, left, right, rows, vectors, depth, at, factors);
}

void pairs_of(const float* even, const float* odd, uint32_t* pairs) {
    store_units(pairs, to_pairs(load(even), load(odd)));
}
void round_lanes(const float* from, bf16* to) { store(to, load(from), Whole{}); }
void exp2_lanes(const float* from, float* to) { store(to, exp2_small(load(from))); }

void zip_lanes(const uint32_t* a, const uint32_t* b, uint32_t* to) {
    store_units(to, zip_low(load_lanes(a), load_lanes(b)));
    store_units(to + W, zip_high(load_lanes(a), load_lanes(b)));
}
void transpose_rows(const uint32_t* from, uint32_t* to) {
    vi rows[W];
    for (int i = 0; i < W; ++i) rows[i] = load_lanes(from + i * W);
    transpose(rows);
    for (int i = 0; i < W; ++i) store_units(to + i * W, rows[i]);
}
template <typename Unit, typename Lane>
void transpose_any(const Lane* from, int64_t from_row, int64_t rows, int64_t columns, Lane* to, int64_t to_row) {
    transpose(reinterpret_cast<const Unit*>(from), from_row, rows, columns, reinterpret_cast<Unit*>(to), to_row);
}

}  // namespace

extern const core_tests::BuildingBlocks building_blocks = {W,
                                                           tile_rows,
                                                           tile_vectors,
                                                           &multiply_any<float, float>,
                                                           &multiply_any<pair, uint32_t>,
                                                           &pairs_of,
                                                           &round_lanes,
                                                           &exp2_lanes,
                                                           &zip_lanes,
                                                           &transpose_rows,
                                                           &transpose_any<float, float>,
                                                           &transpose_any<pair, uint32_t>};

}  // namespace PYRLHF_ISA
}  // namespace pyrlhf
