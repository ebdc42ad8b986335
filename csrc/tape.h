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
    // How a call went: well, without the memory it needed, or else the number of the row that was wrong.
    static constexpr int64_t done = -1, no_memory = -2;

    // From now on a tape can hold calls of this function. It returns nothing, whether it had the memory it needed, or
    // the number of the first wrong row, -1 where there is none.
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

    // Makes the calls in order, up to the first that does not go well.
    int64_t run() const {
        for (const Call& call : calls_)
            if (const int64_t outcome = call(); outcome != done) return outcome;
        return done;
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
