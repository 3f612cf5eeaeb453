// The second pass of BatchNorm's backward behind ReLU and a max pool: it gathers from the pool's windows
// what comes to an element, which so is never written. A thread takes a square of pixels.
#include "gradient.cuh"
#include "pool.cuh"

namespace rf::cuda {
namespace {

// A square's elements of x, in place of those outside of the map the nearest; and their gradients
// behind the ReLU. All is read at once.
template <class E, int W, Mask M, int K, int S>
struct SquareGradient {
  static constexpr int B = kSquare<S>;
  Pack<E, W> x[B][B];
  PooledGradient<E, W, K, S> grad;

  template <class G>
  __device__ __forceinline__ SquareGradient(const G& g, const Square<S>& square)
      : grad(g, square) {
    const int h = (int)g.h, w = (int)g.w, c = (int)g.c, p = (int)g.p;
    const int64_t image = (int64_t)square.n * (h * w * c) + square.channel;
#pragma unroll
    for (int dy = 0; dy < B; ++dy)
#pragma unroll
      for (int dx = 0; dx < B; ++dx) {
        const int iy = min(max(square.y + dy - p, 0), h - 1);
        const int ix = min(max(square.x + dx - p, 0), w - 1);
        x[dy][dx] = load<E, W>(g.x, image + (iy * w + ix) * c);
      }
  }

  __device__ __forceinline__ float masked(int dy, int dx, int j, float x,
                                          const MaskVectors<W, M>& v) const {
    const float g = grad.at(dy, dx, j);
    if constexpr (M == Mask::recomputed)
      return relu_gradient<E>(g, bn_affine<E>(x, v.scale.at[j], v.shift.at[j]));
    return g;
  }
};

// grad_x = g*a + x*b + d.
template <class E, int W, Mask M, int K, int S>
__global__ void __launch_bounds__(kThreads)
    bn_max_pool_apply_kernel(const Pool<BnPoolApplyArgs, K, S> g) {
  const Square<S> square(g, W);
  if (!square.inside) return;
  const SquareGradient<E, W, M, K, S> maps(g, square);
  const Channels<W> a(g.a, square.channel), b(g.b, square.channel), d(g.d, square.channel);
  const MaskVectors<W, M> mask(g, square.channel);
  square.each_pixel(g, [&](int dy, int dx, int64_t at) {
    Pack<E, W> grad_x;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float x = widened(maps.x[dy][dx], j), v = maps.masked(dy, dx, j, x, mask);
      grad_x.at[j] = E::narrow(bn_gradient<E>(v, x, a.at[j], b.at[j], d.at[j]));
    }
    store<E, W>(g.grad_x, at + square.channel, grad_x);
  });
}

// -------------------------------------------------------------------------------------------------

template <class E, int W, Mask M, int K, int S>
void launch_with(const Pool<BnPoolApplyArgs, K, S>& g, Stream stream) {
  put("bn_act_max_pool_backward", bn_max_pool_apply_kernel<E, W, M, K, S>,
      square_blocks<S>("bn_act_max_pool_backward", g, W), dim3(kThreads), g, stream);
}

}  // namespace

void launch(DType dtype, const BnPoolApplyArgs& args, Stream stream) {
  const std::initializer_list<const void*> addresses = {
      args.grad, args.index, args.x, args.scale, args.shift, args.a, args.b, args.d, args.grad_x};
  with_element(dtype, args.c, addresses, [&](auto element, auto width) {
    using E = decltype(element);
    constexpr int W = decltype(width)::value;
    with_window(args, [&](const auto& pool) {
      args.relu ? launch_with<E, W, Mask::recomputed>(pool, stream)
                : launch_with<E, W, Mask::none>(pool, stream);
    });
  });
}

}  // namespace rf::cuda
