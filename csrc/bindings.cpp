// The extension module: one line per op. Tensors come in as data pointers (Python ints) and sizes.
#include <pybind11/pybind11.h>

namespace rf {
void register_cpu_isa(pybind11::module_& m);
void register_conv_bn_act(pybind11::module_& m);
void register_conv_backward_weight(pybind11::module_& m);
void register_pool_head(pybind11::module_& m);
void register_memory(pybind11::module_& m);
void register_cpu_training(pybind11::module_& m);
void register_cuda(pybind11::module_& m);
}  // namespace rf

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of resnet_fused. Nothing here knows torch: pointers and sizes only.";
  // One more with every change to what the functions take or do: Python refuses another one's.
  m.attr("interface") = 15;
  rf::register_cpu_isa(m);
  rf::register_conv_bn_act(m);
  rf::register_conv_backward_weight(m);
  rf::register_pool_head(m);
  rf::register_memory(m);
  rf::register_cpu_training(m);
#ifdef RF_CUDA_ARCHS
  rf::register_cuda(m);
#endif
}
