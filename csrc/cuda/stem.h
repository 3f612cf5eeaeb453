// The fused stem as its binding sees it.
#pragma once

#include "kernels.h"

namespace rf::cuda {

// Columns of the map before the pool, and channels, that a block has at a time.
constexpr int kStemColumns = 112, kStemChannels = 64;

// x (n, h, w, c) of up to four channels and y, (n, h / 2, w / 2, o) rounded up or behind the pool half
// of it, o in kStemChannels, dense. The weight is (o / 32, steps, 4, 32, 4), as the warps multiply it.
struct StemArgs {
  const void *x, *weight;
  const float *scale, *shift;  // null: ones, zeros
  void* y;
  int64_t n, h, w, c, o;
  int64_t band;  // rows of y that a block walks down
  bool relu, pool;
};

void launch(DType dtype, const StemArgs& args, Stream stream);

// The weight's gradient in `parts`, each (o, 7, 7, c), from the output's gradient (n, h / 2, w / 2, o)
// rounded up, and x.
struct StemGradArgs {
  const void *grad, *x;
  float* partial;
  int64_t n, h, w, c, o;
  int64_t band, parts;  // rows that a block walks down at a time; blocks
};

void launch(DType dtype, const StemGradArgs& args, Stream stream);

}  // namespace rf::cuda
