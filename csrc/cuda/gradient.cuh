// What both passes of the backward read: gradient, inputs, and what decides about the ReLU's mask.
#pragma once

#include "affine.cuh"

namespace rf::cuda {
namespace {

#include "../common/bn_math.h"

// Whether maps of E can come with such a mask: bits are of 16-bit ones.
template <class E, Mask M>
constexpr bool has_mask = M != Mask::from_bits || sizeof(typename E::T) == 2;

// The vectors of the forward where the mask is computed again.
template <int W, Mask M>
struct MaskVectors {
  __device__ __forceinline__ MaskVectors(const BnGradient&, int64_t) {}
  __device__ __forceinline__ MaskVectors(const BnGradient&, const Thread&) {}
};

template <int W>
struct MaskVectors<W, Mask::recomputed> {
  Channels<W> scale, shift;

  __device__ __forceinline__ MaskVectors(const BnGradient& g, int64_t channel)
      : scale(g.scale, channel), shift(g.shift, channel) {}
  // Of all threads of a block.
  __device__ __forceinline__ MaskVectors(const BnGradient& g, const Thread& t) {
    const BlockAffine<W> own(g, t);
    scale = own.scale;
    shift = own.shift;
  }
};

// R rows of a thread, all read at once; at(i) is the element at which its part of row i begins.
template <class E, int W, Mask M, bool DUAL, int R>
struct GradientRows {
  static constexpr int N2 = DUAL ? R : 1, NY = M == Mask::from_y ? R : 1;
  static constexpr int NB = M == Mask::from_bits ? R : 1;
  Pack<E, W> grad[R], x[R], x2[N2], y[NY];
  unsigned bits[NB];

  template <class At>
  __device__ __forceinline__ GradientRows(const BnGradient& g, At at) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      grad[i] = load<E, W>(g.grad, at(i));
      x[i] = load<E, W>(g.x, at(i));
      if (DUAL) x2[i % N2] = load<E, W>(g.x2, at(i));
      if (M == Mask::from_y) y[i % NY] = load<E, W>(g.y, at(i));
      // Of the channels read: all that a byte tells, or one.
      if (M == Mask::from_bits)
        bits[i % NB] = (unsigned)g.bits[at(i) / kBits] >> (W == kBits ? 0 : at(i) % kBits);
    }
  }

  // The gradient behind the ReLU.
  __device__ __forceinline__ float masked(int i, int j, float x, const MaskVectors<W, M>& v) const {
    const float g = E::widen(grad[i].at[j]);
    if constexpr (M == Mask::from_y) return relu_gradient<E>(g, E::widen(y[i].at[j]));
    if constexpr (M == Mask::from_bits) return bits[i] >> j & 1 ? g : 0;
    if constexpr (M == Mask::recomputed)
      return relu_gradient<E>(g, bn_affine<E>(x, v.scale.at[j], v.shift.at[j]));
    return g;
  }
};

// f(mask, dual) as compile-time constants. Two inputs always come with y or its bits, if there was a
// ReLU.
template <class F>
void with_mask(const BnGradient& g, F f) {
  constexpr std::integral_constant<Mask, Mask::none> none;
  constexpr std::integral_constant<Mask, Mask::from_y> from_y;
  constexpr std::integral_constant<Mask, Mask::from_bits> from_bits;
  constexpr std::integral_constant<Mask, Mask::recomputed> recomputed;
  if (g.relu && g.bits) return g.x2 ? f(from_bits, std::true_type{}) : f(from_bits, std::false_type{});
  if (g.relu && !g.y) return f(recomputed, std::false_type{});
  if (g.relu) return g.x2 ? f(from_y, std::true_type{}) : f(from_y, std::false_type{});
  g.x2 ? f(none, std::true_type{}) : f(none, std::false_type{});
}

}  // namespace
}  // namespace rf::cuda
