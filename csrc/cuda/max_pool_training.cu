// The max pool of the stem in training: which element of each window was taken, and backward. Each
// thread writes W channels of one pixel, each block a part of a row: places within an image are
// numbers of 32 bits, as divisions of longer ones would outlast the memory.
#include "launch.cuh"

namespace rf::cuda {
namespace {

template <int W>
struct alignas(W) Places {
  uint8_t at[W];
};

// The W channels and the pixel that a thread writes, of a map with rows of `w` pixels by c.
struct Pixel {
  int channel, column;
  bool inside;

  __device__ __forceinline__ Pixel(int w, int c, int width) {
    const unsigned i = blockIdx.y * kThreads + threadIdx.x, vectors = c / width;
    column = (int)(i / vectors);
    channel = (int)(i % vectors) * width;
    inside = column < w;
  }
};

template <class Args>
struct Pool : Args {
  int oh, ow;
};

// The first of equals, the last NaN, as torch.
template <class E, int W>
__global__ void __launch_bounds__(kThreads) max_pool_index_kernel(const Pool<PoolIndexArgs> g) {
  const int c = (int)g.c, h = (int)g.h, w = (int)g.w, k = (int)g.k, s = (int)g.s, p = (int)g.p;
  const Pixel out(g.ow, c, W);
  if (!out.inside) return;
  const int y0 = (int)(blockIdx.x % g.oh) * s - p, x0 = out.column * s - p;
  const int top = max(0, y0), bottom = min(h, y0 + k), left = max(0, x0), right = min(w, x0 + k);
  const int64_t image = (int64_t)(blockIdx.x / g.oh) * h * w * c + out.channel;
  float best[W];
  int best_at[W];
#pragma unroll
  for (int j = 0; j < W; ++j) {
    best[j] = -INFINITY;
    best_at[j] = (top - y0) * k + left - x0;
  }
  for (int iy = top; iy < bottom; ++iy)
    for (int ix = left; ix < right; ++ix) {
      const auto v = load<E, W>(g.x, image + (iy * w + ix) * c);
      const int place = (iy - y0) * k + ix - x0;
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
  const int64_t at = ((int64_t)blockIdx.x * g.ow + out.column) * c + out.channel;
  store<E, W>(g.y, at, y);
  *reinterpret_cast<Places<W>*>(g.index + at) = places;
}

// Each element of the input gathers from the windows over it, in one order.
template <class E, int W>
__global__ void __launch_bounds__(kThreads)
    max_pool_backward_kernel(const Pool<PoolBackwardArgs> g) {
  const int c = (int)g.c, h = (int)g.h, k = (int)g.k, s = (int)g.s;
  const Pixel in((int)g.w, c, W);
  if (!in.inside) return;
  const int y0 = (int)(blockIdx.x % h + g.p), x0 = in.column + (int)g.p;
  const int first_y = y0 < k ? 0 : (y0 - k) / s + 1, last_y = min(g.oh, y0 / s + 1);
  const int first_x = x0 < k ? 0 : (x0 - k) / s + 1, last_x = min(g.ow, x0 / s + 1);
  const int64_t image = (int64_t)(blockIdx.x / h) * g.oh * g.ow * c + in.channel;
  float sum[W] = {};
  for (int oy = first_y; oy < last_y; ++oy)
    for (int ox = first_x; ox < last_x; ++ox) {
      const int64_t at = image + (oy * g.ow + ox) * c;
      const int place = (y0 - oy * s) * k + x0 - ox * s;
      const auto grad = load<E, W>(g.grad, at);
      const auto places = *reinterpret_cast<const Places<W>*>(g.index + at);
#pragma unroll
      for (int j = 0; j < W; ++j)
        sum[j] = E::add(sum[j], places.at[j] == place ? E::widen(grad.at[j]) : 0);
    }
  Pack<E, W> grad_x;
#pragma unroll
  for (int j = 0; j < W; ++j) grad_x.at[j] = E::narrow(sum[j]);
  store<E, W>(g.grad_x, ((int64_t)blockIdx.x * g.w + in.column) * c + in.channel, grad_x);
}

// -------------------------------------------------------------------------------------------------

template <class Args>
Pool<Args> with_output_size(const Args& g) {
  return {g, (int)((g.h + 2 * g.p - g.k) / g.s + 1), (int)((g.w + 2 * g.p - g.k) / g.s + 1)};
}

// Blocks for `rows` rows of `w` pixels by g.c.
template <class Args>
dim3 blocks(const char* name, const Pool<Args>& g, int64_t rows, int64_t w, int width) {
  const int64_t parts = ceil_div(w * (g.c / width), kThreads);
  const int64_t image = max64(g.h * g.w, int64_t(g.oh) * g.ow) * g.c;
  if (rows > 0x7fffffff || parts > 0xffff || image > 0x7fffffff)
    throw std::runtime_error(std::string(name) + ": the map is too large");
  return dim3((unsigned)rows, (unsigned)parts);
}

}  // namespace

void launch(DType dtype, const PoolIndexArgs& args, Stream stream) {
  const Pool<PoolIndexArgs> g = with_output_size(args);
  with_element(dtype, g.c, {g.x, g.y, g.index}, [&](auto element, auto width) {
    constexpr int W = decltype(width)::value;
    put("max_pool_index", max_pool_index_kernel<decltype(element), W>,
        blocks("max_pool_index", g, g.n * g.oh, g.ow, W), dim3(kThreads), g, stream);
  });
}

void launch(DType dtype, const PoolBackwardArgs& args, Stream stream) {
  const Pool<PoolBackwardArgs> g = with_output_size(args);
  with_element(dtype, g.c, {g.grad, g.index, g.grad_x}, [&](auto element, auto width) {
    constexpr int W = decltype(width)::value;
    put("max_pool_backward", max_pool_backward_kernel<decltype(element), W>,
        blocks("max_pool_backward", g, g.n * g.h, g.w, W), dim3(kThreads), g, stream);
  });
}

}  // namespace rf::cuda
