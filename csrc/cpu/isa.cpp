#include "isa.h"

#include <atomic>
#include <cstring>

namespace rf::cpu {

static const char* const kNames[] = {"none", "avx2", "avx512", "avx512_bf16"};

Isa detected_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::none;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
      return Isa::avx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
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
