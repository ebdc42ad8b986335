#include "emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cfenv>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#    include <sanitizer/asan_interface.h>
#    include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t stack_bytes = 256 * 1024;

struct Copy {
    void* to;
    const void* from;
    size_t bytes, zeros;
};

enum class State { ready, at_barrier, in_warp, ended };

// One thread of the block that runs.
struct Fiber {
    ucontext_t context;
    void* stack = nullptr;
    void* fake_stack = nullptr;  // AddressSanitizer's
    State state = State::ready;
    Place place = {};
    Vote vote = Vote::none;
    bool said = false;
    uint32_t mask = 0;
    const void* given = nullptr;
    void* found = nullptr;
    Exchange exchange = nullptr;
    std::vector<std::vector<Copy>> copies;  // groups, the last one still open
};

std::string text(Place place) {
    const std::string file = place.file;
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

class Block {
  public:
    Block(const char* op, int threads, size_t shared_bytes, const std::function<void()>& kernel, std::mt19937& order)
        : op_(op), kernel_(kernel), order_(order), fibers_(static_cast<size_t>(threads)), shared_bytes_(shared_bytes) {
        const size_t bytes = fibers_.size() * stack_bytes;
        stacks_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks_ == MAP_FAILED) throw std::bad_alloc();
        for (size_t i = 0; i < fibers_.size(); ++i) fibers_[i].stack = static_cast<char*>(stacks_) + i * stack_bytes;
    }
    ~Block() {
        unpoison();
        munmap(stacks_, fibers_.size() * stack_bytes);
    }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    void run() {
        unpoison();
        // Its own allocation: AddressSanitizer watches both ends. Size 0 has no byte to touch.
        shared_.reset(new unsigned char[shared_bytes_]);
        memset(shared_.get(), 0xFF, shared_bytes_);
        for (Fiber& fiber : fibers_) begin(fiber);
        std::vector<size_t> turns(fibers_.size());
        for (size_t i = 0; i < turns.size(); ++i) turns[i] = i;
        std::vector<bool> held((fibers_.size() + 31) / 32);  // warps that stay behind while others can go on
        const auto hold = [&](bool some) {
            std::generate(held.begin(), held.end(), [&] { return some && order_() % 2; });
        };
        hold(true);
        for (;;) {
            std::shuffle(turns.begin(), turns.end(), order_);
            bool moved = false;
            for (const size_t i : turns) {
                if (fibers_[i].state != State::ready || held[i / 32]) continue;
                moved = true;
                resume(i);
                if (failure_) std::rethrow_exception(failure_);
            }
            if (moved) continue;
            if (std::find(held.begin(), held.end(), true) != held.end()) {
                hold(false);
                continue;
            }
            if (all_of(State::ended)) return;
            release_barrier();
            hold(true);
        }
    }

    void* shared(size_t bytes) {
        if (bytes != shared_bytes_)
            fail("shared memory of " + std::to_string(bytes) + " bytes is used, launched with " +
                 std::to_string(shared_bytes_));
        return shared_.get();
    }

    int barrier(Vote vote, bool mine, Place place) {
        Fiber& fiber = *now_;
        fiber.vote = vote;
        fiber.said = mine;
        fiber.place = place;
        wait(State::at_barrier);
        return answer_;
    }

    void warp(uint32_t mask, const void* given, void* found, Exchange exchange, Place place) {
        Fiber& fiber = *now_;
        const size_t index = static_cast<size_t>(now_ - fibers_.data()), first = index / 32 * 32;
        if (!(mask >> (index - first) & 1)) fail("a lane outside its own mask at " + text(place));
        fiber.mask = mask;
        fiber.given = given;
        fiber.found = found;
        fiber.exchange = exchange;
        fiber.place = place;
        fiber.state = State::in_warp;
        if (meet(first, mask, place)) {
            if (exchange) {
                const void* all_given[32] = {};
                void* all_found[32] = {};
                for_lanes(first, mask, [&](size_t lane, Fiber& other) {
                    all_given[lane] = other.given;
                    all_found[lane] = other.found;
                });
                exchange(all_given, all_found);
            }
            for_lanes(first, mask, [](size_t, Fiber& other) { other.state = State::ready; });
        }
        // Also the last one to come waits: the others' turn may come first.
        yield();
    }

    Fiber& now() { return *now_; }

    [[noreturn]] void fail(const std::string& what) const {
        throw std::runtime_error("emulated " + std::string(op_) + ": " + what + ", block (" +
                                 std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "), thread " +
                                 std::to_string(threadIdx.x));
    }

  private:
    void begin(Fiber& fiber) {
        void* stack = fiber.stack;
        fiber = Fiber{};
        fiber.stack = stack;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stack;
        fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = nullptr;
        const auto self = reinterpret_cast<uintptr_t>(this);
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 2, static_cast<unsigned>(self >> 32),
                    static_cast<unsigned>(self));
    }

    static void enter(unsigned high, unsigned low) {
        Block& block = *reinterpret_cast<Block*>(uintptr_t{high} << 32 | low);
        block.arrived(nullptr);
        try {
            block.kernel_();
        } catch (...) {
            block.failure_ = std::current_exception();
        }
        block.now_->state = State::ended;
        block.leave(nullptr);
        abort();
    }

    void resume(size_t i) {
        now_ = &fibers_[i];
        threadIdx = dim3(static_cast<unsigned>(i));
#if defined(__SANITIZE_ADDRESS__)
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, now_->stack, stack_bytes);
        swapcontext(&scheduler_, &now_->context);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
        swapcontext(&scheduler_, &now_->context);
