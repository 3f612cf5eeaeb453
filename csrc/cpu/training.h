// What one build of the training kernels (one instruction set, one dtype) offers to the bindings.
// Maps are dense NHWC read as (rows, c); vectors have c floats; a null pointer is an absent operand.
#pragma once

#include "../common/conv_shape.h"
#include "../common/moments.h"

namespace rf::cpu {

struct BnStatsArgs {
  const void* x;
  float *mean, *var;
  char* scratch;
  int64_t rows, c;
};

struct BnActArgs {
  const void* x;
  const float *scale, *shift;
  const void* residual;
  const float *residual_scale, *residual_shift;
  void* y;
  int64_t rows, c;
  bool relu;
};

// The gradient as it comes in, and what says where the ReLU let it pass: y, or scale and shift.
struct BnGradient {
  const void* grad;
  const void* x;
  const void* x2;  // of the BatchNorm in the shortcut
  const float *scale, *shift;
  const void* y;
  int64_t rows, c;
  bool relu;
};

struct BnReduceArgs : BnGradient {
  const float *mean, *mean2;
  float *sum_g, *sum_gx, *sum_gx2;
  void* masked;
  char* scratch;
};

struct BnApplyArgs : BnGradient {
  const float *a, *b, *d, *a2, *b2, *d2;
  void *grad_x, *grad_x2;
};

struct AddReluArgs {
  const void *x, *residual;
  void* y;
  int64_t n;
};

struct PoolIndexArgs {
  const void* x;
  void* y;
  uint8_t* index;  // like y
  int64_t n, h, w, c, k, s, p;
};

struct PoolBackwardArgs {
  const void* grad;
  const uint8_t* index;
  void* grad_x;
  int64_t n, h, w, c, k, s, p;
};

struct TrainingTable {
  void (*bn_stats)(const BnStatsArgs&);
  void (*bn_act)(const BnActArgs&);
  void (*bn_act_backward_reduce)(const BnReduceArgs&);
  void (*bn_act_backward_apply)(const BnApplyArgs&);
  void (*add_relu)(const AddReluArgs&);
  void (*max_pool_index)(const PoolIndexArgs&);
  void (*max_pool_backward)(const PoolBackwardArgs&);
};

// Per part and channel: `doubles` results and 3 floats to add up in.
inline size_t reduction_scratch_bytes(int64_t rows, int64_t c, int doubles) {
  return reduction_parts(rows, c) * c * (doubles * sizeof(double) + 3 * sizeof(float));
}

// Null where no instruction set with kernels is active.
const TrainingTable* training_kernels(DType dtype);

namespace avx2 { extern const TrainingTable training_f32, training_bf16; }
namespace avx512 { extern const TrainingTable training_f32, training_bf16; }
namespace avx512_bf16 { extern const TrainingTable training_bf16; }

}  // namespace rf::cpu
