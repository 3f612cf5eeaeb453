// Which convolutions the tensor memory accelerator (TMA) can fetch in its im2col mode.
#pragma once

#include <limits>
#include <string>

#include "../common/conv_shape.h"

namespace rf::cuda {

// What TMA takes: 16-byte accesses, 3 bits of stride, 8 bits of a corner and of an offset.
constexpr int64_t kChannelStep = 8, kMostStride = 8, kMostReach = 254, kCorner = 128;
constexpr int64_t kMostImageBytes = int64_t(1) << 40;

// A window's first and last place over one side of the map, relative to the map's own.
struct Corners {
  int64_t lower, upper, reach;

  Corners(int64_t k, int64_t p, int64_t d) : lower(-p), upper(p - (k - 1) * d), reach((k - 1) * d) {}
  bool fit() const {
    return lower >= -kCorner && upper >= -kCorner && upper < kCorner && reach <= kMostReach;
  }
};

inline std::string two(int64_t a, int64_t b) {
  return "(" + std::to_string(a) + ", " + std::to_string(b) + ")";
}

// Why no kernel here takes a convolution of this shape, or nothing.
inline std::string conv_limit(const ConvShape& s) {
  if (s.groups != 1) return "takes groups of 1, got " + std::to_string(s.groups);
  if (s.c % kChannelStep || s.o % kChannelStep)
    return "takes channels in multiples of 8, got " + two(s.c, s.o);
  if (s.sh > kMostStride || s.sw > kMostStride)
    return "takes strides of at most 8, got " + two(s.sh, s.sw);
  if (!Corners(s.kh, s.ph, s.dh).fit() || !Corners(s.kw, s.pw, s.dw).fit())
    return "takes windows that reach over at most 254 pixels, and beyond the map by at most 128, got " +
           two((s.kh - 1) * s.dh, (s.kw - 1) * s.dw) + " with padding " + two(s.ph, s.pw);
  // Coordinates are 32-bit integers.
  const double most = std::numeric_limits<int32_t>::max();
  const double pixels = double(s.n) * s.oh() * s.ow(), depth = double(s.kh) * s.kw * s.c;
  for (double extent : {double(s.n), double(s.h), double(s.w), double(s.o), pixels, depth})
    if (extent > most) return "takes at most 2147483647 images, pixels and channels";
  if (s.h * s.w * s.c * int64_t(itemsize(s.dtype)) >= kMostImageBytes)
    return "takes images of less than 2^40 bytes";
  return "";
}

}  // namespace rf::cuda
