// Compiled without instruction-set flags: it runs on any CPU before a choice is made.
#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

namespace pyrlhf {
namespace {

#define PYRLHF_ENTRY(name, result, arguments) &PYRLHF_TABLE_NAMESPACE::name,

#define PYRLHF_TABLE_NAMESPACE generic
const CpuKernels generic_kernels = {PYRLHF_CPU_KERNELS(PYRLHF_ENTRY)};
#undef PYRLHF_TABLE_NAMESPACE

bool always() { return true; }

#if defined(PYRLHF_X86)
#    define PYRLHF_TABLE_NAMESPACE avx2
const CpuKernels avx2_kernels = {PYRLHF_CPU_KERNELS(PYRLHF_ENTRY)};
#    undef PYRLHF_TABLE_NAMESPACE
#    define PYRLHF_TABLE_NAMESPACE avx512
const CpuKernels avx512_kernels = {PYRLHF_CPU_KERNELS(PYRLHF_ENTRY)};
#    undef PYRLHF_TABLE_NAMESPACE
#    define PYRLHF_TABLE_NAMESPACE avx512_bf16
const CpuKernels avx512_bf16_kernels = {PYRLHF_CPU_KERNELS(PYRLHF_ENTRY)};
#    undef PYRLHF_TABLE_NAMESPACE

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

struct Isa {
    const char* name;
    const CpuKernels* kernels;
    bool (*runs_here)();
};

const Isa isas[] = {
    {"generic", &generic_kernels, always},
#if defined(PYRLHF_X86)
    {"avx2", &avx2_kernels, has_avx2},
    {"avx512", &avx512_kernels, has_avx512},
    {"avx512_bf16", &avx512_bf16_kernels, has_avx512_bf16},
#endif
};

const Isa* best() {
    const Isa* found = &isas[0];
    for (const Isa& each : isas)
        if (each.runs_here()) found = &each;
    return found;
}

std::atomic<const Isa*>& current() {
    static std::atomic<const Isa*> chosen{best()};
    return chosen;
}

std::string joined(const std::vector<std::string>& names) {
    std::string out;
    for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
    return out;
}

}  // namespace

const CpuKernels& cpu() { return *current().load(std::memory_order_relaxed)->kernels; }

std::string isa() { return current().load()->name; }

std::vector<std::string> isas_built() {
    std::vector<std::string> names;
    for (const Isa& each : isas) names.emplace_back(each.name);
    return names;
}

std::vector<std::string> isas_available() {
    std::vector<std::string> names;
    for (const Isa& each : isas)
        if (each.runs_here()) names.emplace_back(each.name);
    return names;
}

void set_isa(const std::string& name) {
    for (const Isa& each : isas) {
        if (name != each.name) continue;
        if (!each.runs_here())
            throw std::invalid_argument("PYRLHF_ISA=" + name +
                                        ": this CPU does not have that instruction set; it has " +
                                        joined(isas_available()));
        current().store(&each);
        return;
    }
    throw std::invalid_argument("PYRLHF_ISA=" + name + " is not an instruction set of this build; it has " +
                                joined(isas_built()));
}

}  // namespace pyrlhf
