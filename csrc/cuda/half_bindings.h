// What the bindings of kernels for 16-bit maps share: the arguments as they come from Python.
#pragma once

#include <string>

#include "../common/checks.h"
#include "../common/conv_shape.h"

namespace rf::cuda {

inline DType half_precision(const std::string& name) {
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  fail("dtype: expected bfloat16 or float16, got " + name);
}

// A map of `elements`, checked as it is named.
inline Block half_map(const char* name, uintptr_t address, double elements, size_t alignment) {
  const Block block{name, address, need_bytes(name, elements, 2)};
  need_block(block, alignment);
  return block;
}

// A vector, or null.
inline const float* float_vector(const char* name, uintptr_t address) {
  if (address % alignof(float)) need_block({name, address, 0}, alignof(float));
  return pointer<const float>(address);
}

}  // namespace rf::cuda
