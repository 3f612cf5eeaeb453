#include "kernels.h"

#include "isa.h"
#include "training.h"

namespace rf::cpu {

const KernelTable* kernels(DType dtype) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (dtype == DType::bf16 && isa == Isa::amx_bf16) return amx::table_bf16();
  if (dtype == DType::bf16) return isa == Isa::avx512_bf16 ? avx512_bf16::table_bf16() : nullptr;
  if (isa >= Isa::avx512) return avx512::table_f32();
  if (isa == Isa::avx2) return avx2::table_f32();
#endif
  return nullptr;
}

const TrainingTable* training_kernels(DType dtype) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  const bool bf16 = dtype == DType::bf16;
  if (isa >= Isa::avx512_bf16 && bf16) return &avx512_bf16::training_bf16;
  if (isa >= Isa::avx512) return bf16 ? &avx512::training_bf16 : &avx512::training_f32;
  if (isa == Isa::avx2) return bf16 ? &avx2::training_bf16 : &avx2::training_f32;
#endif
  return nullptr;
}

}  // namespace rf::cpu
