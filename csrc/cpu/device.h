// The training kernels on the CPU as the bindings of csrc/common run them.
#pragma once

#include "../common/bn_vectors.h"
#include "checks.h"

namespace rf {

struct Cpu {
  static constexpr bool kMakesVectors = false;
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
  static void run(const BnUpdateStatsArgs& args) {
    for (int64_t i = 0; i < args.c; ++i) bn_update_stats(args, i);
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

}  // namespace rf
