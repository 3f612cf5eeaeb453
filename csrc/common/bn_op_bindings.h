// BatchNorm's ops from Python: the passes of bn_bindings.h with the vectors between them, one call
// an op, as a call from Python takes as long as a pass over a small map.
#pragma once

#include "bn_bindings.h"

namespace rf {

inline BnScaleShiftArgs scale_shift_args(Operands& on, uintptr_t mean, uintptr_t var,
                                         uintptr_t weight, uintptr_t bias, float* scale,
                                         float* shift, int64_t c, double eps) {
  const BnNorm norm{on.vector("mean", mean), on.vector("var", var),
                    on.optional_vector("weight", weight), on.optional_vector("bias", bias),
                    (float)eps};
  return {norm, scale, shift, c};
}

template <class Device, class... Queue>
void bn_scale_shift(uintptr_t mean, uintptr_t var, uintptr_t weight, uintptr_t bias,
                    uintptr_t scale, uintptr_t shift, int64_t c, double eps, Queue... queue) {
  Operands on(DType::f32, 0, c);
  const BnScaleShiftArgs args =
      scale_shift_args(on, mean, var, weight, bias, on.vector<float>("scale", scale),
                       on.vector<float>("shift", shift), c, eps);
  Device::run(args, queue...);
}

template <class Device, class... Queue>
void bn_gradient_vectors(uintptr_t mean, uintptr_t var, uintptr_t weight, uintptr_t sum_g,
                         uintptr_t sum_gx, uintptr_t a, uintptr_t b, uintptr_t d, int64_t c,
                         double eps, int64_t count, Queue... queue) {
  Operands on(DType::f32, 0, c);
  need("count", count, 1, int64_t(1) << 46);
  const BnGradientVectorsArgs args{on.vector("mean", mean),
                                   on.vector("var", var),
                                   on.optional_vector("weight", weight),
                                   on.vector("sum_g", sum_g),
                                   on.vector("sum_gx", sum_gx),
                                   on.vector<float>("a", a),
                                   on.vector<float>("b", b),
                                   on.vector<float>("d", d),
                                   nullptr,
                                   c,
                                   (float)eps,
                                   (float)count};
  Device::run(args, queue...);
}

template <class Device, class... Queue>
void bn_update_stats(uintptr_t running_mean, uintptr_t running_var, uintptr_t num_batches_tracked,
                     uintptr_t mean, uintptr_t var, int64_t c, int64_t count, double momentum,
                     Queue... queue) {
  Operands on(DType::f32, 0, c);
  need("count", count, 2, int64_t(1) << 46);
  if (num_batches_tracked)
    need_block({"num_batches_tracked", num_batches_tracked, sizeof(int64_t)}, alignof(int64_t));
  const BnUpdateStatsArgs args{on.vector<float>("running_mean", running_mean),
                               on.vector<float>("running_var", running_var),
                               num_batches_tracked ? pointer<int64_t>(num_batches_tracked) : nullptr,
                               on.vector("mean", mean),
                               on.vector("var", var),
                               c,
                               (float)(1 - momentum),
                               (float)momentum,
                               (float)((double)count / (double)(count - 1))};
  Device::run(args, queue...);
}

// Vectors of c floats within the scratch memory, and where the rest of it begins.
class Vectors {
  char* base_;
  int64_t c_;

