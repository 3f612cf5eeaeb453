// y = act(x*scale + shift + r), one pass; r = 0, residual, or residual*residual_scale +
// residual_shift: the BatchNorm of a projection shortcut.
#include "affine.cuh"

namespace rf::cuda {
namespace {

#include "../common/bn_math.h"

constexpr int kRows = 4;  // of each thread: their loads are in flight together

// With BITS, W are the channels that a byte tells of.
template <class E, int W, Shortcut S, bool BITS>
__global__ void __launch_bounds__(kThreads) bn_act_kernel(const Tiled<BnActArgs> g) {
  const Thread t(g.tiling, W);
  const int64_t first = t.part * kRows * t.step + t.row;
  Pack<E, W> x[kRows], r[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first + i * t.step, at = row * g.c + t.channel;
    if (t.inside && row < g.rows) x[i] = load<E, W>(g.x, at);
    if (S != Shortcut::none && t.inside && row < g.rows) r[i] = load<E, W>(g.residual, at);
  }
  const BlockAffine<W> own(g, t);  // what was read is on its way
  if (!t.inside) return;
  Channels<W> scale2, shift2;
  if (S == Shortcut::affine) {
    scale2 = Channels<W>(g.residual_scale, t.channel);
    shift2 = Channels<W>(g.residual_shift, t.channel);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first + i * t.step;
    if (row >= g.rows) break;
    Pack<E, W> y;
    unsigned passed = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      float z = bn_affine<E>(E::widen(x[i].at[j]), own.scale.at[j], own.shift.at[j]);
      if (S == Shortcut::plain) z = E::add(z, E::widen(r[i].at[j]));
      if (S == Shortcut::affine)
        z = E::add(z, bn_affine<E>(E::widen(r[i].at[j]), scale2.at[j], shift2.at[j]));
      y.at[j] = E::narrow(g.relu ? E::relu(z) : z);
      if (BITS) passed |= (E::widen(y.at[j]) == 0 ? 0u : 1u) << j;
    }
    store<E, W>(g.y, row * g.c + t.channel, y);
    if (BITS) g.bits[(row * g.c + t.channel) / kBits] = (uint8_t)passed;
  }
}

// -------------------------------------------------------------------------------------------------

template <Shortcut S>
void launch_with(DType dtype, const BnActArgs& args, Stream stream) {
  with_element(
      dtype, args.c,
      {args.x, args.scale, args.shift, args.residual, args.residual_scale, args.residual_shift,
       args.y},
      [&](auto element, auto width) {
        using E = decltype(element);
        constexpr int W = decltype(width)::value;
        Tiling tiling(args.rows, args.c, W);
        tiling.parts = ceil_div(args.rows, kRows * tiling.rows_at_once());
        if constexpr (S != Shortcut::none)
          if (args.bits) {
            if constexpr (W == kBits)
              return put("bn_act", bn_act_kernel<E, W, S, true>, tiling.blocks(), {args, tiling}, stream);
            throw std::runtime_error("bn_act: bits are made of maps and vectors at 16-byte addresses");
          }
        put("bn_act", bn_act_kernel<E, W, S, false>, tiling.blocks(), {args, tiling}, stream);
      });
}

}  // namespace

void launch(DType dtype, const BnActArgs& args, Stream stream) {
  if (!args.residual) return launch_with<Shortcut::none>(dtype, args, stream);
  args.residual_scale ? launch_with<Shortcut::affine>(dtype, args, stream)
                      : launch_with<Shortcut::plain>(dtype, args, stream);
}

}  // namespace rf::cuda
