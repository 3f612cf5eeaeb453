// The kernels built for AVX-512 (F, BW, VL, DQ), bfloat16 and float16, which are multiplied as float32.
#include "bf16.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include <utility>

// After the system headers: their inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")

namespace rf::cpu::avx512 {
namespace {
#include "vec_avx512.h"
#include "widened.inl"
#include "conv_tile.inl"
#include "weight.inl"
#include "conv_direct.inl"
#include "conv_winograd.inl"
#include "conv_backward_weight_winograd.inl"
#include "conv_backward_weight_direct.inl"
#include "pool_head.inl"
#include "kernel_table.inl"
}  // namespace
const KernelTable* table_bf16() { return &kernel_table<Widened<Bf16Memory>>; }
const KernelTable* table_f16() { return &kernel_table<Widened<F16Memory>>; }
}  // namespace rf::cpu::avx512
#endif
