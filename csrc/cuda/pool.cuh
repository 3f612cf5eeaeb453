// A max pool's windows, and what comes back through them. Places within an image are numbers of 32
// bits, as divisions of longer ones would outlast the memory.
#pragma once

#include "launch.cuh"

namespace rf::cuda {
namespace {

template <int W>
struct alignas(W) Places {
  uint8_t at[W];
};

// Places as words, of which one instruction says of one channel if it is a certain place.
template <int W>
struct alignas(W) PlaceWords {
  static constexpr int N = (W + 3) / 4;
  std::conditional_t<W == 1, uint8_t, unsigned> at[N];

  __device__ __forceinline__ void none() {
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = W == 1 ? 0xff : ~0u;
  }
  __device__ __forceinline__ bool is(int j, unsigned place) const {
    return ((at[j / 4] ^ place * (W == 1 ? 1 : 0x01010101u)) & 0xffu << 8 * (j % 4)) == 0;
  }
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
// what only the launch knows, or 0. Args has the sides n, h, w, c of the pool's input.
template <class Args, int K, int S>
struct Pool : Args {
  int oh, ow;

  __device__ __forceinline__ int side() const { return K ? K : (int)this->k; }
  __device__ __forceinline__ int step() const { return S ? S : (int)this->s; }
};

// Pixels of the input in the side of a square that one thread takes. It looks once at each window that
// lies over any of them: of the stem's 3x3 by 2 at 4 for 4 pixels, where each by itself looks at 4.
template <int S>
constexpr int kSquare = S ? S : 1;

// Squares of the padded input that hold any of so many pixels.
template <int S>
__host__ __device__ __forceinline__ int squares_along(int pixels, int padding) {
  return (pixels + padding - 1) / kSquare<S> + 1;
}

// The square that a thread writes, by its first row and column in the padded input, where it begins at a
// multiple of its side; and its channels.
template <int S>
struct Square {
  int n, y, x, channel;
  bool inside;

  template <class G>
  __device__ __forceinline__ Square(const G& g, int width) {
    const int down = squares_along<S>((int)g.h, (int)g.p);
    const Pixel in(squares_along<S>((int)g.w, (int)g.p), (int)g.c, width);
    n = (int)(blockIdx.x / down);
    y = (int)(blockIdx.x % down) * kSquare<S>;
    x = in.column * kSquare<S>;
    channel = in.channel;
    inside = in.inside;
  }

  // f(dy, dx, at) for the pixels in the map, of which `at` is the first channel's element.
  template <class G, class F>
  __device__ __forceinline__ void each_pixel(const G& g, F f) const {
    const int h = (int)g.h, w = (int)g.w, p = (int)g.p;
#pragma unroll
    for (int dy = 0; dy < kSquare<S>; ++dy)
#pragma unroll
      for (int dx = 0; dx < kSquare<S>; ++dx) {
        const int iy = y + dy - p, ix = x + dx - p;
        if (iy >= 0 && iy < h && ix >= 0 && ix < w) f(dy, dx, (((int64_t)n * h + iy) * w + ix) * g.c);
      }
  }
};

// What comes to channel j of a square's pixels, at(dy, dx, j), from the windows over it. Those of the
// stem are read at once; in place of one that is not there the nearest, with places that are none.
template <class E, int W, int K, int S>
struct PooledGradient {
  static constexpr int N = (K + S - 1) / S;
  Pack<E, W> grad[N][N];
  PlaceWords<W> places[N][N];

  template <class G>
  __device__ __forceinline__ PooledGradient(const G& g, const Square<S>& square) {
    const int c = (int)g.c, oh = g.oh, ow = g.ow;
    const int64_t image = (int64_t)square.n * (oh * ow * c) + square.channel;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int l = 0; l < N; ++l) {
        const int oy = square.y / S - i, ox = square.x / S - l;
        const int64_t at = image + (min(max(oy, 0), oh - 1) * ow + min(max(ox, 0), ow - 1)) * c;
        grad[i][l] = load<E, W>(g.grad, at);
        places[i][l].none();
        if (oy >= 0 && oy < oh && ox >= 0 && ox < ow)
          places[i][l] = *reinterpret_cast<const PlaceWords<W>*>(g.index + at);
      }
  }

