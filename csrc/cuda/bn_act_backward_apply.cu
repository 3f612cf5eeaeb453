// grad_x = g*a + x*b + d with g the gradient behind the ReLU, and grad_x2 from x2 likewise: one pass.
// What the ReLU gave goes to `activation` where given.
#include "gradient.cuh"

namespace rf::cuda {
namespace {

// Of each thread: their loads are in flight together. Half as many where there are two inputs.
template <bool DUAL>
constexpr int kRows = DUAL ? 2 : 4;

template <class E, int W, Mask M, bool DUAL>
__global__ void __launch_bounds__(kThreads) bn_apply_kernel(const Tiled<BnApplyArgs> g) {
  constexpr int R = kRows<DUAL>;
  const Thread t(g.tiling, W);
  const int64_t first = t.part * R * t.step + t.row;
  const bool any = t.inside && first < g.rows;
  if (M != Mask::recomputed && !any) return;  // else the block has vectors to make first
  const auto has = [&](int i) { return first + i * t.step < g.rows; };
  // In place of a row that is not there the first is read again, or, with none, the map's.
  const auto at = [&](int i) {
    return any ? (has(i) ? first + i * t.step : first) * g.c + t.channel : 0;
  };
  const GradientRows<E, W, M, DUAL, R> maps(g, at);
  const MaskVectors<W, M> mask(g, t);  // what was read is on its way
  if (!any) return;
  const Channels<W> a(g.a, t.channel), b(g.b, t.channel), d(g.d, t.channel);
  const Channels<W> a2(DUAL ? g.a2 : g.a, t.channel), b2(DUAL ? g.b2 : g.b, t.channel),
      d2(DUAL ? g.d2 : g.d, t.channel);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (!has(i)) break;
    Pack<E, W> grad_x, grad_x2, activation;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float x = E::widen(maps.x[i].at[j]), v = maps.masked(i, j, x, mask);
      grad_x.at[j] = E::narrow(bn_gradient<E>(v, x, a.at[j], b.at[j], d.at[j]));
      if (DUAL)
        grad_x2.at[j] = E::narrow(
            bn_gradient<E>(v, E::widen(maps.x2[i].at[j]), a2.at[j], b2.at[j], d2.at[j]));
      if constexpr (M == Mask::recomputed)
        activation.at[j] = E::narrow(E::relu(bn_affine<E>(x, mask.scale.at[j], mask.shift.at[j])));
    }
    store<E, W>(g.grad_x, at(i), grad_x);
    if (DUAL) store<E, W>(g.grad_x2, at(i), grad_x2);
    if (M == Mask::recomputed && g.activation) store<E, W>(g.activation, at(i), activation);
  }
}

// -------------------------------------------------------------------------------------------------

template <Mask M, bool DUAL>
void launch_with(DType dtype, const BnApplyArgs& g, Stream stream) {
  with_element(dtype, g.c,
               {g.grad, g.x, g.x2, g.scale, g.shift, g.y, g.a, g.b, g.d, g.a2, g.b2, g.d2,
                g.grad_x, g.grad_x2, g.activation},
               [&](auto element, auto width) {
                 using E = decltype(element);
                 constexpr int W = decltype(width)::value;
                 Tiling tiling(g.rows, g.c, W);
                 tiling.parts = ceil_div(g.rows, kRows<DUAL> * tiling.rows_at_once());
                 if constexpr (has_mask<E, M>)
                   put("bn_act_backward_apply", bn_apply_kernel<E, W, M, DUAL>, tiling.blocks(),
                       {g, tiling}, stream);
               });
}

}  // namespace

void launch(DType dtype, const BnApplyArgs& args, Stream stream) {
  with_mask(args, [&](auto mask, auto dual) {
    launch_with<decltype(mask)::value, decltype(dual)::value>(dtype, args, stream);
  });
}

}  // namespace rf::cuda
