// The convolution kernels as their bindings see them: a table, without CUTLASS.
#pragma once

#include "../common/conv_shape.h"
#include "kernels.h"

namespace rf::cuda {

// y = act(conv(x, weight) * scale + shift + residual), act = ReLU or nothing. All maps are dense:
// x (n, h, w, c), weight (o, kh, kw, c), residual and y (n, oh, ow, o).
struct ConvArgs {
  ConvShape shape;
  const void *x, *weight;
  const float *scale, *shift;  // null: ones, zeros
  const void* residual;        // null: none
  void* y;
  bool relu;
};

struct ConvKernel {
  const char* name;
  DType dtype;
  int tile_m, tile_n;  // output pixels and output channels of one block
  int cluster;         // blocks along the pixels that fetch a tile of the weight together
  bool pointwise;      // for matrix products alone (is_pointwise)
  bool (*can_implement)(const ConvArgs&);
  size_t (*workspace_bytes)(const ConvArgs&);
  // Puts the kernel on a stream; raises runtime_error if that fails.
  void (*run)(const ConvArgs&, void* workspace, Stream stream);
};

// A tile in bfloat16 and float16. Each is defined in a source of its own, with the reason for it.
using ConvKernels = const ConvKernel[2];
extern ConvKernels im2col_128x128, im2col_128x64, im2col_64x128, im2col_64x64;
extern ConvKernels gemm_128x256, gemm_128x128;

// Whether the convolution is the product of (n*h*w, c) and (c, o).
inline bool is_pointwise(const ConvShape& s) {
  return s.kh * s.kw == 1 && s.sh == 1 && s.sw == 1 && s.ph == 0 && s.pw == 0;
}

}  // namespace rf::cuda
