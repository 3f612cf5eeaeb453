// The max pool of the stem in training: which element of each window was taken, and backward. Each
// thread writes W channels of one pixel.
#include "launch.cuh"

namespace rf::cuda {
namespace {

template <int W>
struct alignas(W) Places {
  uint8_t at[W];
};

// The W channels and the pixel that a thread writes, of a map of `pixels` by c.
struct Pixel {
  int64_t channel, index;
  bool inside;

  __device__ __forceinline__ Pixel(int64_t pixels, int64_t c, int width) {
    const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x, vectors = c / width;
    index = i / vectors;
    channel = i % vectors * width;
    inside = index < pixels;
  }
};

template <class Args>
struct Pool : Args {
  int64_t oh, ow;
};

// The first of equals, the last NaN, as torch.
template <class E, int W>
__global__ void __launch_bounds__(kThreads) max_pool_index_kernel(const Pool<PoolIndexArgs> g) {
  const Pixel out(g.n * g.oh * g.ow, g.c, W);
  if (!out.inside) return;
  const int64_t x0 = out.index % g.ow * g.s - g.p, row = out.index / g.ow;
  const int64_t y0 = row % g.oh * g.s - g.p, image = row / g.oh * g.h;
  const int64_t top = max64(0, y0), bottom = min64(g.h, y0 + g.k);
  const int64_t left = max64(0, x0), right = min64(g.w, x0 + g.k);
  float best[W];
  int best_at[W];
#pragma unroll
  for (int j = 0; j < W; ++j) {
    best[j] = -INFINITY;
    best_at[j] = (int)((top - y0) * g.k + left - x0);
  }
  for (int64_t iy = top; iy < bottom; ++iy)
    for (int64_t ix = left; ix < right; ++ix) {
      const auto v = load<E, W>(g.x, ((image + iy) * g.w + ix) * g.c + out.channel);
      const int place = (int)((iy - y0) * g.k + ix - x0);
#pragma unroll
      for (int j = 0; j < W; ++j) E::take_max(E::widen(v.at[j]), place, best[j], best_at[j]);
    }
  Pack<E, W> y;
  Places<W> places;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    y.at[j] = E::narrow(best[j]);
    places.at[j] = (uint8_t)best_at[j];
  }
  const int64_t at = out.index * g.c + out.channel;
  store<E, W>(g.y, at, y);
  *reinterpret_cast<Places<W>*>(g.index + at) = places;
}

// Each element of the input gathers from the windows over it, in one order.
template <class E, int W>
__global__ void __launch_bounds__(kThreads)
    max_pool_backward_kernel(const Pool<PoolBackwardArgs> g) {
  const Pixel in(g.n * g.h * g.w, g.c, W);
  if (!in.inside) return;
  const int64_t x0 = in.index % g.w + g.p, row = in.index / g.w;
  const int64_t y0 = row % g.h + g.p, image = row / g.h * g.oh;
  const int64_t first_y = y0 < g.k ? 0 : (y0 - g.k) / g.s + 1, last_y = min64(g.oh, y0 / g.s + 1);
  const int64_t first_x = x0 < g.k ? 0 : (x0 - g.k) / g.s + 1, last_x = min64(g.ow, x0 / g.s + 1);
  float sum[W] = {};
  for (int64_t oy = first_y; oy < last_y; ++oy)
    for (int64_t ox = first_x; ox < last_x; ++ox) {
      const int64_t at = ((image + oy) * g.ow + ox) * g.c + in.channel;
      const int place = (int)((y0 - oy * g.s) * g.k + x0 - ox * g.s);
      const auto grad = load<E, W>(g.grad, at);
      const auto places = *reinterpret_cast<const Places<W>*>(g.index + at);
#pragma unroll
      for (int j = 0; j < W; ++j)
        sum[j] = E::add(sum[j], places.at[j] == place ? E::widen(grad.at[j]) : 0);
    }
  Pack<E, W> grad_x;
#pragma unroll
  for (int j = 0; j < W; ++j) grad_x.at[j] = E::narrow(sum[j]);
  store<E, W>(g.grad_x, in.index * g.c + in.channel, grad_x);
}

// -------------------------------------------------------------------------------------------------

template <class Args>
Pool<Args> with_output_size(const Args& g) {
  return {g, (g.h + 2 * g.p - g.k) / g.s + 1, (g.w + 2 * g.p - g.k) / g.s + 1};
}

}  // namespace

void launch(DType dtype, const PoolIndexArgs& args, Stream stream) {
  const Pool<PoolIndexArgs> g = with_output_size(args);
  with_element(dtype, g.c, {g.x, g.y, g.index}, [&](auto element, auto width) {
    constexpr int W = decltype(width)::value;
    put("max_pool_index", max_pool_index_kernel<decltype(element), W>,
        ceil_div(g.n * g.oh * g.ow * (g.c / W), kThreads), g, stream);
  });
}

void launch(DType dtype, const PoolBackwardArgs& args, Stream stream) {
  const Pool<PoolBackwardArgs> g = with_output_size(args);
  with_element(dtype, g.c, {g.grad, g.index, g.grad_x}, [&](auto element, auto width) {
    constexpr int W = decltype(width)::value;
    put("max_pool_backward", max_pool_backward_kernel<decltype(element), W>,
        ceil_div(g.n * g.h * g.w * (g.c / W), kThreads), g, stream);
  });
}

}  // namespace rf::cuda
