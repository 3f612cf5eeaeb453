// The tensor cores as a warp uses them from sm_80 on: matrices of 16-bit elements.
#pragma once

#include "element.cuh"

#ifdef __CUDACC__
namespace rf::cuda {

// Four 8x8 matrices, each lane giving the address of a row: lanes 0 to 7 those of the first. Lane i
// receives, of each, the elements 2 * (i % 4) and the next of row i / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// Likewise, each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// sums (16, 8) += a (16, 16) * b (16, 8). `a` are its quarters, the upper rows before the lower and
// the first columns before the last; lane i holds the sums 2 * (i % 4) and the next of the rows
// i / 4 and i / 4 + 8, and of b's column i / 4 the elements that it would hold of a row of `a`.
#define RF_MMA(TYPE)                                                                              \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, "           \
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                             \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y))

template <class E>
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint2 b) {
  if constexpr (std::is_same_v<E, Bf16>)
    RF_MMA("bf16");
  else
    RF_MMA("f16");
}

#undef RF_MMA

// The larger of two pairs of elements, NaN where one has it.
template <class E>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (std::is_same_v<E, Bf16>)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

}  // namespace rf::cuda
#else
#include "mma_on_host.h"
#endif
