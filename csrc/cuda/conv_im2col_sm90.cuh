// An implicit GEMM: one warp fetches tiles of x by TMA's im2col mode and tiles of the weight by its
// tiled mode, four others multiply them (wgmma). CUTLASS has no persistent schedule for it on sm_90:
// what hides a block's beginning and end is another block on the same multiprocessor.
#pragma once

#include "conv_epilogue_sm90.cuh"

#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>

#include "conv_problem_sm90.h"

namespace rf::cuda::sm90 {

constexpr int kSharedBytes = 228 * 1024, kReservedBytes = 1024;  // of a multiprocessor; of a block

// Resident: so many blocks fit a multiprocessor, by their shared memory and by their registers.
template <class E, int M, int N, int ClusterM, int Stages, int Resident>
struct Im2col {
  static constexpr int kTileM = M, kTileN = N, kCluster = ClusterM;
  static constexpr bool kPointwise = false;

  // 64 channels are 128 bytes, the widest swizzle.
  using Tile = cute::Shape<cute::Int<M>, cute::Int<N>, cute::Shape<cute::_64>>;
  using Cluster = cute::Shape<cute::Int<ClusterM>, cute::_1, cute::_1>;
  using Layout = cutlass::layout::TensorNHWC;
  using End = Epilogue<E, Tile, Cluster, Layout, cutlass::epilogue::TmaWarpSpecialized>;
  using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, E, Layout,
      kChannelStep, E, Layout, kChannelStep, float, Tile, Cluster,
      cutlass::conv::collective::StageCount<Stages>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  struct Kernel : cutlass::conv::kernel::ConvUniversal<ConvProblem, Mainloop, End> {
    static constexpr uint32_t MinBlocksPerMultiprocessor = Resident;  // ptxas keeps to it
  };
  using Op = cutlass::conv::device::ConvUniversalAdapter<Kernel>;
  static_assert(Resident * (Kernel::SharedStorageSize + kReservedBytes) <= kSharedBytes);

  static typename Op::Arguments arguments(const ConvArgs& args) {
    const ConvProblem shape = problem(args.shape);
    typename Kernel::StrideD stride{};  // of the pixels as (column, row, image)
    cute::get<0, 0>(stride) = shape.stride_C[2];
    cute::get<0, 1>(stride) = shape.stride_C[1];
    cute::get<0, 2>(stride) = shape.stride_C[0];
    return {shape,
            {static_cast<const E*>(args.x), static_cast<const E*>(args.weight)},
            epilogue_arguments<End, E, Tile>(args, stride)};
  }
};

}  // namespace rf::cuda::sm90

#define RF_IM2COL(M, N, CLUSTER, STAGES, RESIDENT)                                            \
  namespace rf::cuda {                                                                        \
  template <class E>                                                                          \
  using Im2col = sm90::Im2col<E, M, N, CLUSTER, STAGES, RESIDENT>;                            \
  ConvKernels im2col_##M##x##N = {                                                            \
      sm90::entry<Im2col<cutlass::bfloat16_t>>("im2col-m" #M "n" #N "c" #CLUSTER, DType::bf16), \
      sm90::entry<Im2col<cutlass::half_t>>("im2col-m" #M "n" #N "c" #CLUSTER, DType::f16)};   \
  }
