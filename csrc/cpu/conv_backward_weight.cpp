// conv_backward_weight from Python: the arguments checked, then the kernel run.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <string>

#include "../common/conv_bindings.h"
#include "checks.h"

namespace py = pybind11;

namespace rf {
namespace {

ConvShape shape_of(const std::string& dtype, int64_t n, int64_t h, int64_t w, int64_t c, int64_t o,
                   int64_t ph, int64_t pw) {
  const ConvShape s = checked({parse_dtype(dtype), n, h, w, c, o, 3, 3, 1, 1, ph, pw, 1, 1, 1});
  if (double(c) * o > 1e13) fail("o: the weight is too large");
  return s;
}

size_t scratch_bytes(const std::string& dtype, int64_t n, int64_t h, int64_t w, int64_t c, int64_t o,
                     int64_t ph, int64_t pw, int threads) {
  const ConvShape s = shape_of(dtype, n, h, w, c, o, ph, pw);
  need("threads", threads, 1, 1 << 16);
  return table_for(s.dtype).conv_backward_weight_scratch_bytes(s, threads);
}

bool conv_backward_weight(uintptr_t grad, uintptr_t x, uintptr_t grad_weight, uintptr_t scratch,
                          size_t scratch_size, const std::string& dtype, int64_t n, int64_t h,
                          int64_t w, int64_t c, int64_t o, int64_t ph, int64_t pw,
                          bool channels_last, int threads) {
  const ConvShape s = shape_of(dtype, n, h, w, c, o, ph, pw);
  const cpu::KernelTable& table = table_for(s.dtype);
  need("threads", threads, 1, 1 << 16);
  const size_t item = itemsize(s.dtype);
  const Block out{"grad_weight", grad_weight, 9 * o * c * item};
  const Block work{"scratch", scratch, table.conv_backward_weight_scratch_bytes(s, threads)};
  const Block from[] = {{"grad", grad, n * s.oh() * s.ow() * o * item}, {"x", x, n * h * w * c * item}};
  for (const Block& in : from) {
    if (n) need_block(in, item);
    need_apart(out, in);
    need_apart(work, in);
  }
  need_block(out, item);
  need_block(work, 64);
  need_apart(work, out);
  if (scratch_size < work.bytes)
    fail("scratch_bytes: expected at least " + std::to_string(work.bytes) + ", got " +
         std::to_string(scratch_size));
  py::gil_scoped_release release;
  return table.conv_backward_weight({s, pointer<const void>(grad), pointer<const void>(x),
                                     pointer<void>(grad_weight), pointer<char>(scratch), threads,
                                     channels_last});
}

}  // namespace

#define RF_WEIGHT_SHAPE                                                                      \
  py::arg("dtype"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("o"),    \
      py::arg("ph"), py::arg("pw")

void register_conv_backward_weight(py::module_& m) {
  m.def("conv_backward_weight_scratch_bytes", &scratch_bytes, RF_WEIGHT_SHAPE, py::arg("threads"),
        "Bytes of scratch that conv_backward_weight needs on that many threads.");
  m.def("conv_backward_weight", &conv_backward_weight, py::arg("grad"), py::arg("x"),
        py::arg("grad_weight"), py::arg("scratch"), py::arg("scratch_bytes"), RF_WEIGHT_SHAPE,
        py::arg("channels_last"), py::arg("threads"),
        "The gradient of the weight (o, c, 3, 3) of a convolution with stride 1, padding ph and pw;\n"
        "whether all of it is finite: where not, NaN and infinity are not yet where they belong.\n\n"
        "grad (n, o, oh, ow) and x (n, c, h, w) are dense NHWC in dtype, grad_weight is channels_last\n"
        "or contiguous; scratch is 64-byte aligned. The result does not depend on the threads.");
}

}  // namespace rf
