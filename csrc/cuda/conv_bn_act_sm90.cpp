// Hopper's 1x1 convolution from Python: the arguments checked, then the chosen kernel put on a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "conv_bn_act.h"
#include "half_bindings.h"

namespace py = pybind11;

namespace rf::cuda {
namespace {

constexpr size_t kAlignment = 16;  // of every map, for TMA

const ConvKernel* const kKernels[] = {gemm, gemm_add};

const ConvKernel& find(DType dtype, const std::string& name) {
  for (const ConvKernel* kernel : kKernels)
    for (int i = 0; i < 2; ++i)
      if (kernel[i].dtype == dtype && name == kernel[i].name) return kernel[i];
  fail("kernel: unknown name " + name);
}

// The sizes of a call, without its addresses. CUTLASS counts in 32 bits.
ConvArgs sized(int64_t pixels, int64_t c, int64_t o) {
  const int64_t most = std::numeric_limits<int32_t>::max();
  need("pixels", pixels, 1, most);
  need("c", c, 1, most);
  need("o", o, 1, most);
  ConvArgs args{};
  args.pixels = pixels;
  args.c = c;
  args.o = o;
  return args;
}

// Why a kernel does not take a convolution, or nothing. CUTLASS has the last word.
std::string decline(const ConvKernel& kernel, const ConvArgs& args) {
  if (args.c % kChannelStep || args.o % kChannelStep)
    return "takes channels in multiples of 8, got (" + std::to_string(args.c) + ", " +
           std::to_string(args.o) + ")";
  if (!kernel.can_implement(args)) return std::string("CUTLASS cannot implement it as ") + kernel.name;
  return "";
}

std::vector<std::string> kernels() {
  std::vector<std::string> found;
  for (const ConvKernel* k : kKernels) found.emplace_back(k->name);
  return found;
}

std::optional<std::string> declines(const std::string& dtype, const std::string& kernel,
                                    int64_t pixels, int64_t c, int64_t o) {
  const ConvKernel& k = find(half_precision(dtype), kernel);
  try {
    const std::string reason = decline(k, sized(pixels, c, o));
    return reason.empty() ? std::nullopt : std::optional(reason);
  } catch (const std::invalid_argument& beyond_any_kernel) {
    return beyond_any_kernel.what();
  }
}

size_t workspace_bytes(const std::string& dtype, const std::string& kernel, int64_t pixels, int64_t c,
                       int64_t o) {
  return find(half_precision(dtype), kernel).workspace_bytes(sized(pixels, c, o));
}

void conv_bn_act(uintptr_t x, uintptr_t weight, uintptr_t scale, uintptr_t shift, uintptr_t residual,
                 uintptr_t y, uintptr_t workspace, size_t workspace_size, const std::string& dtype,
                 const std::string& kernel, int64_t pixels, int64_t c, int64_t o, bool relu,
                 Stream stream) {
  const ConvKernel& k = find(half_precision(dtype), kernel);
  ConvArgs args = sized(pixels, c, o);
  const std::string reason = decline(k, args);
  if (!reason.empty()) fail("kernel: " + kernel + " " + reason);
  const double elements = double(pixels) * o;
  const Block out = half_map("y", y, elements, kAlignment);
  need_apart(out, half_map("x", x, double(pixels) * c, kAlignment));
  need_apart(out, half_map("weight", weight, double(o) * c, kAlignment));
  if (residual) need_same_or_apart(out, half_map("residual", residual, elements, kAlignment));
  args.x = pointer<const void>(x);
  args.weight = pointer<const void>(weight);
  args.scale = float_vector("scale", scale);
  args.shift = float_vector("shift", shift);
  args.residual = pointer<const void>(residual);
  args.y = pointer<void>(y);
  args.relu = relu;
  const size_t least = k.workspace_bytes(args);
  if (workspace_size < least) fail("workspace_bytes: expected at least " + std::to_string(least));
  if (workspace_size) need_block({"workspace", workspace, workspace_size}, kAlignment);
  py::gil_scoped_release release;
  k.run(args, pointer<void>(workspace), stream);
}

}  // namespace

void register_conv_bn_act(py::module_& m) {
  using py::arg;
  m.def("conv_bn_act_kernels", &kernels,
        "The kernels' names. There is one of each in either dtype.");
  m.def("conv_bn_act_declines", &declines, arg("dtype"), arg("kernel"), arg("pixels"), arg("c"),
        arg("o"), "Why a kernel does not take these sizes in 'bfloat16' or 'float16', or None.");
  m.def("conv_bn_act_workspace_bytes", &workspace_bytes, arg("dtype"), arg("kernel"), arg("pixels"),
        arg("c"), arg("o"), "Bytes of device memory that a call needs beside its maps.");
  m.def("conv_bn_act", &conv_bn_act, arg("x"), arg("weight"), arg("scale"), arg("shift"),
        arg("residual"), arg("y"), arg("workspace"), arg("workspace_bytes"), arg("dtype"),
        arg("kernel"), arg("pixels"), arg("c"), arg("o"), arg("relu"), arg("stream"),
        "y = act(conv(x, weight) * scale + shift + residual), act = ReLU or nothing, by 1x1 of\n"
        "stride 1.\n\n"
        "x (pixels, c), residual and y (pixels, o) are dense in dtype, weight (o, c), all 16-byte\n"
        "aligned; scale and shift float32. 0 leaves out scale, shift or residual. y may be the\n"
        "residual itself.");
}

}  // namespace rf::cuda
