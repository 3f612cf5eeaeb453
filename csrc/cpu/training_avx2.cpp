// The training kernels built for AVX2 with FMA, float32, bfloat16 and float16.
#include "../common/bn_vectors.h"
#include "bf16.h"
#include "training.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

// After the system headers: their inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c")

namespace rf::cpu::avx2 {
namespace {
#include "vec_avx2.h"
#include "../common/bn_math.h"
#include "rows.inl"
#include "bn.inl"
#include "max_pool_training.inl"
#include "training_table.inl"
}  // namespace
const TrainingTable training_f32 = training_table<F32>;
const TrainingTable training_bf16 = training_table<Bf16Memory>;
const TrainingTable training_f16 = training_table<F16Memory>;
}  // namespace rf::cpu::avx2
#endif
