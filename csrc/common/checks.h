// Argument checks shared by the bindings: a ValueError begins with the argument's name.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "conv_shape.h"

namespace rf {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline void need(const char* name, int64_t value, int64_t least, int64_t most = int64_t(1) << 31) {
  if (value < least || value > most)
    fail(std::string(name) + ": expected " + std::to_string(least) + " to " + std::to_string(most) +
         ", got " + std::to_string(value));
}

inline void need_pointer(const char* name, uintptr_t address) {
  if (!address) fail(std::string(name) + ": null pointer");
}

// A block of memory as it comes from Python: what an argument is called, where, how large.
struct Block {
  const char* name;
  uintptr_t address;
  size_t bytes;
};

inline void need_block(const Block& block, size_t alignment) {
  need_pointer(block.name, block.address);
  if (block.address % alignment)
    fail(std::string(block.name) + ": must be aligned to " + std::to_string(alignment) + " bytes");
}

// Elementwise kernels may write over what they read, element for element, not one beside it.
inline void need_same_or_apart(const Block& out, const Block& in) {
  const bool apart = out.address + out.bytes <= in.address || in.address + in.bytes <= out.address;
  if (!apart && (out.address != in.address || out.bytes != in.bytes))
    fail(std::string(out.name) + ": overlaps " + in.name + " without being the same memory");
}

inline void need_apart(const Block& out, const Block& other) {
  if (out.address < other.address + other.bytes && other.address < out.address + out.bytes)
    fail(std::string(out.name) + ": must not overlap " + other.name);
}

// The bytes of `elements` of `itemsize` each, counted in double as a product of sizes may wrap.
inline size_t need_bytes(const char* name, double elements, size_t itemsize) {
  if (elements > 1e15) fail(std::string(name) + ": the tensors are too large");
  return size_t(elements) * itemsize;
}

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  fail("dtype: expected float32, bfloat16 or float16, got " + name);
}

template <class P>
P* pointer(uintptr_t address) {
  return reinterpret_cast<P*>(address);
}
inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace rf
