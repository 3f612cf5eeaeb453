// BatchNorm in training from Python, on any device: the arguments checked, then the kernel run.
//
// A Device has dtype(name), scratch_bytes(rows, c, doubles) and run(dtype, args, queue...) for each
// struct of training_args.h; with kMakesVectors its passes make the vectors between them. Queue is
// what it runs on: nothing, or a CUDA stream as an integer.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "checks.h"
#include "conv_shape.h"
#include "training_args.h"

namespace rf {

namespace py = pybind11;

// Doubles per part and channel: sum and squared deviations; the sums of g, g*x and g*x2.
constexpr int kStatsResults = 2, kReduceResults = 3;

// The (rows, c) maps and vectors of one call, checked as they are named.
class Operands {
  size_t map_bytes_, vector_bytes_;
  uintptr_t bits_read_ = 0;

 public:
  const DType dtype;

  Operands(DType type, int64_t rows, int64_t c) : dtype(type) {
    need("rows", rows, 0);
    need("c", c, 1, 1 << 24);
    map_bytes_ = rows * c * itemsize(dtype);
    vector_bytes_ = c * sizeof(float);
  }

  const void* map(const char* name, uintptr_t address) {
    return pointer<const void>(checked(name, address).address);
  }
  // Written; elsewhere than all maps written before, and over those read at most as a whole.
  void* output(const char* name, uintptr_t address, std::initializer_list<Block> read,
               std::initializer_list<Block> written = {}) {
    const Block out = checked(name, address);
    if (!map_bytes_) return pointer<void>(address);
    for (const Block& in : read)
      if (in.address) need_same_or_apart(out, {in.name, in.address, map_bytes_});
    for (const Block& other : written)
      if (other.address) need_apart(out, {other.name, other.address, map_bytes_});
    if (bits_read_) need_apart(out, bits_block(bits_read_));
    return pointer<void>(address);
  }
  // The bits of a map to read, from which all outputs are apart; or null.
  const uint8_t* bits(uintptr_t address, int64_t c) {
    need_bits(address, c);
    bits_read_ = address;
    return pointer<const uint8_t>(address);
  }
  // Those to write, apart from all maps; or null.
  uint8_t* bits_output(uintptr_t address, int64_t c, std::initializer_list<Block> maps) {
    need_bits(address, c);
    if (address && map_bytes_)
      for (const Block& map : maps)
        if (map.address) need_apart(bits_block(address), {map.name, map.address, map_bytes_});
    return pointer<uint8_t>(address);
  }
  template <class F = const float>
  F* vector(const char* name, uintptr_t address) {
    need_block({name, address, vector_bytes_}, alignof(float));
    return pointer<F>(address);
  }
  template <class F = const float>
  F* optional_vector(const char* name, uintptr_t address) {
    return address ? vector<F>(name, address) : nullptr;
  }
  char* scratch(uintptr_t address, size_t bytes, size_t least) {
    need_block({"scratch", address, bytes}, 64);
    if (bytes < least) fail("scratch_bytes: expected at least " + std::to_string(least));
    return pointer<char>(address);
  }

