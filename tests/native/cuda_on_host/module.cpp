// The bindings of the CUDA kernels, over the kernels on the host.
#include <pybind11/pybind11.h>

#include "cuda_runtime.h"

namespace rf {
void register_cuda(pybind11::module_& m);
}

PYBIND11_MODULE(_cuda_on_host, m) {
  rf::register_cuda(m);
  m.def("reverse_turns", [](bool reversed) { on_host::reversed = reversed; });
}
