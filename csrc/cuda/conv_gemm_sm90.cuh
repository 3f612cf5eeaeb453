// A 1x1 convolution of stride 1 as a plain matrix product of (pixels, c) and (c, o), by blocks that
// stay and take one tile after another: a tile's end overlaps with the beginning of the next.
#pragma once

#include "conv_epilogue_sm90.cuh"

#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace rf::cuda::sm90 {

template <class E, template <class> class Output>
struct Gemm {
  // 64 channels are 128 bytes, the widest swizzle.
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using End = Epilogue<E, Tile, Cluster, Output>;
  // Two groups of warps on tiles of their own: one's end runs beside the other's products.
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, E, cutlass::layout::RowMajor, kChannelStep,
      E, cutlass::layout::ColumnMajor, kChannelStep, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<(int)sizeof(typename End::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Problem = cute::Shape<int, int, int, int>;
  // A name of its own keeps the symbols short.
  struct Kernel : cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, End,
                                                       cutlass::gemm::PersistentScheduler> {};
  using Op = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Op::Arguments arguments(const ConvArgs& args) {
    const cute::Stride<int64_t, cute::_1, int64_t> in{args.c, {}, 0}, out{args.o, {}, 0};
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {int(args.pixels), int(args.o), int(args.c), 1},
            {static_cast<const E*>(args.x), in, static_cast<const E*>(args.weight), in},
            epilogue_arguments<End, E, Tile>(args, out)};
  }
};

}  // namespace rf::cuda::sm90

#define RF_GEMM(TABLE, NAME, OUTPUT)                                              \
  namespace rf::cuda {                                                            \
  template <class E>                                                              \
  using Gemm = sm90::Gemm<E, sm90::OUTPUT>;                                       \
  ConvKernels TABLE = {sm90::entry<Gemm<cutlass::bfloat16_t>>(NAME, DType::bf16), \
                       sm90::entry<Gemm<cutlass::half_t>>(NAME, DType::f16)};     \
  }
