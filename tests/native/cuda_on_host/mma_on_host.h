// The warp's matrices on the host: lanes leave their parts where the others of the warp find them.
#pragma once

#include "cuda_runtime.h"

namespace rf::cuda {

struct Lane32 {
  const void* row;
  uint32_t a[4];
  uint2 b;
};

inline Lane32* lanes_of_warp() {
  static Lane32 lanes[32][32];
  return lanes[threadIdx.x / 32];
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  Lane32* lanes = lanes_of_warp();
  const unsigned lane = threadIdx.x % 32;
  lanes[lane].row = row;
  __syncwarp();
  for (int i = 0; i < 4; ++i)
    r[i] = static_cast<const uint32_t*>(lanes[8 * i + lane / 4].row)[lane % 4];
  __syncwarp();
}

inline void load_transposed(uint32_t (&r)[4], const void* row) {
  Lane32* lanes = lanes_of_warp();
  const unsigned lane = threadIdx.x % 32;
  lanes[lane].row = row;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](unsigned from) {
      return (uint32_t) static_cast<const uint16_t*>(lanes[8 * i + from].row)[lane / 4];
    };
    r[i] = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
  }
  __syncwarp();
}

template <class E>
float half_of(uint32_t pair, int which) {
  return E::widen(typename E::T{(uint16_t)(pair >> 16 * which)});
}

template <class E>
void multiply(float (&sums)[4], const uint32_t (&a)[4], uint2 b) {
  Lane32* lanes = lanes_of_warp();
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) lanes[lane].a[i] = a[i];
  lanes[lane].b = b;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int last = k / 8, of_row = k % 8 / 2;
      const uint2 whole = lanes[column * 4 + of_row].b;
      sums[i] += half_of<E>(lanes[lane / 4 * 4 + of_row].a[i / 2 + 2 * last], k % 2) *
                 half_of<E>(last ? whole.y : whole.x, k % 2);
    }
  }
  __syncwarp();
}

template <class E>
uint32_t larger(uint32_t a, uint32_t b) {
  uint32_t r = 0;
  for (int i = 0; i < 2; ++i) {
    const float x = half_of<E>(a, i), y = half_of<E>(b, i);
    r |= (uint32_t)E::narrow(x != x || x > y ? x : y).bits << 16 * i;
  }
  return r;
}

}  // namespace rf::cuda
