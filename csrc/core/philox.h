// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// A draw is a pure function of (key, counter): no state, so a sample does not know which batch or rank it is in.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace pyrlhf {

struct Philox {
    uint32_t word[4];
};

PYRLHF_HD Philox philox4x32(Philox counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * counter.word[0];
        const uint64_t b = uint64_t{0xCD9E8D57u} * counter.word[2];
        counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                    static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// 62 random bits for (seed, id, position): key = seed, counter = (id, position), both as low and high words.
PYRLHF_HD uint64_t keyed_bits62(uint64_t seed, uint64_t id, uint64_t position) {
    const Philox counter = {{static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32),
                             static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)}};
    const Philox drawn = philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return (uint64_t{drawn.word[0] >> 1} << 31) | (drawn.word[1] >> 1);
}

}  // namespace pyrlhf
