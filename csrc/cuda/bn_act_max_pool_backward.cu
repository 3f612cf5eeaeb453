// Both passes of BatchNorm's backward behind ReLU and a max pool: each gathers from the pool's windows
// what comes to an element, which so is never written. A thread takes squares of pixels.
#include "gradient.cuh"
#include "pool.cuh"
#include "reduction.cuh"

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
  __device__ __forceinline__ SquareGradient(const G& g, const Square& square, int64_t channel)
      : grad(g, square, channel) {
    const int h = (int)g.h, w = (int)g.w, c = (int)g.c, p = (int)g.p;
    const int64_t image = (int64_t)square.n * (h * w * c) + channel;
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

// Every step-th square from one on; the step is counted on along each side, as divisions are slow.
template <int S>
struct Squares : Square {
  static constexpr int B = kSquare<S>;
  int end_y, end_x, step_n, step_y, step_x;

  template <class G>
  __device__ __forceinline__ Squares(const G& g, int64_t first, int step) {
    const int down = squares_along<S>((int)g.h, (int)g.p), across = squares_along<S>((int)g.w, (int)g.p);
    const int each = down * across, beyond = step % each;
    n = (int)(first / each);
    const int within = (int)(first - (int64_t)n * each);
    y = within / across * B;
    x = within % across * B;
    step_n = step / each;
    step_y = beyond / across * B;
    step_x = beyond % across * B;
    end_y = down * B;
    end_x = across * B;
  }

  __device__ __forceinline__ void next() {
    n += step_n;
    y += step_y;
    x += step_x;
    if (x >= end_x) x -= end_x, y += B;
    if (y >= end_y) y -= end_y, ++n;
  }
};

// Of each part, channel by channel: the sums of g and those of g * (x - mean). To an element outside of
// the map comes nothing, and what is read in its place is an element of the same channel: it adds zero.
template <class E, int W, Mask M, int K, int S>
__global__ void __launch_bounds__(kThreads, 2)
    bn_max_pool_parts_kernel(const Tiled<Pool<BnPoolReduceArgs, K, S>> g) {
  constexpr int B = kSquare<S>;
  __shared__ PutDown<2, W> put_down;
  const Thread t(g.tiling, W);
  float sum[2][W] = {};
  if (t.inside) {
    const Channels<W> mean(g.mean, t.channel);
    const MaskVectors<W, M> mask(g, t.channel);
    const int64_t begin = part_begin(g.tiling.rows, g.tiling.parts, t.part);
    const int64_t end = part_begin(g.tiling.rows, g.tiling.parts, t.part + 1);
    int left = ((int)(end - begin) + t.step - 1 - t.row) / t.step;
    Squares<S> square(g, begin + t.row, t.step);
#pragma unroll 1
    for (; left > 0; --left, square.next()) {
      const SquareGradient<E, W, M, K, S> maps(g, square, t.channel);
#pragma unroll
      for (int j = 0; j < W; ++j)
#pragma unroll
        for (int dy = 0; dy < B; ++dy)
#pragma unroll
          for (int dx = 0; dx < B; ++dx) {
            const float x = widened(maps.x[dy][dx], j), v = maps.masked(dy, dx, j, x, mask);
            sum[0][j] = E::add(sum[0][j], v);
            sum[1][j] = bn_add_product<E>(sum[1][j], v, x, mean.at[j]);
          }
    }
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) put_down.put(k, sum[k]);
  __syncthreads();

  const Gather<W> to(t);
  const int64_t channel = to.global(t);
  double* out = reinterpret_cast<double*>(g.scratch) + t.part * 2 * g.c + channel;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    double total = 0;
#pragma unroll
    for (int i = 0; i < W; ++i) total += to.of(put_down.at[k], i);
    total = to.over_groups(total);
    if (to.row == 0 && channel < g.c) out[k * g.c] = total;
  }
}

// grad_x = g*a + x*b + d.
template <class E, int W, Mask M, int K, int S>
__global__ void __launch_bounds__(kThreads)
    bn_max_pool_apply_kernel(const Pool<BnPoolApplyArgs, K, S> g) {
  const OwnSquare<S> square(g, W);
  if (!square.inside) return;
  const SquareGradient<E, W, M, K, S> maps(g, square, square.channel);
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
void launch_with(const Pool<BnPoolReduceArgs, K, S>& g, Stream stream) {
  need_images("bn_act_max_pool_backward", g);
  const int64_t down = squares_along<S>((int)g.h, (int)g.p), across = squares_along<S>((int)g.w, (int)g.p);
  Tiling tiling(g.n * down * across, g.c, W);
  tiling.parts = device_parts(g.rows, g.c);
  put("bn_act_max_pool_backward", bn_max_pool_parts_kernel<E, W, M, K, S>, tiling.blocks(), {g, tiling},
      stream);
  merge_sums(g, tiling.parts, stream);
}

template <class E, int W, Mask M, int K, int S>
void launch_with(const Pool<BnPoolApplyArgs, K, S>& g, Stream stream) {
  put("bn_act_max_pool_backward", bn_max_pool_apply_kernel<E, W, M, K, S>,
      square_blocks<S>("bn_act_max_pool_backward", g, W), dim3(kThreads), g, stream);
}

template <class Args>
void launch_pooled(DType dtype, const Args& args, std::initializer_list<const void*> addresses,
                   Stream stream) {
  with_element(dtype, args.c, addresses, [&](auto element, auto width) {
    using E = decltype(element);
    constexpr int W = decltype(width)::value;
    with_window(args, [&](const auto& pool) {
      args.relu ? launch_with<E, W, Mask::recomputed>(pool, stream)
                : launch_with<E, W, Mask::none>(pool, stream);
    });
  });
}

}  // namespace

void launch(DType dtype, const BnPoolReduceArgs& args, Stream stream) {
  launch_pooled(dtype, args, {args.grad, args.index, args.x, args.scale, args.shift, args.mean}, stream);
}

void launch(DType dtype, const BnPoolApplyArgs& args, Stream stream) {
  launch_pooled(dtype, args,
                {args.grad, args.index, args.x, args.scale, args.shift, args.a, args.b, args.d, args.grad_x},
                stream);
}

}  // namespace rf::cuda
