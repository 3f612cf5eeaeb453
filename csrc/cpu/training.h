// What one build of the training kernels (one instruction set, one dtype) offers to the bindings.
#pragma once

#include "../common/conv_shape.h"
#include "../common/moments.h"
#include "../common/training_args.h"

namespace rf::cpu {

struct TrainingTable {
  void (*bn_stats)(const BnStatsArgs&);
  void (*bn_scale_shift)(const BnScaleShiftArgs&);
  void (*bn_gradient_vectors)(const BnGradientVectorsArgs&);
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

namespace avx2 { extern const TrainingTable training_f32, training_bf16, training_f16; }
namespace avx512 { extern const TrainingTable training_f32, training_bf16, training_f16; }
namespace avx512_bf16 { extern const TrainingTable training_bf16; }

}  // namespace rf::cpu
