// The max pool of the stem in training: which element of each window was taken, and backward. Each
// thread writes W channels of one pixel or of a few, each block a part of a row: places within an
// image are numbers of 32 bits, as divisions of longer ones would outlast the memory.
#include "stem_pool.cuh"

namespace rf::cuda {
namespace {

// W channels of the output's pixel `column` in row `row`, of the rows of all images. The first of
// equals is taken, the last NaN, as in torch; values are compared as a map in between would have had
// them.
template <class E, int W, int K, int S>
__device__ __forceinline__ void take_of_window(const Pool<PoolIndexArgs, K, S>& g, unsigned row, int column,
                                               int channel, const Affine<W>& affine) {
  const int c = (int)g.c, h = (int)g.h, w = (int)g.w, k = g.side(), p = (int)g.p;
  const int y0 = (int)(row % g.oh) * g.step() - p, x0 = column * g.step() - p;
  const int64_t image = (int64_t)(row / g.oh) * h * w * c + channel;
  // The first that is not padding, where all are -inf.
  const int top = max(0, -y0), left = max(0, -x0);
  Pack<E, W> taken = load<E, W>(g.x, image + ((y0 + top) * w + x0 + left) * c);
  float best[W];
  int best_at[W];
#pragma unroll
  for (int j = 0; j < W; ++j) {
    best[j] = -INFINITY;
    best_at[j] = top * k + left;
  }
#pragma unroll(K ? K : 1)
  for (int i = 0; i < k; ++i)
#pragma unroll(K ? K : 1)
    for (int l = 0; l < k; ++l) {
      const int iy = y0 + i, ix = x0 + l, place = i * k + l;
      if (iy < 0 || iy >= h || ix < 0 || ix >= w) continue;
      const auto v = load<E, W>(g.x, image + (iy * w + ix) * c);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const float z = bn_affine<E>(E::widen(v.at[j]), affine.scale.at[j], affine.shift.at[j]);
        E::take_max(E::rounded(g.relu ? E::relu(z) : z), place, v.at[j], best[j], best_at[j], taken.at[j]);
      }
    }
  Pack<E, W> y;
  Places<W> places;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    y.at[j] = E::narrow(best[j]);
    places.at[j] = (uint8_t)best_at[j];
  }
  const int64_t at = ((int64_t)row * g.ow + column) * c + channel;
  store<E, W>(g.y, at, y);
  if (g.taken) store<E, W>(g.taken, at, taken);
  *reinterpret_cast<Places<W>*>(g.index + at) = places;
}

// A thread writes one pixel.
template <class E, int W, int K, int S>
__global__ void __launch_bounds__(kThreads)
    max_pool_index_kernel(const Pool<PoolIndexArgs, K, S> g) {
  const Pixel out(g.ow, (int)g.c, W);
  if (!out.inside) return;
  take_of_window<E, W>(g, blockIdx.x, out.column, out.channel, Affine<W>(g, out.channel));
}

// A strip, by stem_pool.cuh.
template <class E>
__global__ void __launch_bounds__(kThreads) stem_pool_index_kernel(const Pool<PoolIndexArgs, 3, 2> g) {
  constexpr int W = 2 * Taken::N;
  const Pixel out(g.ow, (int)g.c, W);
  if (!out.inside) return;
  const unsigned strips = strips_along(g.oh), image = blockIdx.x / strips;
  const int first = (int)(blockIdx.x % strips) * kStrip, rows = min(kStrip, g.oh - first);
  const Affine<W> affine(g, out.channel);
  const Rows<E> read(g, affine, (int64_t)image * g.h * g.w * g.c + out.channel, out.column);
  Taken above = read(first * 2 - (int)g.p);
  unsigned with_nan = 0;
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {
    const int y0 = (first + i) * 2 - (int)g.p;
    const Taken middle = read(y0 + 1), below = read(y0 + 2);
    const Taken best = above.at(read.inside(y0) - y0).or_larger(middle.at(1)).or_larger(below.at(read.inside(y0 + 2) - y0));
    best.store(g, (((int64_t)image * g.oh + first + i) * g.ow + out.column) * g.c + out.channel);
    with_nan |= (unsigned)best.any_nan() << i;
    above = below;
  }
  for (int i = 0; i < rows; ++i)
    if (with_nan >> i & 1) take_of_window<E, W>(g, image * g.oh + first + i, out.column, out.channel, affine);
}

// Each element of the input gathers from the windows over it, in one order.
template <class E, int W, int K, int S>
__global__ void __launch_bounds__(kThreads)
    max_pool_backward_kernel(const Pool<PoolBackwardArgs, K, S> g) {
  const Square<S> square(g, W);
  if (!square.inside) return;
  const PooledGradient<E, W, K, S> grad(g, square);
  square.each_pixel(g, [&](int dy, int dx, int64_t at) {
    Pack<E, W> grad_x;
#pragma unroll
    for (int j = 0; j < W; ++j) grad_x.at[j] = E::narrow(grad.at(dy, dx, j));
    store<E, W>(g.grad_x, at + square.channel, grad_x);
  });
}

// -------------------------------------------------------------------------------------------------

template <class E, int W, int K, int S>
void launch_with(const Pool<PoolIndexArgs, K, S>& g, Stream stream) {
  if constexpr (K == 3 && S == 2 && W == 2 * Taken::N)
    if (g.relu)
      return put("max_pool_index", stem_pool_index_kernel<E>,
                 blocks("max_pool_index", g, g.n * strips_along(g.oh), g.ow, W), dim3(kThreads), g, stream);
  put("max_pool_index", max_pool_index_kernel<E, W, K, S>,
      blocks("max_pool_index", g, g.n * g.oh, g.ow, W), dim3(kThreads), g, stream);
}

template <class E, int W, int K, int S>
void launch_with(const Pool<PoolBackwardArgs, K, S>& g, Stream stream) {
  put("max_pool_backward", max_pool_backward_kernel<E, W, K, S>,
      square_blocks<S>("max_pool_backward", g, W),
      dim3(kThreads), g, stream);
}

template <class Args>
void launch_pool(DType dtype, const Args& args, std::initializer_list<const void*> addresses,
                 Stream stream) {
  with_element(dtype, args.c, addresses, [&](auto element, auto width) {
    with_window(args, [&](const auto& pool) {
      launch_with<decltype(element), decltype(width)::value>(pool, stream);
    });
  });
}

}  // namespace

void launch(DType dtype, const PoolIndexArgs& args, Stream stream) {
  launch_pool(dtype, args, {args.x, args.y, args.taken, args.index, args.scale, args.shift}, stream);
}

void launch(DType dtype, const PoolBackwardArgs& args, Stream stream) {
  launch_pool(dtype, args, {args.grad, args.index, args.grad_x}, stream);
}

}  // namespace rf::cuda
