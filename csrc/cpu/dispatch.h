// Which instruction set runs: the best that this CPU has, unless one is forced.
// Results never depend on the number of threads or on the run. Between instruction sets they may differ in the last
// bits (vector width, fused multiply-add); only sample promises the same bits on all of them.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pyrlhf {

const CpuKernels& cpu();                    // the kernels in use
std::string isa();                          // their instruction set
std::vector<std::string> isas_built();      // in this binary, plainest first
std::vector<std::string> isas_available();  // of these, the ones this CPU has
void set_isa(const std::string& name);      // throws std::invalid_argument naming what is there

}  // namespace pyrlhf
