// The max pool of the stem in training: which element of each window was taken, and backward. Each
// thread writes W channels of one pixel, backward of a few, each block a part of a row: places within
// an image are numbers of 32 bits, as divisions of longer ones would outlast the memory.
#include "pool.cuh"

namespace rf::cuda {
namespace {

#include "../common/bn_math.h"

// The first of equals, the last NaN, as torch; values are compared as a map in between would have
// had them.
template <class E, int W, int K, int S>
__global__ void __launch_bounds__(kThreads)
    max_pool_index_kernel(const Pool<PoolIndexArgs, K, S> g) {
  const int c = (int)g.c, h = (int)g.h, w = (int)g.w, k = g.side(), p = (int)g.p;
  const Pixel out(g.ow, c, W);
  if (!out.inside) return;
  const int y0 = (int)(blockIdx.x % g.oh) * g.step() - p, x0 = out.column * g.step() - p;
  const int64_t image = (int64_t)(blockIdx.x / g.oh) * h * w * c + out.channel;
  const bool normalised = g.scale;
  Channels<W> scale, shift;
  if (normalised) {
    scale = Channels<W>(g.scale, out.channel);
    shift = Channels<W>(g.shift, out.channel);
  }
  float best[W];
  int best_at[W];
#pragma unroll
  for (int j = 0; j < W; ++j) {
    best[j] = -INFINITY;
    best_at[j] = max(0, -y0) * k + max(0, -x0);  // the first that is not padding
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
        float value = E::widen(v.at[j]);
        if (normalised) {
          value = bn_affine<E>(value, scale.at[j], shift.at[j]);
          value = E::rounded(g.relu ? E::relu(value) : value);
        }
        E::take_max(value, place, best[j], best_at[j]);
      }
    }
  Pack<E, W> y;
  Places<W> places;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    y.at[j] = E::narrow(best[j]);
    places.at[j] = (uint8_t)best_at[j];
  }
  const int64_t at = ((int64_t)blockIdx.x * g.ow + out.column) * c + out.channel;
  store<E, W>(g.y, at, y);
  *reinterpret_cast<Places<W>*>(g.index + at) = places;
}

// Each element of the input gathers from the windows over it, in one order.
template <class E, int W, int K, int S>
__global__ void __launch_bounds__(kThreads)
    max_pool_backward_kernel(const Pool<PoolBackwardArgs, K, S> g) {
  const OwnSquare<S> square(g, W);
  if (!square.inside) return;
  const PooledGradient<E, W, K, S> grad(g, square, square.channel);
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
  launch_pool(dtype, args, {args.x, args.y, args.index, args.scale, args.shift}, stream);
}

void launch(DType dtype, const PoolBackwardArgs& args, Stream stream) {
  launch_pool(dtype, args, {args.grad, args.index, args.grad_x}, stream);
}

}  // namespace rf::cuda
