// The max pool of the stem in training: which element of each window was taken, and backward. Each
// thread writes W channels of one pixel, backward of a few, each block a part of a row: places within
// an image are numbers of 32 bits, as divisions of longer ones would outlast the memory.
#include "launch.cuh"

namespace rf::cuda {
namespace {

#include "../common/bn_math.h"

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

// K and S: the window's side and its step where they are the stem's, so that nothing is divided by
// what only the launch knows, or 0.
template <class Args, int K, int S>
struct Pool : Args {
  int oh, ow;

  __device__ __forceinline__ int side() const { return K ? K : (int)this->k; }
  __device__ __forceinline__ int step() const { return S ? S : (int)this->s; }
};

// Pixels of the input in the side of a square that one thread writes. It looks once at each window that
// lies over any of them: of the stem's 3x3 by 2 at 4 for 4 pixels, where each by itself looks at 4.
template <int S>
constexpr int kSquare = S ? S : 1;

// Squares of the padded input that hold any of so many pixels.
template <int S>
__host__ __device__ __forceinline__ int squares_along(int pixels, int padding) {
  return (pixels + padding - 1) / kSquare<S> + 1;
}

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

// Each element of the input gathers from the windows over it, in one order. A square begins where the
// padded input is a multiple of its side.
template <class E, int W, int K, int S>
__global__ void __launch_bounds__(kThreads)
    max_pool_backward_kernel(const Pool<PoolBackwardArgs, K, S> g) {
  constexpr int B = kSquare<S>;
  const int c = (int)g.c, h = (int)g.h, w = (int)g.w, k = g.side(), s = g.step(), p = (int)g.p;
  const int squares = squares_along<S>(h, p);
  const Pixel in(squares_along<S>(w, p), c, W);
  if (!in.inside) return;
  const int y0 = (int)(blockIdx.x % squares) * B, x0 = in.column * B;  // in the padded input
  const int over = (k + s - 1) / s, last_y = y0 / s, last_x = x0 / s;   // windows over a pixel
  const int n = (int)(blockIdx.x / squares);
  const int64_t image = (int64_t)n * g.oh * g.ow * c + in.channel;
  float sum[B][B][W] = {};
#pragma unroll(K ? K : 1)
  for (int i = over - 1; i >= 0; --i)
#pragma unroll(K ? K : 1)
    for (int l = over - 1; l >= 0; --l) {
      const int oy = last_y - i, ox = last_x - l;
      const int down = K ? i * s : y0 - oy * s, right = K ? l * s : x0 - ox * s;
      if (oy < 0 || oy >= g.oh || down >= k || ox < 0 || ox >= g.ow || right >= k) continue;
      const int64_t at = image + (oy * g.ow + ox) * c;
      const auto grad = load<E, W>(g.grad, at);
      const auto places = *reinterpret_cast<const Places<W>*>(g.index + at);
#pragma unroll
      for (int dy = 0; dy < B; ++dy)
#pragma unroll
        for (int dx = 0; dx < B; ++dx) {
          if (down + dy >= k || right + dx >= k) continue;
          const int place = (down + dy) * k + right + dx;
#pragma unroll
          for (int j = 0; j < W; ++j)
            sum[dy][dx][j] = E::add(sum[dy][dx][j], places.at[j] == place ? E::widen(grad.at[j]) : 0);
        }
    }
#pragma unroll
  for (int dy = 0; dy < B; ++dy)
#pragma unroll
    for (int dx = 0; dx < B; ++dx) {
      const int y = y0 + dy - p, x = x0 + dx - p;
      if (y < 0 || y >= h || x < 0 || x >= w) continue;
      Pack<E, W> grad_x;
#pragma unroll
      for (int j = 0; j < W; ++j) grad_x.at[j] = E::narrow(sum[dy][dx][j]);
      store<E, W>(g.grad_x, (((int64_t)n * h + y) * w + x) * c + in.channel, grad_x);
    }
}

// -------------------------------------------------------------------------------------------------

// Blocks for `rows` rows of `w` pixels by g.c.
template <class G>
dim3 blocks(const char* name, const G& g, int64_t rows, int64_t w, int width) {
  const int64_t parts = ceil_div(w * (g.c / width), kThreads);
  const int64_t image = max64(g.h * g.w, int64_t(g.oh) * g.ow) * g.c;
  if (rows > 0x7fffffff || parts > 0xffff || image > 0x7fffffff)
    throw std::runtime_error(std::string(name) + ": the map is too large");
  return dim3((unsigned)rows, (unsigned)parts);
}

// f(pool) with the window as constants where it is the stem's.
template <class Args, class F>
void with_window(const Args& g, F f) {
  const int oh = (int)((g.h + 2 * g.p - g.k) / g.s + 1), ow = (int)((g.w + 2 * g.p - g.k) / g.s + 1);
  if (g.k == 3 && g.s == 2) return f(Pool<Args, 3, 2>{g, oh, ow});
  f(Pool<Args, 0, 0>{g, oh, ow});
}

template <class E, int W, int K, int S>
void launch_with(const Pool<PoolIndexArgs, K, S>& g, Stream stream) {
  put("max_pool_index", max_pool_index_kernel<E, W, K, S>,
      blocks("max_pool_index", g, g.n * g.oh, g.ow, W), dim3(kThreads), g, stream);
}

template <class E, int W, int K, int S>
void launch_with(const Pool<PoolBackwardArgs, K, S>& g, Stream stream) {
  put("max_pool_backward", max_pool_backward_kernel<E, W, K, S>,
      blocks("max_pool_backward", g, g.n * squares_along<S>((int)g.h, (int)g.p),
             squares_along<S>((int)g.w, (int)g.p), W),
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