  // The sum over the windows, in one order.
  __device__ __forceinline__ float at(int dy, int dx, int j) const {
    float sum = 0;
    bool first = true;
#pragma unroll
    for (int i = N - 1; i >= 0; --i)
#pragma unroll
      for (int l = N - 1; l >= 0; --l) {
        const int down = i * S + dy, right = l * S + dx;
        if (down >= K || right >= K) continue;
        const bool is = places[i][l].is(j, down * K + right);
        const float g = widened(grad[i][l], j);
        sum = first ? (is ? g : 0) : is ? E::add(sum, g) : sum;
        first = false;
      }
    return sum;
  }
};

// Other windows are gone through one by one.
template <class E, int W>
struct PooledGradient<E, W, 0, 0> {
  float sum[W] = {};

  template <class G>
  __device__ __forceinline__ PooledGradient(const G& g, const Square<0>& square) {
    const int c = (int)g.c, k = (int)g.k, s = (int)g.s;
    const int over = (k + s - 1) / s, last_y = square.y / s, last_x = square.x / s;
    const int64_t image = (int64_t)square.n * (g.oh * g.ow * c) + square.channel;
#pragma unroll 1
    for (int oy = max(last_y - over + 1, 0); oy <= min(last_y, g.oh - 1); ++oy)
#pragma unroll 1
      for (int ox = max(last_x - over + 1, 0); ox <= min(last_x, g.ow - 1); ++ox) {
        const int down = square.y - oy * s, right = square.x - ox * s;
        if (down >= k || right >= k) continue;
        const int64_t at = image + (oy * g.ow + ox) * c;
        const auto grad = load<E, W>(g.grad, at);
        const auto places = *reinterpret_cast<const PlaceWords<W>*>(g.index + at);
#pragma unroll
        for (int j = 0; j < W; ++j)
          sum[j] = E::add(sum[j], places.is(j, down * k + right) ? widened(grad, j) : 0);
      }
  }

  __device__ __forceinline__ float at(int, int, int j) const { return sum[j]; }
};

// -------------------------------------------------------------------------------------------------

template <class G>
void need_images(const char* name, const G& g) {
  if (max64(g.h * g.w, int64_t(g.oh) * g.ow) * g.c > 0x7fffffff)
    throw std::runtime_error(std::string(name) + ": the map is too large");
}

// Blocks for `rows` rows of `w` pixels by g.c.
template <class G>
dim3 blocks(const char* name, const G& g, int64_t rows, int64_t w, int width) {
  need_images(name, g);
  const int64_t parts = ceil_div(w * (g.c / width), kThreads);
  if (rows > 0x7fffffff || parts > 0xffff)
    throw std::runtime_error(std::string(name) + ": the map is too large");
  return dim3((unsigned)rows, (unsigned)parts);
}

// Likewise for a Square a thread.
template <int S, class G>
dim3 square_blocks(const char* name, const G& g, int width) {
  return blocks(name, g, g.n * squares_along<S>((int)g.h, (int)g.p),
                squares_along<S>((int)g.w, (int)g.p), width);
}

// f(pool) with the window as constants where it is the stem's.
template <class Args, class F>
void with_window(const Args& g, F f) {
  const int oh = (int)((g.h + 2 * g.p - g.k) / g.s + 1), ow = (int)((g.w + 2 * g.p - g.k) / g.s + 1);
  if (g.k == 3 && g.s == 2) return f(Pool<Args, 3, 2>{g, oh, ow});
  f(Pool<Args, 0, 0>{g, oh, ow});
}

}  // namespace
}  // namespace rf::cuda
