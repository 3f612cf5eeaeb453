// The arguments of the training kernels, on any device. Maps are dense NHWC read as (rows, c);
// vectors have c floats; a null pointer is an absent operand.
#pragma once

#include <cstdint>

namespace rf {

// What is added to the normalised map: nothing, a map, or a map with its own scale and shift.
enum class Shortcut { none, plain, affine };

// What says where the ReLU let the gradient pass.
enum class Mask { none, from_y, from_bits, recomputed };

// A byte of bits says of 8 channels which passed, bit j of byte k of channel 8 k + j: of maps of 16
// bits, of whose pixels a GPU's thread reads as many at once.
constexpr int kBits = 8;

struct BnStatsArgs {
  const void* x;
  float *mean, *var;
  char* scratch;
  int64_t rows, c;
};

// What scale and shift are made of. Null weight or bias: ones, zeros.
struct BnNorm {
  const float *mean, *var, *weight, *bias;
  float eps;
};

struct BnScaleShiftArgs : BnNorm {
  float *scale, *shift;
  int64_t c;
};

// Null grad_weight: not wanted.
struct BnGradientVectorsArgs {
  const float *mean, *var, *weight, *sum_g, *sum_gx;
  float *a, *b, *d, *grad_weight;
  int64_t c;
  float eps, count;
};

// Null num_batches_tracked: nobody counts. running = keep*running + share*batch.
struct BnUpdateStatsArgs {
  float *running_mean, *running_var;
  int64_t* num_batches_tracked;
  const float *mean, *var;
  int64_t c;
  float keep, share, unbiased;
};

struct BnActArgs {
  const void* x;
  const float *scale, *shift;
  BnNorm norm;  // or, where its var is not null, what the kernel itself makes them of
  const void* residual;
  const float *residual_scale, *residual_shift;
  void* y;
  uint8_t* bits;  // receives what passed the ReLU of a sum; null: not wanted
  int64_t rows, c;
  bool relu;
};

// The gradient as it comes in, and what says where the ReLU let it pass: y, its bits, or scale and
// shift.
struct BnGradient {
  const void* grad;
  const void* x;
  const void* x2;  // of the BatchNorm in the shortcut
  const float *scale, *shift;
  BnNorm norm;  // as in BnActArgs
  const void* y;
  const uint8_t* bits;
  int64_t rows, c;
  bool relu;
};

struct BnReduceArgs : BnGradient {
  const float *mean, *mean2;
  float *sum_g, *sum_gx, *sum_gx2;
  void* masked;
  char* scratch;
  BnGradientVectorsArgs vectors;  // to be made with the sums; null a: not there
};

struct BnApplyArgs : BnGradient {
  const float *a, *b, *d, *a2, *b2, *d2;
  void *grad_x, *grad_x2;
  void* activation;  // receives relu(x*scale + shift), where the mask is made of it; null: not wanted
};

struct AddReluArgs {
  const void *x, *residual;
  void* y;
  int64_t n;
};

// The pool is of act(x * scale + shift).
struct PoolIndexArgs {
  const void* x;
  const float *scale, *shift;
  void *y, *taken;  // null taken: not wanted
  uint8_t* index;   // like y
  int64_t n, h, w, c, k, s, p;
  bool relu;
};

// n, h, w and c are the input's: of x and of grad_x.
struct PoolBackwardArgs {
  const void* grad;
  const uint8_t* index;
  void* grad_x;
  int64_t n, h, w, c, k, s, p;
};

// Behind a max pool: `grad` is that of the pool's result, like `index`; all else is as without the pool,
// n, h and w the sides of x.
struct BnPoolApplyArgs : BnApplyArgs {
  const uint8_t* index;
  int64_t n, h, w, k, s, p;
};

}  // namespace rf
