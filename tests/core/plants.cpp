// Tests that are wrong on purpose: tests/test_core_sanitized.py runs each one and sees it found. Those about memory ask
// a kernel for more than its arrays hold, so that they also show that the kernels themselves are watched.
#include <limits>

#include "buffer.h"
#include "check.h"
#include "cpu/dispatch.h"

using namespace core_tests;

namespace {

// gae over `tokens` tokens of one sequence, from and to the arrays given.
void gae(const float* rewards, const float* values, float* advantages, float* returns, int64_t tokens) {
    const Buffer<int32_t> cu(2, [tokens](int64_t i) { return i == 0 ? 0 : static_cast<int32_t>(tokens); });
    pyrlhf::cpu().gae(rewards, values, cu.data(), nullptr, advantages, returns, 1, 1.0f, 0.95f, 1);
}

float zero(int64_t) { return 0.0f; }

template <typename T>
T* volatile_pointer(T* p) {  // the compiler does not know where it points
    T* volatile hidden = p;
    return hidden;
}

}  // namespace

// 64 tokens are whole vectors everywhere; 3 are the tail alone.
PLANT(read_after_in_a_vector) {
    Buffer<float> rewards(63, zero), values(64, zero), advantages(64), returns(64);
    gae(rewards.data(), values.data(), advantages.data(), returns.data(), 64);
}

PLANT(read_after_in_a_tail) {
    Buffer<float> rewards(3, zero), values(2, zero), advantages(3), returns(3);
    gae(rewards.data(), values.data(), advantages.data(), returns.data(), 3);
}

PLANT(read_before) {
    Buffer<float> rewards(64, zero), values(63, zero), advantages(64), returns(64);
    gae(rewards.data(), values.data() - 1, advantages.data(), returns.data(), 64);
}

PLANT(write_after) {
    Buffer<float> rewards(64, zero), values(64, zero), advantages(63), returns(64);
    gae(rewards.data(), values.data(), advantages.data(), returns.data(), 64);
}

// Inside one allocation, where neither AddressSanitizer nor a page sees it.
PLANT(write_before_in_the_same_allocation) {
    if (place() != Place::heap_plus_1) return;
    Buffer<float> rewards(3, zero), values(3, zero), advantages(2), returns(3);
    gae(rewards.data(), values.data(), advantages.data() - 1, returns.data(), 3);
}

PLANT(misaligned_pointer) {
    Buffer<char> bytes(3 * sizeof(float) + 1, [](int64_t) { return '\0'; });
    Buffer<float> values(3, zero), advantages(3), returns(3);
    const char* odd = bytes.data() + (reinterpret_cast<uintptr_t>(bytes.data()) % 2 == 0);
    gae(reinterpret_cast<const float*>(odd), values.data(), advantages.data(), returns.data(), 3);
}

PLANT(signed_overflow) {
    volatile int most = std::numeric_limits<int>::max();
    most = most + 1;
}

PLANT(leak) { *volatile_pointer(new char[100]) = 1; }

PLANT(wrong_value) { CHECK_NEAR(1.0, 1.1, 0.01); }

PLANT(unwritten_output) {
    const Buffer<float> out(5);
    for (int64_t i = 0; i < out.size(); ++i) CHECK_NEAR(out[i], 0.0, 1e30);
}
