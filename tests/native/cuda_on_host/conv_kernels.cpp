// The table of the 1x1 convolution's kernels on the host: plain loops.
#include <stdexcept>

#include "../../../csrc/cuda/conv_bn_act.h"
#include "../../../csrc/cuda/element.cuh"

namespace rf::cuda {
namespace {

// Sizes that CUTLASS would refuse, for the sake of its word.
bool can_implement(const ConvArgs& a) { return a.c != 1016; }

size_t workspace_bytes(const ConvArgs&) { return 16; }

template <class E>
void run(const ConvArgs& a, void* workspace, Stream stream) {
  using T = typename E::T;
  if (stream) throw std::runtime_error("conv_bn_act: launch failed: invalid resource handle");
  *static_cast<uint64_t*>(workspace) = 0;
  const T *x = (const T*)a.x, *weight = (const T*)a.weight, *residual = (const T*)a.residual;
  T* y = (T*)a.y;
  for (int64_t i = 0; i < a.pixels; ++i)
    for (int64_t o = 0; o < a.o; ++o) {
      float sum = 0;
      for (int64_t c = 0; c < a.c; ++c) sum += E::widen(x[i * a.c + c]) * E::widen(weight[o * a.c + c]);
      float v = sum * (a.scale ? a.scale[o] : 1) + (a.shift ? a.shift[o] : 0);
      if (residual) v += E::widen(residual[i * a.o + o]);
      y[i * a.o + o] = E::narrow(a.relu ? E::relu(v) : v);
    }
}

template <class E>
constexpr ConvKernel entry(const char* name, DType dtype) {
  return {name, dtype, &can_implement, &workspace_bytes, &run<E>};
}

}  // namespace

ConvKernels gemm = {entry<Bf16>("gemm", DType::bf16), entry<F16>("gemm", DType::f16)};
ConvKernels gemm_add = {entry<Bf16>("gemm-add", DType::bf16), entry<F16>("gemm-add", DType::f16)};

}  // namespace rf::cuda
