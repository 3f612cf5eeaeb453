#include "kernels.h"

#include "isa.h"
#include "training.h"

namespace rf::cpu {

#if defined(__x86_64__)
template <class Table>
static const Table* pick(DType dtype, const Table* f32, const Table* bf16, const Table* f16) {
  return dtype == DType::f32 ? f32 : dtype == DType::bf16 ? bf16 : f16;
}
#endif

const KernelTable* kernels(DType dtype) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (dtype == DType::bf16 && isa == Isa::amx_bf16) return amx::table_bf16();
  if (dtype == DType::bf16 && isa == Isa::avx512_bf16) return avx512_bf16::table_bf16();
  if (isa >= Isa::avx512)
    return pick(dtype, avx512::table_f32(), avx512::table_bf16(), avx512::table_f16());
  if (isa == Isa::avx2) return pick(dtype, avx2::table_f32(), avx2::table_bf16(), avx2::table_f16());
#endif
  return nullptr;
}

const TrainingTable* training_kernels(DType dtype) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512_bf16 && dtype == DType::bf16) return &avx512_bf16::training_bf16;
  if (isa >= Isa::avx512)
    return pick(dtype, &avx512::training_f32, &avx512::training_bf16, &avx512::training_f16);
  if (isa == Isa::avx2)
    return pick(dtype, &avx2::training_f32, &avx2::training_bf16, &avx2::training_f16);
#endif
  return nullptr;
}

}  // namespace rf::cpu
