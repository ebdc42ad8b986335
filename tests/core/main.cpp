// Runs the tests: core_tests [--isa NAME] [--place NAME] [--plant NAME | FILTER]
// FILTER is a part of test names. --plant runs one test that is wrong on purpose, to see that it is found.
// The last line says how many passed and failed; a test counts once for each instruction set and place. Exit status: 0
// if some passed and none failed, 1 if not, 2 for a wrong command line.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "buffer.h"
#include "check.h"
#include "cpu/dispatch.h"

#if defined(__SANITIZE_ADDRESS__)
#    include <sanitizer/common_interface_defs.h>
#endif

namespace core_tests {
namespace {

constexpr int shown = 5;  // failures of one run of one test

char running[256] = "";  // the test, instruction set and place: for a signal handler too
int failures = 0;
std::vector<std::string>& notes() {
    static std::vector<std::string> all;
    return all;
}

struct Command {
    std::string isa, place, plant, filter;
};

bool chosen(const std::string& wanted, const std::string& name) { return wanted.empty() || wanted == name; }

bool chosen(const Command& command, const Test& test) {
    if (test.planted || !command.plant.empty()) return test.planted && command.plant == test.name;
    return std::string(test.name).find(command.filter) != std::string::npos;
}

bool passes(const Test& test, const std::string& isa, Place where) {
    std::snprintf(running, sizeof(running), "%s [%s, %s]", test.name, isa.c_str(), name_of(where));
    pyrlhf::set_isa(isa);
    set_place(where);
    failures = 0;
    try {
        test.run();
    } catch (const std::exception& error) {
        fail(test.file, test.line, text("threw ", error.what()));
    }
    if (failures > shown) std::printf("%s: %d more\n", running, failures - shown);
    return failures == 0;
}

void say_where() {
    std::fprintf(stderr, "while running %s\n", running);
    std::fflush(stdout);
}

#if defined(__SANITIZE_ADDRESS__)
void say_where_at_death() { __sanitizer_set_death_callback(say_where); }
#else
void on_signal(int number) {
    say_where();
    std::signal(number, SIG_DFL);
    std::raise(number);
}
void say_where_at_death() {
    for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) std::signal(number, on_signal);
}
#endif

bool parse(int count, char** arguments, Command& command) {
    for (int i = 1; i < count; ++i) {
        const std::string word = arguments[i];
        std::string* value = word == "--isa"     ? &command.isa
                             : word == "--place" ? &command.place
                             : word == "--plant" ? &command.plant
                                                 : nullptr;
        if (!value && (word[0] == '-' || !command.filter.empty())) return false;
        if (value && ++i == count) return false;
        (value ? *value : command.filter) = arguments[i];
    }
    return true;
}

int run(const Command& command) {
    int passed = 0, failed = 0;
    std::string isas;
    for (const std::string& isa : pyrlhf::isas_available()) {
        if (!chosen(command.isa, isa)) continue;
        isas += (isas.empty() ? "" : ", ") + isa;
        for (const Place where : places) {
            if (!chosen(command.place, name_of(where))) continue;
            for (const Test& test : tests())
                if (chosen(command, test)) ++(passes(test, isa, where) ? passed : failed);
        }
    }
    std::snprintf(running, sizeof(running), "nothing: the tests are over");
    std::printf("%d passed, %d failed, on %s\n", passed, failed, isas.c_str());
    return passed > 0 && failed == 0 ? 0 : 1;
}

}  // namespace

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

bool add(const Test& test) {
    tests().push_back(test);
    return true;
}

void push_note(const std::string& text) { notes().push_back(text); }
void pop_note() { notes().pop_back(); }

void fail(const char* file, int line, const std::string& what) {
    if (++failures > shown) return;
    std::string context;
    for (const std::string& note : notes()) context += note + ": ";
    std::printf("%s:%d: %s: %s%s\n", file, line, running, context.c_str(), what.c_str());
}

int width() {
    const std::string isa = pyrlhf::isa();
    return isa == "generic" ? 4 : isa == "avx2" ? 8 : 16;
}

std::vector<int64_t> odd_sizes() {
    const int64_t w = width();
    return {0, 1, 2, w - 1, w, w + 1, 2 * w - 1, 2 * w, 2 * w + 1, 8 * w + 3, 127, 1023};
}

}  // namespace core_tests

int main(int count, char** arguments) {
    core_tests::Command command;
    if (!core_tests::parse(count, arguments, command)) {
        std::fprintf(stderr, "usage: core_tests [--isa NAME] [--place NAME] [--plant NAME | FILTER]\n");
        return 2;
    }
    core_tests::say_where_at_death();
    return core_tests::run(command);
}
