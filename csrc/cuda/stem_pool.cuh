// The stem's pool behind a ReLU, of maps of 16 bits: a word holds two channels, and both are compared at
// once. What a ReLU gives has its bits in order as an integer, and no sign, which so is free to say which
// of two is larger.
#pragma once

#include "pool.cuh"

namespace rf::cuda {
namespace {

#include "../common/bn_math.h"

template <int W>
struct Affine {
  Channels<W> scale, shift;

  __device__ __forceinline__ Affine(const PoolIndexArgs& g, int64_t channel)
      : scale(g.scale, channel), shift(g.shift, channel) {}
};

// What was taken of some elements, for 8 channels: the value, the x it was made of, its place.
struct Taken {
  static constexpr int N = 4;
  unsigned value[N], x[N], place[N];

  // Likewise so many rows further down in the window.
  __device__ __forceinline__ Taken at(int row) const {
    Taken moved = *this;
#pragma unroll
    for (int i = 0; i < N; ++i) moved.place[i] += 3 * row * 0x10001u;
    return moved;
  }
  // Of equals the one at hand.
  __device__ __forceinline__ Taken or_larger(const Taken& other) const {
    Taken larger;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned is = spread_signs(other.value[i] + 0x7fff7fffu - value[i]);
      larger.value[i] = (other.value[i] & is) | (value[i] & ~is);
      larger.x[i] = (other.x[i] & is) | (x[i] & ~is);
      larger.place[i] = (other.place[i] & is) | (place[i] & ~is);
    }
    return larger;
  }
  // A conversion gives NaN all bits but the sign.
  __device__ __forceinline__ bool any_nan() const {
    unsigned carried = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) carried |= value[i] + 0x10001u;
    return carried & 0x80008000u;
  }
  __device__ __forceinline__ void store(const PoolIndexArgs& g, int64_t at) const {
    __stwb(reinterpret_cast<uint4*>(static_cast<uint16_t*>(g.y) + at),
           uint4{value[0], value[1], value[2], value[3]});
    if (g.taken)
      __stwb(reinterpret_cast<uint4*>(static_cast<uint16_t*>(g.taken) + at), uint4{x[0], x[1], x[2], x[3]});
    *reinterpret_cast<uint2*>(g.index + at) =
        uint2{__byte_perm(place[0], place[1], 0x6420), __byte_perm(place[2], place[3], 0x6420)};
  }
};

// Outputs that a thread takes, one below the other: a row that two windows share is read once.
constexpr int kStrip = 4;

__host__ __device__ __forceinline__ unsigned strips_along(int outputs) {
  return (unsigned)(outputs + kStrip - 1) / kStrip;
}

// Reads the three elements of a row under the windows of an output's column, and says what of them is
// taken; in place of an element outside of the map the nearest, as which it then counts.
template <class E>
struct Rows {
  static constexpr int W = 2 * Taken::N;
  const PoolIndexArgs& g;
  const Affine<W>& affine;
  int64_t image;
  int x0;

  __device__ __forceinline__ Rows(const PoolIndexArgs& g, const Affine<W>& affine, int64_t image, int column)
      : g(g), affine(affine), image(image), x0(column * 2 - (int)g.p) {}

  __device__ __forceinline__ int inside(int y) const { return min(max(y, 0), (int)g.h - 1); }

  __device__ __forceinline__ Taken operator()(int y) const {
    const int c = (int)g.c, w = (int)g.w;
    Taken row;
#pragma unroll
    for (int l = 0; l < 3; ++l) {
      const int x = min(max(x0 + l, 0), w - 1);
      const Taken one = element(load<E, W>(g.x, image + (inside(y) * w + x) * c), x - x0);
      row = l == 0 ? one : row.or_larger(one);
    }
    return row;
  }

 private:
  __device__ __forceinline__ Taken element(const Pack<E, W>& v, int place) const {
    Taken one;
#pragma unroll
    for (int i = 0; i < Taken::N; ++i) {
      one.value[i] = E::pair(normalised(v, 2 * i), normalised(v, 2 * i + 1));
      one.x[i] = reinterpret_cast<const unsigned*>(&v)[i];
      one.place[i] = place * 0x10001u;
    }
    return one;
  }
  __device__ __forceinline__ float normalised(const Pack<E, W>& v, int j) const {
    return E::relu(bn_affine<E>(widened(v, j), affine.scale.at[j], affine.shift.at[j]));
  }
};

}  // namespace
}  // namespace rf::cuda
