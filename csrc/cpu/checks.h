// What the bindings of the CPU kernels check beside sizes and addresses: a dtype with kernels.
#pragma once

#include <string>

#include "../common/checks.h"
#include "isa.h"
#include "kernels.h"
#include "training.h"

namespace rf {

inline const cpu::KernelTable& table_for(DType dtype) {
  const cpu::KernelTable* table = cpu::kernels(dtype);
  if (!table) fail(std::string("dtype: no kernels for it on ") + cpu::isa_name(cpu::active_isa()));
  return *table;
}

inline const cpu::TrainingTable& training_table_for(DType dtype) {
  const cpu::TrainingTable* table = cpu::training_kernels(dtype);
  if (!table) fail(std::string("dtype: no kernels for it on ") + cpu::isa_name(cpu::active_isa()));
  return *table;
}

}  // namespace rf
