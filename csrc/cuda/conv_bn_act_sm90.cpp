// conv_bn_act on Hopper from Python: the arguments checked, then the chosen kernel put on a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/conv_bindings.h"
#include "conv_bn_act.h"
#include "conv_limits.h"
#include "half_bindings.h"

namespace py = pybind11;

namespace rf::cuda {
namespace {

constexpr size_t kAlignment = 16;  // of every map, for TMA

const ConvKernel* const kTiles[] = {im2col_128x128, im2col_128x64, im2col_64x128,
                                    im2col_64x64,   gemm_128x256,  gemm_128x128};

const ConvKernel& find(DType dtype, const std::string& name) {
  for (const ConvKernel* tile : kTiles)
    for (int i = 0; i < 2; ++i)
      if (tile[i].dtype == dtype && name == tile[i].name) return tile[i];
  fail("kernel: unknown name " + name);
}

// Why a kernel does not take a convolution, or nothing. CUTLASS has the last word.
std::string decline(const ConvKernel& kernel, const ConvShape& s) {
  if (s.n == 0) return "takes no empty map";
  const std::string limit = conv_limit(s);
  if (!limit.empty()) return limit;
  if (kernel.pointwise && !is_pointwise(s)) return "takes 1x1 of stride 1 without padding";
  ConvArgs args{};
  args.shape = s;
  if (!kernel.can_implement(args)) return std::string("CUTLASS cannot implement it as ") + kernel.name;
  return "";
}

using Description = std::tuple<std::string, int, int, int, bool>;

std::vector<Description> kernels() {
  std::vector<Description> found;
  for (const ConvKernel* k : kTiles)
    found.emplace_back(k->name, k->tile_m, k->tile_n, k->cluster, k->pointwise);
  return found;
}

std::optional<std::string> declines(const std::string& dtype, const std::string& kernel, int64_t n,
                                    int64_t h, int64_t w, int64_t c, int64_t o, int64_t kh,
                                    int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                                    int64_t dh, int64_t dw, int64_t groups) {
  const ConvShape s{half_precision(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups};
  const ConvKernel& k = find(s.dtype, kernel);
  try {
    const std::string reason = decline(k, checked(s));
    return reason.empty() ? std::nullopt : std::optional(reason);
  } catch (const std::invalid_argument& beyond_any_kernel) {
    return beyond_any_kernel.what();
  }
}

size_t workspace_bytes(const std::string& dtype, const std::string& kernel, int64_t n, int64_t h,
                       int64_t w, int64_t c, int64_t o, int64_t kh, int64_t kw, int64_t sh,
                       int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw, int64_t groups) {
  ConvArgs args{};
  args.shape = checked(
      {half_precision(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  return find(args.shape.dtype, kernel).workspace_bytes(args);
}

void conv_bn_act(uintptr_t x, uintptr_t weight, uintptr_t scale, uintptr_t shift, uintptr_t residual,
                 uintptr_t y, uintptr_t workspace, size_t workspace_size, const std::string& dtype,
                 const std::string& kernel, int64_t n, int64_t h, int64_t w, int64_t c, int64_t o,
                 int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dh,
                 int64_t dw, int64_t groups, bool relu, Stream stream) {
  const ConvShape s = checked(
      {half_precision(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  const ConvKernel& k = find(s.dtype, kernel);
  const std::string reason = decline(k, s);
  if (!reason.empty()) fail("kernel: " + kernel + " " + reason);
  const Block out = half_map("y", y, double(n) * s.oh() * s.ow() * o, kAlignment);
  need_apart(out, half_map("x", x, double(n) * h * w * c, kAlignment));
  need_apart(out, half_map("weight", weight, double(o) * kh * kw * c, kAlignment));
  if (residual) need_same_or_apart(out, half_map("residual", residual, double(n) * s.oh() * s.ow() * o, kAlignment));
  const ConvArgs args{s,
                      pointer<const void>(x),
                      pointer<const void>(weight),
                      float_vector("scale", scale),
                      float_vector("shift", shift),
                      pointer<const void>(residual),
                      pointer<void>(y),
                      relu};
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
        "Each kernel's name, pixels and channels of its tile, blocks of its cluster, and whether it\n"
        "is for 1x1 convolutions of stride 1 alone. There is one of each in either dtype.");
  m.def("conv_bn_act_declines", &declines, arg("dtype"), arg("kernel"), RF_SHAPE,
        "Why a kernel does not take a convolution in 'bfloat16' or 'float16', or None.");
  m.def("conv_bn_act_workspace_bytes", &workspace_bytes, arg("dtype"), arg("kernel"), RF_SHAPE,
        "Bytes of device memory that a call needs beside its maps.");
  m.def("conv_bn_act", &conv_bn_act, arg("x"), arg("weight"), arg("scale"), arg("shift"),
        arg("residual"), arg("y"), arg("workspace"), arg("workspace_bytes"), arg("dtype"),
        arg("kernel"), RF_SHAPE, arg("relu"), arg("stream"),
        "y = act(conv(x, weight) * scale + shift + residual), act = ReLU or nothing.\n\n"
        "x, residual and y are dense NHWC in dtype, weight (o, kh, kw, c), all 16-byte aligned; scale\n"
        "and shift float32. 0 leaves out scale, shift or residual. y may be the residual itself.");
}

}  // namespace rf::cuda