#endif
    }

    void wait(State state) {
        now_->state = state;
        yield();
    }

    void yield() {
        Fiber& fiber = *now_;
        leave(&fiber.fake_stack);
        arrived(fiber.fake_stack);
    }

    void leave([[maybe_unused]] void** keep) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(keep, scheduler_stack_, scheduler_bytes_);
#endif
        swapcontext(&now_->context, &scheduler_);
    }

    void arrived([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_bytes_);
#endif
    }

    void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stacks_, fibers_.size() * stack_bytes);
#endif
    }

    template <typename F>
    void for_lanes(size_t first, uint32_t mask, F&& f) {
        for (size_t lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1 && first + lane < fibers_.size()) f(lane, fibers_[first + lane]);
    }

    // Whether every lane of the mask waits in this exchange.
    bool meet(size_t first, uint32_t mask, Place place) {
        bool all = true;
        for_lanes(first, mask, [&](size_t lane, Fiber& other) {
            if (other.state == State::ended)
                fail("lane " + std::to_string(lane) + " has ended, others wait for it at " + text(place));
            if (other.state != State::in_warp) {
                all = false;
            } else if (other.mask != mask || other.exchange != now_->exchange || other.place.line != place.line) {
                fail("lanes of one warp meet at " + text(other.place) + " and at " + text(place));
            }
        });
        return all;
    }

    bool all_of(State state) const {
        return std::all_of(fibers_.begin(), fibers_.end(), [&](const Fiber& f) { return f.state == state; });
    }

    // Nobody can go on: all wait at one barrier, or something is wrong.
    void release_barrier() {
        const Fiber& one =
            *std::find_if(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return f.state != State::ended; });
        for (size_t i = 0; i < fibers_.size(); ++i) {
            const Fiber& fiber = fibers_[i];
            if (fiber.state == one.state && one.state == State::at_barrier && fiber.place.line == one.place.line)
                continue;
            threadIdx = dim3(static_cast<unsigned>(i));
            fail(fiber.state == State::ended
                     ? "a thread has ended, others wait at " + text(one.place)
                     : "threads wait for ever, at " + text(one.place) + " and at " + text(fiber.place));
        }
        int count = 0;
        for (const Fiber& fiber : fibers_) count += fiber.said;
        const int threads = static_cast<int>(fibers_.size());
        answer_ = one.vote == Vote::any ? count > 0 : one.vote == Vote::all ? count == threads : count;
        for (Fiber& fiber : fibers_) fiber.state = State::ready;
    }

    const char* op_;
    const std::function<void()>& kernel_;
    std::mt19937& order_;
    std::vector<Fiber> fibers_;
    size_t shared_bytes_;
    std::unique_ptr<unsigned char[]> shared_;
    void* stacks_ = nullptr;
    Fiber* now_ = nullptr;
    int answer_ = 0;
    std::exception_ptr failure_;
    ucontext_t scheduler_;
    [[maybe_unused]] const void* scheduler_stack_ = nullptr;
    [[maybe_unused]] size_t scheduler_bytes_ = 0;
};

