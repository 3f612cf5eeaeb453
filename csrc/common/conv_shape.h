// Sizes of a 2-d convolution, shared by every backend.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace rf {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline size_t itemsize(DType d) { return d == DType::f32 ? 4 : 2; }

struct ConvShape {
  DType dtype;
  int64_t n, h, w, c, o;  // images, input rows, input columns, input and output channels
  int64_t kh, kw, sh, sw, ph, pw, dh, dw, groups;

  int64_t oh() const { return (h + 2 * ph - dh * (kh - 1) - 1) / sh + 1; }
  int64_t ow() const { return (w + 2 * pw - dw * (kw - 1) - 1) / sw + 1; }
  int64_t cg() const { return c / groups; }  // input channels of one group
  int64_t og() const { return o / groups; }  // output channels of one group
};

RF_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RF_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
RF_HOST_DEVICE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
RF_HOST_DEVICE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace rf