 public:
  static size_t bytes(int64_t c, int count) {
    return (c * count * sizeof(float) + 63) / 64 * 64;
  }
  Vectors(char* scratch, int64_t c) : base_(scratch), c_(c) {}
  float* operator[](int i) const { return reinterpret_cast<float*>(base_) + i * c_; }
};

constexpr int kActVectors = 2, kBackwardVectors = 7;

template <class Device>
size_t bn_act_scratch_bytes(int64_t rows, int64_t c) {
  need("rows", rows, 0);
  need("c", c, 1, 1 << 24);
  return Vectors::bytes(c, kActVectors);
}

template <class Device>
size_t bn_act_backward_scratch_bytes(int64_t rows, int64_t c) {
  return Vectors::bytes(c, kBackwardVectors) + scratch_bytes<Device, kReduceResults>(rows, c);
}

template <class Device, class... Queue>
void bn_act(uintptr_t x, uintptr_t mean, uintptr_t var, uintptr_t weight, uintptr_t bias,
            uintptr_t residual, uintptr_t y, uintptr_t bits, uintptr_t scratch, size_t scratch_bytes,
            const std::string& dtype, int64_t rows, int64_t c, double eps, bool relu,
            Queue... queue) {
  Operands on(Device::dtype(dtype), rows, c);
  const Vectors made(on.scratch(scratch, scratch_bytes, Vectors::bytes(c, kActVectors)), c);
  const BnScaleShiftArgs vectors =
      scale_shift_args(on, mean, var, weight, bias, made[0], made[1], c, eps);
  BnActArgs args = apply_args(on, x, made[0], made[1], residual, y, bits, rows, c, relu);
  if (Device::kMakesVectors) args.norm = vectors;
  if (rows == 0) return;
  py::gil_scoped_release release;
  if (!Device::kMakesVectors) Device::run(vectors, queue...);
  Device::run(on.dtype, args, queue...);
}

template <class Device, class... Queue>
void bn_act_backward(uintptr_t grad, uintptr_t x, uintptr_t mean, uintptr_t var, uintptr_t weight,
                     uintptr_t bias, uintptr_t y, uintptr_t bits, uintptr_t grad_x, uintptr_t grad_weight,
                     uintptr_t grad_bias, uintptr_t grad_residual, uintptr_t activation,
                     uintptr_t scratch, size_t scratch_bytes, const std::string& dtype, int64_t rows,
                     int64_t c, double eps, bool relu, Queue... queue) {
  Operands on(Device::dtype(dtype), rows, c);
  need("rows", rows, 1);
  char* base = on.scratch(scratch, scratch_bytes, bn_act_backward_scratch_bytes<Device>(rows, c));
  const Vectors made(base, c);
  const bool recomputed = relu && !y && !bits;
  const BnScaleShiftArgs affine =
      scale_shift_args(on, mean, var, weight, bias, made[0], made[1], c, eps);
  BnReduceArgs reduce{};
  static_cast<BnGradient&>(reduce) = gradient(on, grad, x, 0, address(made[0]), address(made[1]), y, bits,
                                              rows, c, relu);
  reduce.mean = affine.mean;
  reduce.sum_g = grad_bias ? on.vector<float>("grad_bias", grad_bias) : made[2];
  reduce.sum_gx = made[3];
  const std::initializer_list<Block> read = {
      {"grad", grad, 0}, {"x", x, 0}, {"y", relu ? y : 0, 0}};
  if (grad_residual && !relu) fail("grad_residual: without relu it would be grad itself");
  if (grad_residual) {  // apart from x, which grad_x is made of behind it
    const Block x_too{"x", grad_x ? x : 0, 0};
    reduce.masked = on.output("grad_residual", grad_residual, read, {x_too});
  }
  reduce.scratch = base + Vectors::bytes(c, kBackwardVectors);
  const BnGradientVectorsArgs vectors{
      affine.mean, affine.var, affine.weight,
      reduce.sum_g, reduce.sum_gx,
      made[4], made[5], made[6],
      on.optional_vector<float>("grad_weight", grad_weight),
      c, (float)eps, (float)rows};
  BnApplyArgs apply{};
  if (activation && !(grad_x && recomputed))
    fail("activation: only with grad_x, of a ReLU whose mask is made of x");
  if (grad_x) {
    static_cast<BnGradient&>(apply) = reduce;
    if (grad_residual && !activation) {  // masked once, it spares the second mask
      apply.grad = reduce.masked;
      apply.relu = false;
    }
    apply.a = vectors.a;
    apply.b = vectors.b;
    apply.d = vectors.d;
    apply.grad_x =
        on.output("grad_x", grad_x, read, {{"grad_residual", grad_residual, 0}});
    if (activation)
      apply.activation = on.output("activation", activation, read,
                                   {{"grad_x", grad_x, 0}, {"grad_residual", grad_residual, 0}});
  }
  const bool wants_vectors = grad_x || grad_weight;
  if (Device::kMakesVectors) {
    if (recomputed) apply.norm = reduce.norm = affine;
    if (wants_vectors) reduce.vectors = vectors;
  }
  py::gil_scoped_release release;
  if (recomputed && !Device::kMakesVectors) Device::run(affine, queue...);
  Device::run(on.dtype, reduce, queue...);
  if (wants_vectors && !Device::kMakesVectors) Device::run(vectors, queue...);
  if (grad_x) Device::run(on.dtype, apply, queue...);
}

// The functions of one device; the name of the queue, where there is one, comes last.
template <class Device, class... Queue, class... QueueName>
void register_bn_ops(py::module_& m, const QueueName&... queue) {
  using py::arg;
  m.def("bn_scale_shift", &bn_scale_shift<Device, Queue...>, arg("mean"), arg("var"), arg("weight"),
        arg("bias"), arg("scale"), arg("shift"), arg("c"), arg("eps"), queue...,
        "scale = weight / sqrt(var + eps) and shift = bias - mean*scale; weight and bias may be 0.");
  m.def("bn_gradient_vectors", &bn_gradient_vectors<Device, Queue...>, arg("mean"), arg("var"),
        arg("weight"), arg("sum_g"), arg("sum_gx"), arg("a"), arg("b"), arg("d"), arg("c"),
        arg("eps"), arg("count"), queue...,
        "The a, b and d of bn_act_backward_apply; weight may be 0.");
  m.def("bn_update_stats", &bn_update_stats<Device, Queue...>, arg("running_mean"),
        arg("running_var"), arg("num_batches_tracked"), arg("mean"), arg("var"), arg("c"),
        arg("count"), arg("momentum"), queue...,
        "running = (1 - momentum)*running + momentum*batch, with the unbiased variance; one is added\n"
        "to num_batches_tracked, an int64 or 0.");
  m.def("bn_act_scratch_bytes", &bn_act_scratch_bytes<Device>, arg("rows"), arg("c"));
  m.def("bn_act_backward_scratch_bytes", &bn_act_backward_scratch_bytes<Device>, arg("rows"),
        arg("c"));
  m.def("bn_act", &bn_act<Device, Queue...>, arg("x"), arg("mean"), arg("var"), arg("weight"),
        arg("bias"), arg("residual"), arg("y"), arg("bits"), arg("scratch"), arg("scratch_bytes"),
        arg("dtype"), arg("rows"), arg("c"), arg("eps"), arg("relu"), queue...,
        "bn_scale_shift, then bn_apply by it.");
  m.def("bn_act_backward", &bn_act_backward<Device, Queue...>, arg("grad"), arg("x"), arg("mean"),
        arg("var"), arg("weight"), arg("bias"), arg("y"), arg("bits"), arg("grad_x"), arg("grad_weight"),
        arg("grad_bias"), arg("grad_residual"), arg("activation"), arg("scratch"),
        arg("scratch_bytes"), arg("dtype"), arg("rows"), arg("c"), arg("eps"), arg("relu"), queue...,
        "bn_act_backward_reduce, bn_gradient_vectors and bn_act_backward_apply; 0 for what is not\n"
        "wanted. grad_residual is the masked gradient; it may be grad, not x with grad_x. activation,\n"
        "only with grad_x and without y, is what bn_act gave.");
}

}  // namespace rf
