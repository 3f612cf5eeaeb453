// The sizes of a 2-d convolution as they come from Python.
#pragma once

#include <pybind11/pybind11.h>

#include "checks.h"
#include "conv_shape.h"

namespace rf {

inline ConvShape checked(ConvShape s) {
  need("n", s.n, 0);
  need("h", s.h, 1);
  need("w", s.w, 1);
  need("c", s.c, 1);
  need("o", s.o, 1);
  need("kh", s.kh, 1, 1 << 12);
  need("kw", s.kw, 1, 1 << 12);
  need("sh", s.sh, 1, 1 << 12);
  need("sw", s.sw, 1, 1 << 12);
  need("ph", s.ph, 0, 1 << 12);
  need("pw", s.pw, 0, 1 << 12);
  need("dh", s.dh, 1, 1 << 12);
  need("dw", s.dw, 1, 1 << 12);
  need("groups", s.groups, 1);
  if (s.c % s.groups) fail("c: must be a multiple of groups");
  if (s.o % s.groups) fail("o: must be a multiple of groups");
  if (s.h + 2 * s.ph < s.dh * (s.kh - 1) + 1) fail("kh: the kernel is taller than the padded input");
  if (s.w + 2 * s.pw < s.dw * (s.kw - 1) + 1) fail("kw: the kernel is wider than the padded input");
  const double limit = 1e15;
  if (double(s.n) * s.h * s.w * s.c > limit || double(s.n) * s.oh() * s.ow() * s.o > limit)
    fail("n: the tensors are too large");
  return s;
}

}  // namespace rf

#define RF_SHAPE                                                                             \
  py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("o"), py::arg("kh"),       \
      py::arg("kw"), py::arg("sh"), py::arg("sw"), py::arg("ph"), py::arg("pw"), py::arg("dh"), \
      py::arg("dw"), py::arg("groups")