 private:
  void need_bits(uintptr_t address, int64_t c) const {
    if (!address) return;
    if (itemsize(dtype) != 2 || c % kBits)
      fail("bits: there are only for 16-bit maps of 8, 16, ... channels");
    if (map_bytes_) need_block(bits_block(address), 1);
  }
  Block bits_block(uintptr_t address) const {
    return {"bits", address, map_bytes_ / itemsize(dtype) / kBits};
  }
  Block checked(const char* name, uintptr_t address) const {
    const Block block{name, address, map_bytes_};
    if (map_bytes_) need_block(block, itemsize(dtype));
    return block;
  }
};

[[noreturn]] inline void fail_together(const char* name, const char* other) {
  fail(std::string(name) + ": must be given together with " + other);
}

template <class Device, class... Queue>
void bn_stats(uintptr_t x, uintptr_t mean, uintptr_t var, uintptr_t scratch, size_t scratch_bytes,
              const std::string& dtype, int64_t rows, int64_t c, Queue... queue) {
  Operands on(Device::dtype(dtype), rows, c);
  const BnStatsArgs args{
      on.map("x", x), on.vector<float>("mean", mean), on.vector<float>("var", var),
      on.scratch(scratch, scratch_bytes, Device::scratch_bytes(rows, c, kStatsResults)),
      rows, c};
  py::gil_scoped_release release;
  Device::run(on.dtype, args, queue...);
}

inline BnActArgs apply_args(Operands& on, uintptr_t x, const float* scale, const float* shift,
                            uintptr_t residual, uintptr_t y, uintptr_t bits, int64_t rows, int64_t c,
                            bool relu) {
  BnActArgs args{};
  args.x = on.map("x", x);
  args.scale = scale;
  args.shift = shift;
  if (residual) args.residual = on.map("residual", residual);
  args.y = on.output("y", y, {{"x", x, 0}, {"residual", residual, 0}});
  if (bits && !(residual && relu)) fail("bits: only of the ReLU of a sum");
  args.bits = on.bits_output(bits, c, {{"x", x, 0}, {"residual", residual, 0}, {"y", y, 0}});
  args.rows = rows;
  args.c = c;
  args.relu = relu;
  return args;
}

template <class Device, class... Queue>
void bn_apply(uintptr_t x, uintptr_t scale, uintptr_t shift, uintptr_t residual,
              uintptr_t residual_scale, uintptr_t residual_shift, uintptr_t y, uintptr_t bits,
              const std::string& dtype, int64_t rows, int64_t c, bool relu, Queue... queue) {
  Operands on(Device::dtype(dtype), rows, c);
  if (!residual_scale != !residual_shift) fail_together("residual_scale", "residual_shift");
  if (residual_scale && !residual && rows) fail_together("residual_scale", "residual");
  BnActArgs args = apply_args(on, x, on.vector("scale", scale), on.vector("shift", shift), residual,
                              y, bits, rows, c, relu);
  args.residual_scale = on.optional_vector("residual_scale", residual_scale);
  args.residual_shift = on.optional_vector("residual_shift", residual_shift);
  if (rows == 0) return;
  py::gil_scoped_release release;
  Device::run(on.dtype, args, queue...);
}

inline BnGradient gradient(Operands& on, uintptr_t grad, uintptr_t x, uintptr_t x2,
                           uintptr_t scale, uintptr_t shift, uintptr_t y, uintptr_t bits,
                           int64_t rows, int64_t c, bool relu) {
  BnGradient g{};
  g.grad = on.map("grad", grad);
  g.x = on.map("x", x);
  if (x2) g.x2 = on.map("x2", x2);
  if (y && bits) fail("bits: given in place of y, not beside it");
  if (relu && y) g.y = on.map("y", y);
  if (relu) g.bits = on.bits(bits, c);
  if (relu && !y && !bits) {
    if (x2) fail("y: it or its bits are needed where x2 and relu are given");
    g.scale = on.vector("scale", scale);
    g.shift = on.vector("shift", shift);
  }
  g.rows = rows;
  g.c = c;
  g.relu = relu;
  return g;
}

template <class Device, class... Queue>
void bn_act_backward_reduce(uintptr_t grad, uintptr_t x, uintptr_t x2, uintptr_t scale,
                            uintptr_t shift, uintptr_t y, uintptr_t bits, uintptr_t mean,
                            uintptr_t mean2,
                            uintptr_t sum_g, uintptr_t sum_gx, uintptr_t sum_gx2, uintptr_t masked,
                            uintptr_t scratch, size_t scratch_bytes, const std::string& dtype,
                            int64_t rows, int64_t c, bool relu, Queue... queue) {
  Operands on(Device::dtype(dtype), rows, c);
  BnReduceArgs args{};
  static_cast<BnGradient&>(args) = gradient(on, grad, x, x2, scale, shift, y, bits, rows, c, relu);
  args.mean = on.vector("mean", mean);
  args.sum_g = on.vector<float>("sum_g", sum_g);
  args.sum_gx = on.vector<float>("sum_gx", sum_gx);
  if (x2) {
    args.mean2 = on.vector("mean2", mean2);
    args.sum_gx2 = on.vector<float>("sum_gx2", sum_gx2);
  }
  if (masked && !relu) fail("masked: without relu it would be grad itself");
  if (masked)
    args.masked = on.output("masked", masked,
                            {{"grad", grad, 0}, {"x", x, 0}, {"x2", x2, 0}, {"y", y, 0}});
  args.scratch =
      on.scratch(scratch, scratch_bytes, Device::scratch_bytes(rows, c, kReduceResults));
  py::gil_scoped_release release;
  Device::run(on.dtype, args, queue...);
}

template <class Device, class... Queue>
void bn_act_backward_apply(uintptr_t grad, uintptr_t x, uintptr_t x2, uintptr_t scale,
                           uintptr_t shift, uintptr_t y, uintptr_t bits, uintptr_t a, uintptr_t b,
                           uintptr_t d,
                           uintptr_t a2, uintptr_t b2, uintptr_t d2, uintptr_t grad_x,
                           uintptr_t grad_x2, const std::string& dtype, int64_t rows, int64_t c,
                           bool relu, Queue... queue) {
  Operands on(Device::dtype(dtype), rows, c);
  BnApplyArgs args{};
  static_cast<BnGradient&>(args) = gradient(on, grad, x, x2, scale, shift, y, bits, rows, c, relu);
  const std::initializer_list<Block> read = {
      {"grad", grad, 0}, {"x", x, 0}, {"x2", x2, 0}, {"y", relu ? y : 0, 0}};
  args.a = on.vector("a", a);
  args.b = on.vector("b", b);
  args.d = on.vector("d", d);
  args.grad_x = on.output("grad_x", grad_x, read);
  if (x2) {
    args.a2 = on.vector("a2", a2);
    args.b2 = on.vector("b2", b2);
    args.d2 = on.vector("d2", d2);
    args.grad_x2 = on.output("grad_x2", grad_x2, read, {{"grad_x", grad_x, 0}});
  }
  if (rows == 0) return;
  py::gil_scoped_release release;
  Device::run(on.dtype, args, queue...);
}

template <class Device, class... Queue>
void add_relu(uintptr_t x, uintptr_t residual, uintptr_t y, const std::string& dtype, int64_t n,
              Queue... queue) {
  const DType type = Device::dtype(dtype);
  need("n", n, 0, int64_t(1) << 46);
  if (n == 0) return;
  const size_t bytes = n * itemsize(type);
  const Block in{"x", x, bytes}, other{"residual", residual, bytes}, out{"y", y, bytes};
  for (const Block& block : {in, other, out}) need_block(block, itemsize(type));
  need_same_or_apart(out, in);
  need_same_or_apart(out, other);
  const AddReluArgs args{pointer<const void>(x), pointer<const void>(residual), pointer<void>(y), n};
  py::gil_scoped_release release;
  Device::run(type, args, queue...);
}

template <class Device, int RESULTS>
size_t scratch_bytes(int64_t rows, int64_t c) {
  need("rows", rows, 0);
  need("c", c, 1, 1 << 24);
  return Device::scratch_bytes(rows, c, RESULTS);
}

// The functions of one device; the name of the queue, where there is one, comes last.
template <class Device, class... Queue, class... QueueName>
void register_bn(py::module_& m, const QueueName&... queue) {
  using py::arg;
  m.def("bn_stats_scratch_bytes", &scratch_bytes<Device, kStatsResults>, arg("rows"), arg("c"));
  m.def("bn_act_backward_reduce_scratch_bytes", &scratch_bytes<Device, kReduceResults>, arg("rows"),
        arg("c"));
  m.def("bn_stats", &bn_stats<Device, Queue...>, arg("x"), arg("mean"), arg("var"), arg("scratch"),
        arg("scratch_bytes"), arg("dtype"), arg("rows"), arg("c"), queue...,
        "Mean and biased variance of each column of x (rows, c), in one pass; NaN without rows.\n"
        "The same bits on any number of threads. Vectors are float32; scratch is 64-byte aligned.");
  m.def("bn_apply", &bn_apply<Device, Queue...>, arg("x"), arg("scale"), arg("shift"), arg("residual"),
        arg("residual_scale"), arg("residual_shift"), arg("y"), arg("bits"), arg("dtype"),
        arg("rows"), arg("c"), arg("relu"), queue...,
        "y = act(x*scale + shift + r), r = 0, residual or residual*residual_scale + residual_shift\n"
        "(0 for an absent operand). y may be x or residual. bits receives which of y passed the ReLU,\n"
        "a byte for 8 channels.");
  m.def("bn_act_backward_reduce", &bn_act_backward_reduce<Device, Queue...>, arg("grad"), arg("x"),
        arg("x2"), arg("scale"), arg("shift"), arg("y"), arg("bits"), arg("mean"), arg("mean2"),
        arg("sum_g"),
        arg("sum_gx"), arg("sum_gx2"), arg("masked"), arg("scratch"), arg("scratch_bytes"),
        arg("dtype"), arg("rows"), arg("c"), arg("relu"), queue...,
        "sum_g = sum(g), sum_gx = sum(g * (x - mean)), sum_gx2 likewise for x2, with g = grad where\n"
        "not y <= 0, by y or its bits (without: not x*scale + shift <= 0), all of grad without relu.\n"
        "masked, which may be grad, receives g. The same bits on any number of threads.");
  m.def("bn_act_backward_apply", &bn_act_backward_apply<Device, Queue...>, arg("grad"), arg("x"),
        arg("x2"), arg("scale"), arg("shift"), arg("y"), arg("bits"), arg("a"), arg("b"), arg("d"), arg("a2"),
        arg("b2"), arg("d2"), arg("grad_x"), arg("grad_x2"), arg("dtype"), arg("rows"), arg("c"),
        arg("relu"), queue...,
        "grad_x = g*a + x*b + d and, with x2, grad_x2 = g*a2 + x2*b2 + d2; g as in\n"
        "bn_act_backward_reduce. An output may be grad; the two must be apart.");
  m.def("add_relu", &add_relu<Device, Queue...>, arg("x"), arg("residual"), arg("y"), arg("dtype"),
        arg("n"), queue...,
        "y = relu(x + residual) over n elements; y may be x or residual.");
}

}  // namespace rf
