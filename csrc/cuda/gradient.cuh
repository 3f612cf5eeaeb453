// What both passes of the backward read: gradient, inputs, and what decides about the ReLU's mask.
#pragma once

#include "launch.cuh"

namespace rf::cuda {
namespace {

#include "../common/bn_math.h"

// The vectors of the forward where the mask is computed again.
template <int W, Mask M>
struct MaskVectors {
  __device__ __forceinline__ MaskVectors(const BnGradient&, int64_t) {}
};

template <int W>
struct MaskVectors<W, Mask::recomputed> {
  Channels<W> scale, shift;

  __device__ __forceinline__ MaskVectors(const BnGradient& g, int64_t channel)
      : scale(g.scale, channel), shift(g.shift, channel) {}
};

// R rows of a thread, from `first` on and before `end`, all read at once.
template <class E, int W, Mask M, bool DUAL, int R>
struct GradientRows {
  static constexpr int N2 = DUAL ? R : 1, NY = M == Mask::from_y ? R : 1;
  Pack<E, W> grad[R], x[R], x2[N2], y[NY];
  int64_t first, end, c, channel;
  int step;

  __device__ __forceinline__ GradientRows(const BnGradient& g, const Thread& t, int64_t first,
                                          int64_t end)
      : first(first), end(end), c(g.c), channel(t.channel), step(t.step) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (has(i)) grad[i] = load<E, W>(g.grad, at(i));
      if (has(i)) x[i] = load<E, W>(g.x, at(i));
      if (DUAL && has(i)) x2[i % N2] = load<E, W>(g.x2, at(i));
      if (M == Mask::from_y && has(i)) y[i % NY] = load<E, W>(g.y, at(i));
    }
  }

  __device__ __forceinline__ bool has(int i) const { return first + i * step < end; }
  __device__ __forceinline__ int64_t at(int i) const { return (first + i * step) * c + channel; }

  // The gradient behind the ReLU.
  __device__ __forceinline__ float masked(int i, int j, float x, const MaskVectors<W, M>& v) const {
    const float g = E::widen(grad[i].at[j]);
    if constexpr (M == Mask::from_y) return relu_gradient<E>(g, E::widen(y[i].at[j]));
    if constexpr (M == Mask::recomputed)
      return relu_gradient<E>(g, bn_affine<E>(x, v.scale.at[j], v.shift.at[j]));
    return g;
  }
};

// f(mask, dual) as compile-time constants. Two inputs always come with y, if there was a ReLU.
template <class F>
void with_mask(const BnGradient& g, F f) {
  constexpr std::integral_constant<Mask, Mask::none> none;
  constexpr std::integral_constant<Mask, Mask::from_y> from_y;
  constexpr std::integral_constant<Mask, Mask::recomputed> recomputed;
  if (g.relu && !g.y) return f(recomputed, std::false_type{});
  if (g.relu) return g.x2 ? f(from_y, std::true_type{}) : f(from_y, std::false_type{});
  g.x2 ? f(none, std::true_type{}) : f(none, std::false_type{});
}

}  // namespace
}  // namespace rf::cuda
