// bfloat16 and float32, one at a time: rounded to nearest even, NaN kept.
#pragma once

#include <cstdint>
#include <cstring>

namespace rf::cpu {

inline float bf16_to_float(uint16_t v) {
  const uint32_t u = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint16_t bf16_from_float(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return uint16_t((v != v ? u | 0x400000 : u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace rf::cpu
