#include "isa.h"

#include <atomic>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rf::cpu {

static const char* const kNames[] = {"none", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if defined(__x86_64__)
// Which GCC 10 has no name for.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

// Whether there are tile registers for bfloat16, and Linux lets this process use them, which it has to
// be asked for.
static bool has_amx() {
  if (!amx::table_bf16()) return false;
#ifdef RF_AMX_BY_HAND
  return true;
#else
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#endif
}
#endif

Isa detected_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return Isa::none;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return Isa::avx2;
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return has_amx() ? Isa::amx_bf16 : Isa::avx512_bf16;
  }();
  return isa;
#else
  return Isa::none;
#endif
}

static std::atomic<int>& chosen() {
  static std::atomic<int> value{static_cast<int>(detected_isa())};
  return value;
}

Isa active_isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

bool set_isa(const char* name) {
  for (int i = 0; i <= static_cast<int>(detected_isa()); ++i)
    if (std::strcmp(name, kNames[i]) == 0) {
      chosen().store(i, std::memory_order_relaxed);
      return true;
    }
  return false;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace rf::cpu
