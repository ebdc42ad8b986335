# Fails the build if an object compiled for one instruction set defines a function that the linker may share with another
# (a weak symbol outside namespace pyrlhf::<isa>): the merged copy would crash on CPUs without that instruction set.
string(LENGTH "${ISA}" length)
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+ [WVuT] [^\n]+" shared "${symbols}")
  foreach(line IN LISTS shared)
    if(NOT line MATCHES "${length}${ISA}")
      message(FATAL_ERROR "${object} shares a function with other instruction sets: ${line}\n"
        "Make it always_inline, or put it in namespace pyrlhf::PYRLHF_ISA.")
    endif()
  endforeach()
endforeach()
