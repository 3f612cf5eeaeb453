// The training kernels built for AVX-512 with BF16: bfloat16, rounded by one instruction.
#include "../common/bn_vectors.h"
#include "bf16.h"
#include "training.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

// After the system headers: their inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace rf::cpu::avx512_bf16 {
namespace {
#define RF_BF16
#include "vec_avx512.h"
#include "../common/bn_math.h"
#include "rows.inl"
#include "bn.inl"
#include "max_pool_training.inl"
#include "training_table.inl"
}  // namespace
const TrainingTable training_bf16 = training_table<Bf16>;
}  // namespace rf::cpu::avx512_bf16
#endif
