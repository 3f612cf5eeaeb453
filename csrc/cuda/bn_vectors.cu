// The per-channel vectors between the passes and the running statistics, each set in one small launch.
#include "../common/bn_vectors.h"
#include "launch.cuh"

namespace rf::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) bn_scale_shift_kernel(const BnScaleShiftArgs g) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i < g.c) bn_scale_shift(g, i);
}

__global__ void __launch_bounds__(kThreads) bn_gradient_vectors_kernel(const BnGradientVectorsArgs g) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i < g.c) bn_gradient_vectors(g, i, g.sum_g[i], g.sum_gx[i]);
}

__global__ void __launch_bounds__(kThreads) bn_update_stats_kernel(const BnUpdateStatsArgs g) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i < g.c) bn_update_stats(g, i);
}

// -------------------------------------------------------------------------------------------------

}  // namespace

void launch(const BnScaleShiftArgs& args, Stream stream) {
  put("bn_scale_shift", bn_scale_shift_kernel, ceil_div(args.c, kThreads), args, stream);
}

void launch(const BnGradientVectorsArgs& args, Stream stream) {
  put("bn_gradient_vectors", bn_gradient_vectors_kernel, ceil_div(args.c, kThreads), args, stream);
}

void launch(const BnUpdateStatsArgs& args, Stream stream) {
  put("bn_update_stats", bn_update_stats_kernel, ceil_div(args.c, kThreads), args, stream);
}

const char* fault() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rf::cuda
