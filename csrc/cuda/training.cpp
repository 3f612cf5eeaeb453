// The CUDA kernels for Python, as the submodule `cuda` of the extension. Every function
// takes the stream's handle last and returns when its kernels are in the stream.
#include "../common/bn_bindings.h"
#include "../common/max_pool_bindings.h"
#include "kernels.h"

namespace rf {
namespace cuda {
void register_conv_bn_act(py::module_& m);
}
namespace {

struct Cuda {
  static DType dtype(const std::string& name) {
    if (name == "float32") return DType::f32;
    if (name == "bfloat16") return DType::bf16;
    if (name == "float16") return DType::f16;
    fail("dtype: expected float32, bfloat16 or float16, got " + name);
  }
  static size_t scratch_bytes(int64_t rows, int64_t c, int doubles) {
    return cuda::reduction_scratch_bytes(rows, c, doubles);
  }
  template <class Args>
  static void run(DType dtype, const Args& args, cuda::Stream stream) {
    cuda::launch(dtype, args, stream);
  }
};

// A vector of c floats; null only where it may be absent.
template <class F>
F* vector(const char* name, uintptr_t address, int64_t c, bool optional = false) {
  if (!address && optional) return nullptr;
  need_block({name, address, c * sizeof(float)}, alignof(float));
  return pointer<F>(address);
}

void bn_scale_shift(uintptr_t mean, uintptr_t var, uintptr_t weight, uintptr_t bias,
                    uintptr_t scale, uintptr_t shift, int64_t c, double eps, cuda::Stream stream) {
  need("c", c, 1, 1 << 24);
  const cuda::ScaleShiftArgs args{vector<const float>("mean", mean, c),
                                  vector<const float>("var", var, c),
                                  vector<const float>("weight", weight, c, true),
                                  vector<const float>("bias", bias, c, true),
                                  vector<float>("scale", scale, c),
                                  vector<float>("shift", shift, c),
                                  c,
                                  (float)eps};
  cuda::launch(args, stream);
}

void bn_gradient_vectors(uintptr_t mean, uintptr_t var, uintptr_t weight, uintptr_t sum_g,
                         uintptr_t sum_gx, uintptr_t a, uintptr_t b, uintptr_t d, int64_t c,
                         double eps, int64_t count, cuda::Stream stream) {
  need("c", c, 1, 1 << 24);
  need("count", count, 1, int64_t(1) << 46);
  const cuda::GradientVectorsArgs args{vector<const float>("mean", mean, c),
                                       vector<const float>("var", var, c),
                                       vector<const float>("weight", weight, c, true),
                                       vector<const float>("sum_g", sum_g, c),
                                       vector<const float>("sum_gx", sum_gx, c),
                                       vector<float>("a", a, c),
                                       vector<float>("b", b, c),
                                       vector<float>("d", d, c),
                                       c,
                                       (float)eps,
                                       (float)count};
  cuda::launch(args, stream);
}

}  // namespace

void register_cuda(py::module_& extension) {
  using py::arg;
  py::module_ m = extension.def_submodule("cuda");
  m.attr("archs") = RF_CUDA_ARCHS;
  m.def("fault", &cuda::fault, "Why CUDA cannot be used here, in the driver's own words, or None.");
  register_bn<Cuda, cuda::Stream>(m, arg("stream"));
  register_max_pool_training<Cuda, cuda::Stream>(m, arg("stream"));
  m.def("bn_scale_shift", &bn_scale_shift, arg("mean"), arg("var"), arg("weight"), arg("bias"),
        arg("scale"), arg("shift"), arg("c"), arg("eps"), arg("stream"),
        "scale = weight / sqrt(var + eps) and shift = bias - mean*scale; weight and bias may be 0.");
  m.def("bn_gradient_vectors", &bn_gradient_vectors, arg("mean"), arg("var"), arg("weight"),
        arg("sum_g"), arg("sum_gx"), arg("a"), arg("b"), arg("d"), arg("c"), arg("eps"),
        arg("count"), arg("stream"), "The a, b and d of bn_act_backward_apply; weight may be 0.");
#ifdef RF_SM90
  cuda::register_conv_bn_act(m);
#endif
}

}  // namespace rf
