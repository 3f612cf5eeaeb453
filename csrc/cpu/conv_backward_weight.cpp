// conv_backward_weight from Python: the arguments checked, then the kernel run.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../common/conv_bindings.h"
#include "checks.h"

namespace py = pybind11;

namespace rf {
namespace {

const cpu::WeightGradient& find(const ConvShape& s, const std::string& name) {
  if (double(s.c) * s.o * s.kh * s.kw > 1e14) fail("o: the weight is too large");
  for (const auto* a = table_for(s.dtype).conv_backward_weight; a->name; ++a)
    if (name == a->name) {
      if (!a->can_run(s)) fail("algorithm: " + name + " cannot run this shape");
      return *a;
    }
  fail("algorithm: unknown name " + name);
}

size_t scratch_bytes(const std::string& dtype, const std::string& algorithm, int64_t n, int64_t h,
                     int64_t w, int64_t c, int64_t o, int64_t kh, int64_t kw, int64_t sh,
                     int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw, int64_t groups,
                     int threads) {
  const ConvShape s = checked(
      {parse_dtype(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  need("threads", threads, 1, 1 << 16);
  return find(s, algorithm).scratch_bytes(s, threads);
}

bool conv_backward_weight(uintptr_t grad, uintptr_t x, uintptr_t grad_weight, uintptr_t scratch,
                          size_t scratch_size, const std::string& dtype,
                          const std::string& algorithm, int64_t n, int64_t h, int64_t w, int64_t c,
                          int64_t o, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph,
                          int64_t pw, int64_t dh, int64_t dw, int64_t groups, bool channels_last,
                          bool wide, int threads) {
  const ConvShape s = checked(
      {parse_dtype(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  const cpu::WeightGradient& gradient = find(s, algorithm);
  need("threads", threads, 1, 1 << 16);
  const size_t item = itemsize(s.dtype);
  const size_t out_item = wide ? sizeof(float) : item;
  const Block out{"grad_weight", grad_weight, kh * kw * o * s.cg() * out_item};
  const Block work{"scratch", scratch, gradient.scratch_bytes(s, threads)};
  const Block from[] = {{"grad", grad, n * s.oh() * s.ow() * o * item}, {"x", x, n * h * w * c * item}};
  for (const Block& in : from) {
    if (n) need_block(in, item);
    need_apart(out, in);
    need_apart(work, in);
  }
  need_block(out, out_item);
  need_block(work, 64);
  need_apart(work, out);
  if (scratch_size < work.bytes)
    fail("scratch_bytes: expected at least " + std::to_string(work.bytes) + ", got " +
         std::to_string(scratch_size));
  py::gil_scoped_release release;
  return gradient.run({s, pointer<const void>(grad), pointer<const void>(x),
                       pointer<void>(grad_weight), pointer<char>(scratch), threads, channels_last, wide});
}

}  // namespace

void register_conv_backward_weight(py::module_& m) {
  m.def("conv_backward_weight_scratch_bytes", &scratch_bytes, py::arg("dtype"),
        py::arg("algorithm"), RF_SHAPE, py::arg("threads"),
        "Bytes of scratch that conv_backward_weight needs on that many threads.");
  m.def("conv_backward_weight", &conv_backward_weight, py::arg("grad"), py::arg("x"),
        py::arg("grad_weight"), py::arg("scratch"), py::arg("scratch_bytes"), py::arg("dtype"),
        py::arg("algorithm"), RF_SHAPE, py::arg("channels_last"), py::arg("wide"),
        py::arg("threads"),
        "The gradient of a convolution's weight (o, c, kh, kw), summed by 'direct' or, on AMX, 'amx',\n"
        "in one group, or by 'winograd4', 3x3 with stride and dilation 1. False where NaN and infinity are not where they\n"
        "belong, as the transform spreads them.\n\n"
        "grad (n, o, oh, ow) and x (n, c, h, w) are dense NHWC in dtype, grad_weight is channels_last\n"
        "or contiguous, in dtype or, wide, in float32; scratch is 64-byte aligned. The result does not\n"
        "depend on the threads.");
}

}  // namespace rf
