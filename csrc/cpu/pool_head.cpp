// max_pool and head from Python.
#include <pybind11/pybind11.h>

#include "checks.h"

namespace py = pybind11;

namespace rf {
namespace {

void max_pool(uintptr_t x, uintptr_t y, const std::string& dtype, int64_t n, int64_t h, int64_t w,
              int64_t c, int64_t k, int64_t s, int64_t p) {
  const cpu::PoolArgs args{parse_dtype(dtype), pointer<const void>(x), pointer<void>(y),
                           n, h, w, c, k, s, p};
  const cpu::KernelTable& table = table_for(args.dtype);
  need("n", n, 0);
  need("h", h, 1);
  need("w", w, 1);
  need("c", c, 1);
  need("k", k, 1, 1 << 12);
  need("s", s, 1, 1 << 12);
  need("p", p, 0, k / 2);
  if (h + 2 * p < k || w + 2 * p < k) fail("k: the window is larger than the padded input");
  if (n == 0) return;
  const size_t item = itemsize(args.dtype);
  const double rows = double(n) * ((h + 2 * p - k) / s + 1);  // windows overlap: y may be larger
  const Block in{"x", x, need_bytes("n", double(n) * h * w * c, item)};
  const Block out{"y", y, need_bytes("n", rows * ((w + 2 * p - k) / s + 1) * c, item)};
  need_block(in, item);
  need_block(out, item);
  need_apart(out, in);
  py::gil_scoped_release release;
  table.max_pool(args);
}

void head(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t scratch,
          size_t scratch_bytes, const std::string& dtype, int64_t n, int64_t hw, int64_t c,
          int64_t classes) {
  const cpu::HeadArgs args{parse_dtype(dtype),        pointer<const void>(x), pointer<const void>(weight),
                           pointer<const void>(bias), pointer<void>(y),       pointer<float>(scratch),
                           n, hw, c, classes};
  const cpu::KernelTable& table = table_for(args.dtype);
  need("n", n, 0);
  need("hw", hw, 1);
  need("c", c, 1);
  need("classes", classes, 1);
  if (n == 0) return;
  const size_t item = itemsize(args.dtype), least = need_bytes("n", double(n) * c, sizeof(float));
  if (scratch_bytes < least) fail("scratch_bytes: expected at least " + std::to_string(least));
  const Block in{"x", x, need_bytes("n", double(n) * hw * c, item)};
  const Block weights{"weight", weight, need_bytes("classes", double(classes) * c, item)};
  const Block biases{"bias", bias, bias ? classes * item : 0};
  const Block out{"y", y, need_bytes("n", double(n) * classes, item)};
  const Block means{"scratch", scratch, least};
  need_block(in, item);
  need_block(weights, item);
  if (bias) need_block(biases, item);
  need_block(out, item);
  need_block(means, alignof(float));
  for (const Block* read : {&in, &weights, &biases}) {
    need_apart(out, *read);
    need_apart(means, *read);
  }
  need_apart(out, means);
  py::gil_scoped_release release;
  table.head(args);
}

}  // namespace

void register_pool_head(py::module_& m) {
  m.def("max_pool", &max_pool, py::arg("x"), py::arg("y"), py::arg("dtype"), py::arg("n"),
        py::arg("h"), py::arg("w"), py::arg("c"), py::arg("k"), py::arg("s"), py::arg("p"),
        "Max pool of dense NHWC, window k, stride s, padding p <= k/2; NaN spreads over its windows.\n"
        "y lies apart from x.");
  m.def("head", &head, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"),
        py::arg("scratch"), py::arg("scratch_bytes"), py::arg("dtype"), py::arg("n"), py::arg("hw"),
        py::arg("c"), py::arg("classes"),
        "y = mean(x over hw) weight^T + bias. x (n, hw, c), weight (classes, c), bias (classes) or 0,\n"
        "y (n, classes), all in dtype; scratch takes 4 * n * c bytes. Sums in float32, the\n"
        "means between them in dtype.\n"
        "y and scratch lie apart from all else.");
}

}  // namespace rf
