// The training kernels on the CPU, for Python.
#include "../common/bn_op_bindings.h"
#include "../common/max_pool_bindings.h"
#include "device.h"

namespace rf {

void register_cpu_training(py::module_& m) {
  register_bn<Cpu>(m);
  register_bn_ops<Cpu>(m);
  register_max_pool_training<Cpu>(m);
}

}  // namespace rf
