// Which instruction set runs: the best by default, any that is here on request, and a refusal that says what there is.
#include <algorithm>
#include <stdexcept>

#include "check.h"
#include "cpu/dispatch.h"

using namespace core_tests;
using namespace pyrlhf;

namespace {

const std::string chosen_at_start = isa();  // before any test sets one

bool holds(const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

std::string refusal(const std::string& name) {
    try {
        set_isa(name);
    } catch (const std::invalid_argument& error) {
        return error.what();
    }
    return "accepted";
}

// A kernel's address in each table: tables that shared one would run the wrong instruction set.
std::vector<const void*> addresses() {
    const CpuKernels kernels = cpu();
    std::vector<const void*> out;
#define ADDRESS(name, result, arguments) out.push_back(reinterpret_cast<const void*>(kernels.name));
    PYRLHF_CPU_KERNELS(ADDRESS)
#undef ADDRESS
    return out;
}

}  // namespace

TEST(the_best_instruction_set_is_the_default) { CHECK_EQUAL(chosen_at_start, isas_available().back()); }

TEST(generic_is_always_here_and_what_is_here_was_built) {
    CHECK_EQUAL(isas_built().front(), "generic");
    CHECK_EQUAL(isas_available().front(), "generic");
    for (const std::string& name : isas_available()) CHECK(holds(isas_built(), name));
}

TEST(every_instruction_set_has_kernels_of_its_own) {
    std::vector<const void*> seen;
    for (const std::string& name : isas_available()) {
        set_isa(name);
        CHECK_EQUAL(isa(), name);
        for (const void* address : addresses()) {
            CHECK(address != nullptr);
            CHECK(std::find(seen.begin(), seen.end(), address) == seen.end());
            seen.push_back(address);
        }
    }
}

TEST(a_refused_instruction_set_changes_nothing) {
    const std::string before = isa();
    for (const char* name : {"", "avx9000", "Generic", "generic "}) {
        Note note("'", name, "'");
        const std::string said = refusal(name);
        CHECK(said.find("not an instruction set of this build") != std::string::npos);
        for (const std::string& built : isas_built()) CHECK(said.find(built) != std::string::npos);
        CHECK_EQUAL(isa(), before);
    }
    for (const std::string& name : isas_built()) {
        if (holds(isas_available(), name)) continue;
        CHECK(refusal(name).find("this CPU does not have that instruction set") != std::string::npos);
        CHECK_EQUAL(isa(), before);
    }
}
