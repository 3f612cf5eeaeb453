// y = relu(x + residual), one pass over n elements.
#include "launch.cuh"

namespace rf::cuda {
namespace {

constexpr int kVectors = 4;  // of each thread: their loads are in flight together

struct AddReluPart : AddReluArgs {
  int64_t begin;  // elements from here to n, in whole vectors
};

template <class E, int W>
__global__ void __launch_bounds__(kThreads) add_relu_kernel(const AddReluPart g) {
  const int64_t first = g.begin + ((int64_t)blockIdx.x * kVectors * kThreads + threadIdx.x) * W;
  Pack<E, W> x[kVectors], r[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * kThreads * W;
    if (at < g.n) x[i] = load<E, W>(g.x, at);
    if (at < g.n) r[i] = load<E, W>(g.residual, at);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = first + i * kThreads * W;
    if (at >= g.n) break;
#pragma unroll
    for (int j = 0; j < W; ++j)
      x[i].at[j] = E::narrow(E::relu(E::add(E::widen(x[i].at[j]), E::widen(r[i].at[j]))));
    store<E, W>(g.y, at, x[i]);
  }
}

// -------------------------------------------------------------------------------------------------

template <class E, int W>
void launch_part(AddReluArgs args, int64_t begin, int64_t end, Stream stream) {
  args.n = end;
  const int64_t blocks = ceil_div(end - begin, int64_t(kThreads) * kVectors * W);
  put("add_relu", add_relu_kernel<E, W>, blocks, AddReluPart{args, begin}, stream);
}

}  // namespace

void launch(DType dtype, const AddReluArgs& args, Stream stream) {
  // The dtype and the addresses decide on the width; what is left of n goes one by one.
  with_element(dtype, kAccess, {args.x, args.residual, args.y}, [&](auto element, auto width) {
    using E = decltype(element);
    constexpr int W = decltype(width)::value;
    const int64_t whole = args.n / W * W;
    launch_part<E, W>(args, 0, whole, stream);
    launch_part<E, 1>(args, whole, args.n, stream);
  });
}

}  // namespace rf::cuda
