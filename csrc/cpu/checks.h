// What the bindings of the CPU kernels check beside sizes and addresses: a dtype with kernels, a
// convolution's sizes.
#pragma once

#include <string>

#include "../common/checks.h"
#include "isa.h"
#include "kernels.h"
#include "training.h"

namespace rf {

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  fail("dtype: expected float32 or bfloat16, got " + name);
}

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

// The sizes of a convolution.
inline ConvShape checked(ConvShape s) {
  need("n", s.n, 0);
  need("h", s.h, 1);
  need("w", s.w, 1);
  need("c", s.c, 1);
  need("o", s.o, 1);
  need("kh", s.kh, 1, 1 << 12);
  need("kw", s.kw, 1, 1 << 12);
  need("sh", s.sh, 1, 1 << 12);
  need("sw", s.sw, 1, 1 << 12);
  need("ph", s.ph, 0, 1 << 12);
  need("pw", s.pw, 0, 1 << 12);
  need("dh", s.dh, 1, 1 << 12);
  need("dw", s.dw, 1, 1 << 12);
  need("groups", s.groups, 1);
  if (s.c % s.groups) fail("c: must be a multiple of groups");
  if (s.o % s.groups) fail("o: must be a multiple of groups");
  if (s.h + 2 * s.ph < s.dh * (s.kh - 1) + 1) fail("kh: the kernel is taller than the padded input");
  if (s.w + 2 * s.pw < s.dw * (s.kw - 1) + 1) fail("kw: the kernel is wider than the padded input");
  const double limit = 1e15;
  if (double(s.n) * s.h * s.w * s.c > limit || double(s.n) * s.oh() * s.ow() * s.o > limit)
    fail("n: the tensors are too large");
  return s;
}

}  // namespace rf
