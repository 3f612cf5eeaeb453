// BatchNorm's backward behind ReLU and a max pool from Python, on a device that gathers through the pool.
#pragma once

#include "bn_op_bindings.h"
#include "max_pool_bindings.h"

namespace rf {

template <class Device, class... Queue>
void bn_act_max_pool_backward(uintptr_t grad, uintptr_t index, uintptr_t taken, uintptr_t x, uintptr_t mean,
                              uintptr_t var, uintptr_t weight, uintptr_t bias, uintptr_t grad_x,
                              uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t scratch,
                              size_t scratch_bytes, const std::string& dtype, int64_t n, int64_t h, int64_t w,
                              int64_t c, int64_t k, int64_t s, int64_t p, double eps, bool relu,
                              Queue... queue) {
  const DType type = Device::dtype(dtype);
  const PoolSizes sizes = checked_pool(type, n, h, w, c, k, s, p);
  need("n", n, 1);
  // Rows of x, and of what the pool took of it: to these alone a gradient comes.
  const int64_t rows = n * h * w, rows_taken = int64_t(sizes.out_elements) / c;
  Operands on(type, rows, c), behind(type, rows_taken, c);
  const Block at{"index", index, sizes.out_elements};
  need_block(at, 1);
  char* base = on.scratch(scratch, scratch_bytes, bn_act_backward_scratch_bytes<Device>(rows_taken, c));
  const Vectors made(base, c);
  const BnScaleShiftArgs affine = scale_shift_args(on, mean, var, weight, bias, made[0], made[1], c, eps);
  BnReduceArgs reduce{};
  reduce.grad = behind.map("grad", grad);
  reduce.x = behind.map("taken", taken);
  reduce.scale = affine.scale;
  reduce.shift = affine.shift;
  reduce.rows = rows_taken;
  reduce.c = c;
  reduce.relu = relu;
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
    static_cast<BnGradient&>(apply) = reduce;
    apply.x = on.map("x", x);
    apply.index = pointer<const uint8_t>(index);
    apply.rows = rows;
    apply.n = n, apply.h = h, apply.w = w, apply.k = k, apply.s = s, apply.p = p;
    apply.a = vectors.a;
    apply.b = vectors.b;
    apply.d = vectors.d;
    apply.grad_x = on.output("grad_x", grad_x, {}, {{"x", x, 0}});
    for (const Block& read : {Block{"grad", grad, sizes.out_elements * itemsize(type)}, at})
      need_apart({"grad_x", grad_x, sizes.in_bytes}, read);
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
        arg("index"), arg("taken"), arg("x"), arg("mean"), arg("var"), arg("weight"), arg("bias"), arg("grad_x"),
        arg("grad_weight"), arg("grad_bias"), arg("scratch"), arg("scratch_bytes"), arg("dtype"), arg("n"),
        arg("h"), arg("w"), arg("c"), arg("k"), arg("s"), arg("p"), arg("eps"), arg("relu"), queue...,
        "max_pool_backward, then bn_act_backward of what it gives, which is not written; taken is what\n"
        "max_pool_index gave. n, h, w, c are those of x, weight and bias may be 0, and so may a gradient\n"
        "that is not wanted, without grad_x also x. The mask is of x. The same bits in every run.");
}

}  // namespace rf
