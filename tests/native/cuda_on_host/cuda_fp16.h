// float16 on the host, by the processor's own conversions.
#pragma once

#include <immintrin.h>

#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) { return _cvtsh_ss(v.bits); }
inline __half __float2half_rn(float f) {
  if (f != f) return {0x7fff};
  return {_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)};
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
