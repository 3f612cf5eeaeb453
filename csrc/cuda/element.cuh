// Elements: T in memory, float in registers; W of them read or written as one access of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../common/lane.h"

namespace rf::cuda {

struct F32 : Lane {
  using T = float;
  static __device__ __forceinline__ float widen(T v) { return v; }
  static __device__ __forceinline__ T narrow(float v) { return v; }
  static __device__ __forceinline__ float rounded(float v) { return v; }
};

struct Bf16 : Lane {
  using T = __nv_bfloat16;
  static __device__ __forceinline__ float widen(T v) { return __bfloat162float(v); }
  static __device__ __forceinline__ T narrow(float v) { return __float2bfloat16_rn(v); }
  // As one of a pair, which nvcc has an instruction for that rectifies too; alone takes a slower one.
  static __device__ __forceinline__ float rounded(float v) {
    return widen(__floats2bfloat162_rn(v, v).x);
  }
  // Two as a word, the first its lower half.
  static __device__ __forceinline__ unsigned pair(float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const unsigned&>(both);
  }
};

struct F16 : Lane {
  using T = __half;
  static __device__ __forceinline__ float widen(T v) { return __half2float(v); }
  static __device__ __forceinline__ T narrow(float v) { return __float2half_rn(v); }
  static __device__ __forceinline__ float rounded(float v) { return widen(narrow(v)); }
  static __device__ __forceinline__ unsigned pair(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return reinterpret_cast<const unsigned&>(both);
  }
};

// All bits of each half of a word whose sign is set.
__device__ __forceinline__ unsigned spread_signs(unsigned word) {
#ifdef __CUDACC__
  unsigned mask;
  asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(mask) : "r"(word));
  return mask;
#else
  return (word >> 15 & 0x10001u) * 0xffffu;
#endif
}

constexpr int kAccess = 16;  // bytes

template <class E, int W>
struct alignas(W * sizeof(typename E::T)) Pack {
  using T = typename E::T;
  T at[W];
};

template <class E, int W>
__device__ __forceinline__ Pack<E, W> load(const void* map, int64_t at) {
  const auto* from = reinterpret_cast<const Pack<E, W>*>(static_cast<const typename E::T*>(map) + at);
  Pack<E, W> v;
  if constexpr (sizeof(v) == kAccess)
    *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(from);
  else
    v = *from;
  return v;
}

// By the intrinsic: nvcc would take an assignment apart and write words of 2 or 4 bytes.
template <class E, int W>
__device__ __forceinline__ void store(void* map, int64_t at, const Pack<E, W>& v) {
  auto* to = reinterpret_cast<Pack<E, W>*>(static_cast<typename E::T*>(map) + at);
  if constexpr (sizeof(v) == kAccess)
    __stwb(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&v));
  else
    *to = v;
}

// Value j. By words: a bfloat16 that is a word's upper half takes nvcc two instructions by itself.
template <class E, int W>
__device__ __forceinline__ float widened(const Pack<E, W>& v, int j) {
  if constexpr (std::is_same_v<E, Bf16> && W > 1) {
    const unsigned word = reinterpret_cast<const unsigned*>(&v)[j / 2];
    const unsigned bits = j % 2 ? word & 0xffff0000u : word << 16;
    return reinterpret_cast<const float&>(bits);
  } else {
    return E::widen(v.at[j]);
  }
}

// W values of a per-channel vector.
template <int W>
struct Channels {
  float at[W];

  Channels() = default;
  __device__ __forceinline__ Channels(const float* vector, int64_t channel) {
    constexpr int width = W < 4 ? W : 4;
#pragma unroll
    for (int i = 0; i < W; i += width) {
      const auto part = load<F32, width>(vector, channel + i);
#pragma unroll
      for (int j = 0; j < width; ++j) at[i + j] = part.at[j];
    }
  }
};

}  // namespace rf::cuda
