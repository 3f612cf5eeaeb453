// One float at a time, for bn_math.h: what a GPU thread computes with.
#pragma once

#include <cmath>

#include "host_device.h"

namespace rf {

struct Lane {
  using reg = float;

  static RF_HOST_DEVICE float set1(float v) { return v; }
  static RF_HOST_DEVICE float add(float a, float b) { return a + b; }
  static RF_HOST_DEVICE float sub(float a, float b) { return a - b; }
  static RF_HOST_DEVICE float mul(float a, float b) { return a * b; }
  static RF_HOST_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
  // Comparisons with NaN are false, so a NaN passes through all three.
  static RF_HOST_DEVICE float relu(float v) { return v <= 0 ? 0 : v; }
  static RF_HOST_DEVICE float where_passed(float z, float v) { return z <= 0 ? 0 : v; }
  static RF_HOST_DEVICE float finite_or_zero(float v) { return v - v == 0 ? v : 0; }
  // A larger value or a NaN replaces the best, where it was and what it was made of.
  template <class T>
  static RF_HOST_DEVICE void take_max(float v, int at, T from, float& best, int& best_at, T& best_from) {
    if (!(v > best || v != v)) return;
    best = v;
    best_at = at;
    best_from = from;
  }
};

}  // namespace rf
