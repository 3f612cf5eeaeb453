// Hopper's 1x1 convolution as its bindings see it: a table of kernels, without CUTLASS.
#pragma once

#include "kernels.h"

namespace rf::cuda {

constexpr int kChannelStep = 8;  // TMA takes rows of whole 16 bytes

// y = act(conv(x, weight) * scale + shift + residual), act = ReLU or nothing, by 1x1 of stride 1: a
// matrix product. All maps are dense: x (pixels, c), weight (o, c), residual and y (pixels, o).
struct ConvArgs {
  int64_t pixels, c, o;
  const void *x, *weight;
  const float *scale, *shift;  // null: ones, zeros
  const void* residual;        // null: none
  void* y;
  bool relu;
};

struct ConvKernel {
  const char* name;
  DType dtype;
  bool (*can_implement)(const ConvArgs&);
  size_t (*workspace_bytes)(const ConvArgs&);
  // Puts the kernel on a stream; raises runtime_error if that fails.
  void (*run)(const ConvArgs&, void* workspace, Stream stream);
};

// A kernel in bfloat16 and float16. Each is defined in a source of its own, with the reason for it.
using ConvKernels = const ConvKernel[2];
extern ConvKernels gemm, gemm_add;

}  // namespace rf::cuda
