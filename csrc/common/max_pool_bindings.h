// max_pool_index and max_pool_backward from Python, on any device (bn_bindings.h says what that is).
#pragma once

#include <pybind11/pybind11.h>

#include "checks.h"
#include "conv_shape.h"
#include "training_args.h"

namespace rf {

namespace py = pybind11;

// Bytes of the input and elements of the output of a pool.
struct PoolSizes {
  size_t in_bytes, out_elements;
};

inline PoolSizes checked_pool(DType dtype, int64_t n, int64_t h, int64_t w, int64_t c, int64_t k,
                              int64_t s, int64_t p) {
  need("n", n, 0);
  need("h", h, 1, 1 << 20);
  need("w", w, 1, 1 << 20);
  need("c", c, 1, 1 << 20);
  need("k", k, 1, 16);  // a place in the window is one byte
  need("s", s, 1, 1 << 12);
  need("p", p, 0, k / 2);
  if (h + 2 * p < k || w + 2 * p < k) fail("k: the window is larger than the padded input");
  if (double(n) * h * w * c > 1e15) fail("n: the tensors are too large");
  const int64_t oh = (h + 2 * p - k) / s + 1, ow = (w + 2 * p - k) / s + 1;
  return {n * h * w * c * itemsize(dtype), size_t(n * oh * ow * c)};
}

template <class Device, class... Queue>
void max_pool_index(uintptr_t x, uintptr_t scale, uintptr_t shift, uintptr_t y, uintptr_t index,
                    uintptr_t taken, const std::string& dtype, int64_t n, int64_t h, int64_t w, int64_t c,
                    int64_t k, int64_t s, int64_t p, bool relu, Queue... queue) {
  const DType type = Device::dtype(dtype);
  const PoolSizes sizes = checked_pool(type, n, h, w, c, k, s, p);
  if (n == 0) return;
  const size_t out_bytes = sizes.out_elements * itemsize(type);
  const Block in{"x", x, sizes.in_bytes}, out{"y", y, out_bytes}, at{"index", index, sizes.out_elements},
      from{"taken", taken, out_bytes};
  for (const Block& map : {in, out}) need_block(map, itemsize(type));
  need_block(at, 1);
  for (const Block& written : {out, at}) need_apart(written, in);
  need_apart(at, out);
  if (taken) {
    need_block(from, itemsize(type));
    for (const Block& other : {in, out, at}) need_apart(from, other);
  }
  for (const Block& vector : {Block{"scale", scale, 4 * size_t(c)}, Block{"shift", shift, 4 * size_t(c)}})
    need_block(vector, alignof(float));
  const PoolIndexArgs args{pointer<const void>(x), pointer<const float>(scale),
                           pointer<const float>(shift), pointer<void>(y), pointer<void>(taken),
                           pointer<uint8_t>(index), n, h, w, c, k, s, p, relu};
  py::gil_scoped_release release;
  Device::run(type, args, queue...);
}

template <class Device, class... Queue>
void max_pool_backward(uintptr_t grad, uintptr_t index, uintptr_t grad_x, const std::string& dtype,
                       int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int64_t s,
                       int64_t p, Queue... queue) {
  const DType type = Device::dtype(dtype);
  const PoolSizes sizes = checked_pool(type, n, h, w, c, k, s, p);
  if (n == 0) return;
  const Block out{"grad_x", grad_x, sizes.in_bytes},
      in{"grad", grad, sizes.out_elements * itemsize(type)}, at{"index", index, sizes.out_elements};
  need_block(in, itemsize(type));
  need_block(at, 1);
  need_block(out, itemsize(type));
  need_apart(out, in);
  need_apart(out, at);
  const PoolBackwardArgs args{pointer<const void>(grad), pointer<const uint8_t>(index),
                                   pointer<void>(grad_x), n, h, w, c, k, s, p};
  py::gil_scoped_release release;
  Device::run(type, args, queue...);
}

template <class Device, class... Queue, class... QueueName>
void register_max_pool_training(py::module_& m, const QueueName&... queue) {
  using py::arg;
  m.def("max_pool_index", &max_pool_index<Device, Queue...>, arg("x"), arg("scale"), arg("shift"),
        arg("y"), arg("index"), arg("taken"), arg("dtype"), arg("n"), arg("h"), arg("w"), arg("c"), arg("k"),
        arg("s"), arg("p"), arg("relu"), queue...,
        "max_pool of act(x * scale + shift) that also writes which element of x it took, unless taken is\n"
        "0, and where that is in its window, one byte: iy * k + ix from the window's corner; the first of\n"
        "equals, the last NaN, as torch, after rounding to dtype.");
  m.def("max_pool_backward", &max_pool_backward<Device, Queue...>, arg("grad"), arg("index"),
        arg("grad_x"), arg("dtype"), arg("n"), arg("h"), arg("w"), arg("c"), arg("k"), arg("s"),
        arg("p"), queue...,
        "The input's gradient of max_pool_index; n, h, w, c are those of the input. Deterministic.");
}

}  // namespace rf
