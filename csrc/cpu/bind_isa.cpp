#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "isa.h"

namespace rf {

void register_cpu_isa(pybind11::module_& m) {
  m.def("cpu_isa", [] { return cpu::isa_name(cpu::active_isa()); },
        "The instruction set in use: amx_bf16, avx512_bf16, avx512, avx2 or none.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        if (!cpu::set_isa(name.c_str()))
          throw std::invalid_argument("name: expected none, avx2, avx512, avx512_bf16 or amx_bf16, at most " +
                                      std::string(cpu::isa_name(cpu::detected_isa())) +
                                      " on this processor; got " + name);
      },
      pybind11::arg("name"),
      "Lowers the instruction set, for tests. Weights packed under one set serve that set only.");
}

}  // namespace rf
