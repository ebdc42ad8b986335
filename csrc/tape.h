// Calls of the core kept with their arguments, to be made again one after the other without Python between them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace pyrlhf {

class Tape {
  public:
    // How a call went: well; without the memory it needed; well, but there is to be no further round; or else the
    // number of the row that was wrong.
    static constexpr int64_t done = -1, no_memory = -2, halt = -3;

    // From now on a tape can hold calls of this function. It returns nothing, whether it had the memory it needed, or
    // how it went.
    template <typename R, typename... A>
    static void knows(const char* name, R (*function)(A...)) {
        makers()[name] = [=](const pybind11::tuple& given) {
            if (given.size() != sizeof...(A))
                throw pybind11::type_error(std::string(name) + ": expected " + std::to_string(sizeof...(A)) +
                                           " arguments, found " + std::to_string(given.size()));
            return bound(function, given, std::index_sequence_for<A...>{});
        };
    }

    // Of (name, arguments).
    explicit Tape(const std::vector<std::pair<std::string, pybind11::tuple>>& calls) {
        for (const auto& [name, arguments] : calls) {
            const auto maker = makers().find(name);
            if (maker == makers().end()) throw pybind11::key_error("no call of " + name + " can be kept on a tape");
            calls_.push_back(maker->second(arguments));
        }
    }

    // Makes the calls of all tapes in order, the whole so many times: the rest of a round after a call that halts, no
    // more after one that does not go well. How many rounds were made, and how the last call went.
    static std::pair<int64_t, int64_t> run(const std::vector<const Tape*>& tapes, int64_t times) {
        int64_t rounds = 0;
        for (bool halted = false; rounds < times && !halted; ++rounds)
            for (const Tape* tape : tapes)
                for (const Call& call : tape->calls_) {
                    const int64_t outcome = call();
                    if (outcome != done && outcome != halt) return {rounds, outcome};
                    halted = halted || outcome == halt;
                }
        return {rounds, done};
    }

  private:
    using Call = std::function<int64_t()>;
    using Maker = std::function<Call(const pybind11::tuple&)>;

    static std::unordered_map<std::string, Maker>& makers() {
        static std::unordered_map<std::string, Maker> all;
        return all;
    }

    template <typename R, typename... A, size_t... I>
    static Call bound(R (*function)(A...), const pybind11::tuple& given, std::index_sequence<I...>) {
        return [function, kept = std::tuple<std::decay_t<A>...>(given[I].cast<std::decay_t<A>>()...)]() -> int64_t {
            if constexpr (std::is_void_v<R>) {
                std::apply(function, kept);
                return done;
            } else if constexpr (std::is_same_v<R, bool>) {
                return std::apply(function, kept) ? done : no_memory;
            } else {
                return std::apply(function, kept);
            }
        };
    }

    std::vector<Call> calls_;
};

}  // namespace pyrlhf
