// Which instruction set the CPU kernels use.
#pragma once

namespace rf::cpu {

enum class Isa : int { none = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };

Isa detected_isa();               // the best this processor and operating system can run
Isa active_isa();                 // the detected one, unless lowered by set_isa
bool set_isa(const char* name);   // false: unknown name, or more than the processor has
const char* isa_name(Isa isa);

}  // namespace rf::cpu