Block* block = nullptr;

std::mt19937& thread_order() {
    static const char* seed = getenv("PYRLHF_EMULATION_SEED");
    static std::mt19937 order(seed ? static_cast<unsigned>(atoi(seed)) : 1u);
    return order;
}

}  // namespace

void launch(const char* op, dim3 blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    if (threads < 1 || threads > 1024 || blocks.x < 1 || blocks.y < 1 || blocks.z < 1 || blocks.y > 65535 ||
        blocks.z > 65535 || blocks.x > 0x7FFFFFFF || shared_bytes > 227 * 1024)
        throw std::runtime_error("emulated " + std::string(op) + ": invalid configuration argument");
    gridDim = blocks;
    blockDim = dim3(static_cast<unsigned>(threads));
    Block running(op, threads, shared_bytes, kernel, thread_order());
    block = &running;
    for (unsigned z = 0; z < blocks.z; ++z)
        for (unsigned y = 0; y < blocks.y; ++y)
            for (unsigned x = 0; x < blocks.x; ++x) {
                blockIdx = dim3(x, y, z);
                running.run();
            }
    block = nullptr;
}

void* shared_memory(size_t bytes) { return block->shared(bytes); }

int block_barrier(Vote vote, bool mine, Place place) { return block->barrier(vote, mine, place); }

void warp_exchange(uint32_t mask, const void* given, void* found, Exchange exchange, Place place) {
    block->warp(mask, given, found, exchange, place);
}

uint32_t ballot(uint32_t mask, bool mine, Place place) {
    uint32_t out = 0;
    warp_exchange(
        mask, &mine, &out,
        [](const void* const* given, void* const* found) {
            uint32_t bits = 0;
            for (int lane = 0; lane < 32; ++lane)
                if (given[lane] && *static_cast<const bool*>(given[lane])) bits |= 1u << lane;
            for (int lane = 0; lane < 32; ++lane)
                if (found[lane]) *static_cast<uint32_t*>(found[lane]) = bits;
        },
        place);
    return out;
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
    auto& copies = block->now().copies;
    if (copies.empty()) copies.emplace_back();
    copies.back().push_back({to, from, bytes, zeros});
}

void close_copies() {
    auto& copies = block->now().copies;
    if (copies.empty()) copies.emplace_back();
    copies.emplace_back();
}

void wait_for_copies(int groups_left) {
    auto& copies = block->now().copies;
    while (static_cast<int>(copies.size()) - 1 > groups_left) {  // the open group is not counted
        for (const Copy& copy : copies.front()) {
            memcpy(copy.to, copy.from, copy.bytes);
            memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
        }
        copies.erase(copies.begin());
    }
}

float half_to_float(uint16_t bits) { return static_cast<float>(same_bits<_Float16>(bits)); }

uint16_t float_to_half(float x) { return same_bits<uint16_t>(static_cast<_Float16>(x)); }

uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = same_bits<uint32_t>(x);
    if (x != x) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulation

float __fadd_rz(float a, float b) {
    volatile float x = a, y = b;  // read and written between the changes of rounding
    fesetround(FE_TOWARDZERO);
    volatile float sum = x + y;
    fesetround(FE_TONEAREST);
    return sum;
}

float __fmaf_rz(float a, float b, float c) {
    volatile float x = a, y = b, z = c;
    fesetround(FE_TOWARDZERO);
    volatile float sum = fmaf(x, y, z);
    fesetround(FE_TONEAREST);
    return sum;
}
