// The kernels built for AVX-512 with BF16 dot products, bfloat16.
#include "bf16.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include <utility>

// After the system headers: their inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace rf::cpu::avx512_bf16 {
namespace {
#define RF_BF16
#include "vec_avx512.h"
#include "conv_tile.inl"
#include "weight.inl"
#include "conv_direct.inl"
#include "conv_winograd.inl"
#include "conv_backward_weight_winograd.inl"
#include "conv_backward_weight_direct.inl"
#include "pool_head.inl"
#include "kernel_table.inl"
}  // namespace
const KernelTable* table_bf16() { return &kernel_table<Bf16>; }
}  // namespace rf::cpu::avx512_bf16
#endif
