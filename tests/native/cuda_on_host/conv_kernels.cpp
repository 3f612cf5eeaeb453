// The table of convolution kernels on the host: plain loops that walk a map as TMA's im2col mode
// does, from corner to corner.
#include <limits>
#include <stdexcept>

#include "../../../csrc/cuda/conv_bn_act.h"
#include "../../../csrc/cuda/conv_limits.h"
#include "../../../csrc/cuda/element.cuh"

namespace rf::cuda {
namespace {

// The places of a window along one side, counted between the corners as CUTLASS counts them.
int64_t places(int64_t side, const Corners& c, int64_t stride) {
  return (side + c.upper - c.lower - 1) / stride + 1;
}

template <class E>
void convolve(const ConvArgs& a) {
  using T = typename E::T;
  const ConvShape& s = a.shape;
  const Corners rows(s.kh, s.ph, s.dh), columns(s.kw, s.pw, s.dw);
  const T *x = (const T*)a.x, *weight = (const T*)a.weight, *residual = (const T*)a.residual;
  T* y = (T*)a.y;
  int64_t at = 0;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t p = 0; p < places(s.h, rows, s.sh); ++p)
      for (int64_t q = 0; q < places(s.w, columns, s.sw); ++q)
        for (int64_t o = 0; o < s.o; ++o, ++at) {
          float sum = 0;
          for (int64_t r = 0; r < s.kh; ++r)
            for (int64_t t = 0; t < s.kw; ++t) {
              const int64_t i = rows.lower + p * s.sh + r * s.dh;
              const int64_t j = columns.lower + q * s.sw + t * s.dw;
              const bool inside = i >= 0 && i < s.h && j >= 0 && j < s.w;
              for (int64_t c = 0; c < s.c; ++c)
                sum += (inside ? E::widen(x[((n * s.h + i) * s.w + j) * s.c + c]) : 0) *
                       E::widen(weight[((o * s.kh + r) * s.kw + t) * s.c + c]);
            }
          float v = sum * (a.scale ? a.scale[o] : 1) + (a.shift ? a.shift[o] : 0);
          if (residual) v += E::widen(residual[at]);
          y[at] = E::narrow(a.relu ? E::relu(v) : v);
        }
}

// A shape that CUTLASS would refuse, for the sake of its word.
bool can_implement(const ConvArgs& a) { return a.shape.kh != 11; }

size_t workspace_bytes(const ConvArgs&) { return 16; }

void run(const ConvArgs& a, void* workspace, Stream stream) {
  if (stream) throw std::runtime_error("conv_bn_act: launch failed: invalid resource handle");
  *static_cast<uint64_t*>(workspace) = 0;
  a.shape.dtype == DType::bf16 ? convolve<Bf16>(a) : convolve<F16>(a);
}

constexpr ConvKernel entry(const char* name, DType dtype, int m, int n, int cluster, bool pointwise) {
  return {name, dtype, m, n, cluster, pointwise, &can_implement, &workspace_bytes, &run};
}

}  // namespace

#define ON_HOST(KIND, M, N, CLUSTER, POINTWISE)                                             \
  ConvKernels KIND##_##M##x##N = {                                                          \
      entry(#KIND "-m" #M "n" #N "c" #CLUSTER, DType::bf16, M, N, CLUSTER, POINTWISE),      \
      entry(#KIND "-m" #M "n" #N "c" #CLUSTER, DType::f16, M, N, CLUSTER, POINTWISE)}

ON_HOST(im2col, 128, 128, 2, false);
ON_HOST(im2col, 128, 64, 1, false);
ON_HOST(im2col, 64, 128, 1, false);
ON_HOST(im2col, 64, 64, 1, false);
ON_HOST(gemm, 128, 256, 2, true);
ON_HOST(gemm, 128, 128, 1, true);

}  // namespace rf::cuda
