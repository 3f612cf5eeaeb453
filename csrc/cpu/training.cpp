// The training kernels on the CPU, for Python.
#include "../common/bn_op_bindings.h"
#include "../common/max_pool_bindings.h"
#include "checks.h"

namespace rf {
namespace {

struct Cpu {
  static DType dtype(const std::string& name) {
    const DType type = parse_dtype(name);
    training_table_for(type);
    return type;
  }
  static size_t scratch_bytes(int64_t rows, int64_t c, int doubles) {
    return cpu::reduction_scratch_bytes(rows, c, doubles);
  }
  static void run(DType d, const BnStatsArgs& args) { training_table_for(d).bn_stats(args); }
  static void run(const BnScaleShiftArgs& args) {
    training_table_for(DType::f32).bn_scale_shift(args);
  }
  static void run(const BnGradientVectorsArgs& args) {
    training_table_for(DType::f32).bn_gradient_vectors(args);
  }
  static void run(DType d, const BnActArgs& args) { training_table_for(d).bn_act(args); }
  static void run(DType d, const BnReduceArgs& args) {
    training_table_for(d).bn_act_backward_reduce(args);
  }
  static void run(DType d, const BnApplyArgs& args) {
    training_table_for(d).bn_act_backward_apply(args);
  }
  static void run(DType d, const AddReluArgs& args) { training_table_for(d).add_relu(args); }
  static void run(DType d, const PoolIndexArgs& args) {
    training_table_for(d).max_pool_index(args);
  }
  static void run(DType d, const PoolBackwardArgs& args) {
    training_table_for(d).max_pool_backward(args);
  }
};

void bn_update_stats(uintptr_t running_mean, uintptr_t running_var, uintptr_t num_batches_tracked,
                     uintptr_t mean, uintptr_t var, int64_t c, int64_t count, double momentum) {
  Operands on(DType::f32, 0, c);
  need("count", count, 2, int64_t(1) << 46);
  float* means = on.vector<float>("running_mean", running_mean);
  float* vars = on.vector<float>("running_var", running_var);
  const float *batch_mean = on.vector("mean", mean), *batch_var = on.vector("var", var);
  if (num_batches_tracked) {
    need_block({"num_batches_tracked", num_batches_tracked, sizeof(int64_t)}, alignof(int64_t));
    *pointer<int64_t>(num_batches_tracked) += 1;
  }
  const float keep = (float)(1 - momentum), share = (float)momentum;
  const float unbiased = (float)((double)count / (double)(count - 1));
  for (int64_t i = 0; i < c; ++i) {
    means[i] = means[i] * keep + batch_mean[i] * share;
    vars[i] = vars[i] * keep + batch_var[i] * unbiased * share;
  }
}

}  // namespace

void register_cpu_training(py::module_& m) {
  register_bn<Cpu>(m);
  register_bn_ops<Cpu>(m);
  register_max_pool_training<Cpu>(m);
  using py::arg;
  m.def("bn_update_stats", &bn_update_stats, arg("running_mean"), arg("running_var"),
        arg("num_batches_tracked"), arg("mean"), arg("var"), arg("c"), arg("count"),
        arg("momentum"),
        "running = (1 - momentum)*running + momentum*batch, with the unbiased variance; one is added\n"
        "to num_batches_tracked, an int64 or 0.");
}

}  // namespace rf
