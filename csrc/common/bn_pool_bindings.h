// BatchNorm's backward behind ReLU and a max pool from Python, on a device that has it as two passes.
#pragma once

#include "bn_op_bindings.h"
#include "max_pool_bindings.h"

namespace rf {

template <class Device, class... Queue>
void bn_act_max_pool_backward(uintptr_t grad, uintptr_t index, uintptr_t x, uintptr_t mean, uintptr_t var,
                              uintptr_t weight, uintptr_t bias, uintptr_t grad_x, uintptr_t grad_weight,
                              uintptr_t grad_bias, uintptr_t scratch, size_t scratch_bytes,
                              const std::string& dtype, int64_t n, int64_t h, int64_t w, int64_t c,
                              int64_t k, int64_t s, int64_t p, double eps, bool relu, Queue... queue) {
  const DType type = Device::dtype(dtype);
  const PoolSizes sizes = checked_pool(type, n, h, w, c, k, s, p);
  need("n", n, 1);
  const int64_t rows = n * h * w;
  Operands on(type, rows, c);
  const Block from{"grad", grad, sizes.out_elements * itemsize(type)}, at{"index", index, sizes.out_elements};
  need_block(from, itemsize(type));
  need_block(at, 1);
  char* base = on.scratch(scratch, scratch_bytes, bn_act_backward_scratch_bytes<Device>(rows, c));
  const Vectors made(base, c);
  const BnScaleShiftArgs affine = scale_shift_args(on, mean, var, weight, bias, made[0], made[1], c, eps);
  BnGradient gradient{};
  gradient.grad = pointer<const void>(grad);
  gradient.x = on.map("x", x);
  gradient.scale = affine.scale;
  gradient.shift = affine.shift;
  gradient.rows = rows;
  gradient.c = c;
  gradient.relu = relu;
  const Pooled pooled{pointer<const uint8_t>(index), n, h, w, k, s, p};
  BnPoolReduceArgs reduce{};
  static_cast<BnGradient&>(reduce) = gradient;
  static_cast<Pooled&>(reduce) = pooled;
  reduce.mean = affine.mean;
  reduce.sum_g = grad_bias ? on.vector<float>("grad_bias", grad_bias) : made[2];
  reduce.sum_gx = made[3];
  reduce.scratch = base + Vectors::bytes(c, kBackwardVectors);
  const BnGradientVectorsArgs vectors{
      affine.mean, affine.var, affine.weight,
      reduce.sum_g, reduce.sum_gx,
      made[4], made[5], made[6],
      on.optional_vector<float>("grad_weight", grad_weight),
      c, (float)eps, (float)rows};
  BnPoolApplyArgs apply{};
  if (grad_x) {
    static_cast<BnGradient&>(apply) = gradient;
    static_cast<Pooled&>(apply) = pooled;
    apply.a = vectors.a;
    apply.b = vectors.b;
    apply.d = vectors.d;
    apply.grad_x = on.output("grad_x", grad_x, {}, {{"x", x, 0}});
    for (const Block& read : {from, at}) need_apart({"grad_x", grad_x, sizes.in_bytes}, read);
  }
  const bool wants_vectors = grad_x || grad_weight;
  if (wants_vectors && Device::kMakesVectors) reduce.vectors = vectors;
  py::gil_scoped_release release;
  if (relu) Device::run(affine, queue...);
  Device::run(type, reduce, queue...);
  if (wants_vectors && !Device::kMakesVectors) Device::run(vectors, queue...);
  if (grad_x) Device::run(type, apply, queue...);
}

// The functions of one device; the name of the queue, where there is one, comes last.
template <class Device, class... Queue, class... QueueName>
void register_bn_pool(py::module_& m, const QueueName&... queue) {
  using py::arg;
  m.def("bn_act_max_pool_backward_scratch_bytes", &bn_act_backward_scratch_bytes<Device>, arg("rows"),
        arg("c"));
  m.def("bn_act_max_pool_backward", &bn_act_max_pool_backward<Device, Queue...>, arg("grad"),
        arg("index"), arg("x"), arg("mean"), arg("var"), arg("weight"), arg("bias"), arg("grad_x"),
        arg("grad_weight"), arg("grad_bias"), arg("scratch"), arg("scratch_bytes"), arg("dtype"), arg("n"),
        arg("h"), arg("w"), arg("c"), arg("k"), arg("s"), arg("p"), arg("eps"), arg("relu"), queue...,
        "max_pool_backward, then bn_act_backward of what it gives, which is not written; n, h, w, c are\n"
        "those of x, weight and bias may be 0, and so may a gradient that is not wanted. The mask is of\n"
        "x. The same bits in every run.");
}

}  // namespace rf
