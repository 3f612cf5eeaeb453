// The CUDA kernels for Python, as the submodule `cuda` of the extension. Every function
// takes the stream's handle last and returns when its kernels are in the stream.
#include "../common/bn_pool_bindings.h"
#include "kernels.h"

namespace rf {
namespace cuda {
void register_conv_bn_act(py::module_& m);
void register_stem(py::module_& m);
}
namespace {

struct Cuda {
  static constexpr bool kMakesVectors = true;
  static DType dtype(const std::string& name) { return parse_dtype(name); }
  static size_t scratch_bytes(int64_t rows, int64_t c, int doubles) {
    return cuda::reduction_scratch_bytes(rows, c, doubles);
  }
  template <class Args>
  static void run(DType dtype, const Args& args, cuda::Stream stream) {
    cuda::launch(dtype, args, stream);
  }
  template <class Args>
  static void run(const Args& args, cuda::Stream stream) {
    cuda::launch(args, stream);
  }
};

}  // namespace

void register_cuda(py::module_& extension) {
  using py::arg;
  py::module_ m = extension.def_submodule("cuda");
  m.attr("archs") = RF_CUDA_ARCHS;
  m.def("fault", &cuda::fault, "Why CUDA cannot be used here, in the driver's own words, or None.");
  register_bn<Cuda, cuda::Stream>(m, arg("stream"));
  register_bn_ops<Cuda, cuda::Stream>(m, arg("stream"));
  register_max_pool_training<Cuda, cuda::Stream>(m, arg("stream"));
  register_bn_pool<Cuda, cuda::Stream>(m, arg("stream"));
  cuda::register_stem(m);
#ifdef RF_SM90
  cuda::register_conv_bn_act(m);
#endif
}

}  // namespace rf
