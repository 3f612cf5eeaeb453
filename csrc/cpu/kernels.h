// What one build of the kernels (one instruction set, one dtype) offers to the launchers.
#pragma once

#include "../common/conv_shape.h"

namespace rf::cpu {

// One call of conv_bn_act. Null scale, shift or residual: ones, zeros, none.
struct ConvArgs {
  ConvShape s;
  const void* x;
  const void* packed;
  const float* scale;
  const float* shift;
  const void* residual;
  void* y;
  char* scratch;
  int threads;
  bool relu;
  float *mean, *var;  // receive the output's moments where nothing is done to it; null: not wanted
};

// A weight as it lies in memory: the element of output channel o, input channel c (of one group)
// and tap t is at data + o * along_o + c * along_c + t * along_tap. A wide one is float32, and rounded
// to the kernel's dtype as it is read.
struct Weight {
  const void* data;
  int64_t along_o, along_c, along_tap;
  bool wide;
};

// An algorithm is four functions of the shape. Scratch is shared + threads * per_thread bytes.
struct ConvAlgorithm {
  const char* name;
  bool (*can_run)(const ConvShape&);
  size_t (*packed_bytes)(const ConvShape&);
  void (*pack)(const ConvShape&, const Weight&, void* packed);
  size_t (*scratch_bytes)(const ConvShape&, int threads);
  void (*run)(const ConvArgs&);
  bool gives_moments = false;  // else they are not looked at
};

// One call of conv_backward_weight: a convolution in one group.
struct ConvBackwardWeightArgs {
  ConvShape s;
  const void* grad;
  const void* x;
  void* grad_weight;
  char* scratch;
  int threads;
  bool channels_last;  // of grad_weight, else it is contiguous
  bool wide;           // grad_weight is float32, whatever the dtype
};

// A way to sum a weight's gradient; `run` returns whether the result is finite, or right as it is.
struct WeightGradient {
  const char* name;
  bool (*can_run)(const ConvShape&);
  size_t (*scratch_bytes)(const ConvShape&, int threads);
  bool (*run)(const ConvBackwardWeightArgs&);
};

template <class G>
constexpr WeightGradient weight_gradient(const char* name) {
  return {name, G::can_run, G::scratch_bytes, G::run};
}

struct PoolArgs {
  DType dtype;
  const void* x;
  void* y;
  int64_t n, h, w, c, k, s, p;
};

struct HeadArgs {
  DType dtype;
  const void* x;       // (n, hw, c)
  const void* weight;  // (classes, c), as torch.nn.Linear keeps it
  const void* bias;    // (classes) or null
  void* y;             // (n, classes)
  float* scratch;      // n * c floats
  int64_t n, hw, c, classes;
};

struct KernelTable {
  const ConvAlgorithm* conv;  // ends with a null name
  const WeightGradient* conv_backward_weight;  // ends with a null name
  void (*max_pool)(const PoolArgs&);
  void (*head)(const HeadArgs&);
};

// Null where no instruction set with kernels is active.
const KernelTable* kernels(DType dtype);

namespace avx2 { const KernelTable *table_f32(), *table_bf16(), *table_f16(); }
namespace avx512 { const KernelTable *table_f32(), *table_bf16(), *table_f16(); }
namespace avx512_bf16 { const KernelTable* table_bf16(); }
namespace amx { const KernelTable* table_bf16(); }  // null where the assembler knows no AMX

}  // namespace rf::cpu
