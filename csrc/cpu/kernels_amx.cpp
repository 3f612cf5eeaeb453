// The kernels built for AMX, bfloat16, beside those for AVX-512 BF16. RF_AMX: the assembler knows it.
#include "../common/moments.h"
#include "bf16.h"
#include "kernels.h"

#if defined(__x86_64__) && (defined(RF_AMX) || defined(RF_AMX_BY_HAND))
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include <numeric>
#include <utility>
#include <vector>

// After the system headers: their inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

namespace rf::cpu::amx {
namespace {
#define RF_BF16
#include "vec_avx512.h"
#include "../common/bn_math.h"
#include "conv_tile.inl"
#include "weight.inl"
#include "conv_direct.inl"
#include "amx.h"
#include "conv_amx_blocks.inl"
#include "conv_moments.inl"
#include "conv_amx.inl"
#include "conv_backward_weight_direct.inl"
#include "conv_backward_weight_amx.inl"
}  // namespace

// `own`, then what there is for AVX-512 BF16; a null name at the end.
template <class A>
std::vector<A> followed_by(A own, const A* others) {
  std::vector<A> all{own};
  for (; others->name; ++others) all.push_back(*others);
  all.push_back({});
  return all;
}

const KernelTable* table_bf16() {
  static const KernelTable& others = *avx512_bf16::table_bf16();
  static const auto conv = followed_by(Amx<Bf16>::algorithm, others.conv);
  static const auto gradients =
      followed_by(weight_gradient<AmxBackwardWeight<Bf16>>("amx"), others.conv_backward_weight);
  static const KernelTable table{conv.data(), gradients.data(), others.max_pool, others.head};
  return &table;
}
}  // namespace rf::cpu::amx
#else
namespace rf::cpu::amx {
const KernelTable* table_bf16() { return nullptr; }
}  // namespace rf::cpu::amx
#endif
