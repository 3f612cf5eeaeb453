// The end of the 1x1 convolution's kernels as one epilogue visitor tree of CUTLASS:
//
//   y = max(scale * acc + (beta * residual + shift), least)
//
// in float32, rounded once. One tree runs all uses, chosen between at run time: beta is 0 where there
// is no residual, which then is not loaded; `least` is 0 for ReLU and -inf for none. The maximum keeps
// NaN, as torch's ReLU does.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/kernel_hardware_info.hpp>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>

#include <limits>
#include <stdexcept>
#include <string>

#include "conv_bn_act.h"

namespace rf::cuda::sm90 {

struct Bound {
  float least;
};

template <class T>
struct LowerBound;

template <int N>
struct LowerBound<cutlass::Array<float, N>> {
  using Arguments = Bound;
  CUTLASS_HOST_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> values,
                                                          Bound bound) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i)
      values[i] = cutlass::maximum_with_nan_propagation<float>{}(values[i], bound.least);
    return values;
  }
};

// CUTLASS asks the type of one value what arguments there are.
template <>
struct LowerBound<float> {
  using Arguments = Bound;
};

template <class E, class Tile>
struct Tree {
  template <template <class> class F, class Out>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<
      F, Out, float, cutlass::FloatRoundStyle::round_to_nearest>;
  template <class... Nodes>
  using Evt = cutlass::epilogue::fusion::Sm90EVT<Nodes...>;
  using Channel = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float>;
  using Scalar = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float>;
  using Residual = cutlass::epilogue::fusion::Sm90SrcFetch<E>;
  using Sum = cutlass::epilogue::fusion::Sm90AccFetch;

  using MultiplyAdd = Compute<cutlass::homogeneous_multiply_add, float>;
  using Added = Evt<MultiplyAdd, Scalar, Residual, Channel>;
  using Root = Evt<Compute<LowerBound, E>, Evt<MultiplyAdd, Channel, Sum, Added>>;

  static typename Root::Arguments arguments(const ConvArgs& args) {
    const float beta = args.residual ? 1.f : 0.f;
    const float least = args.relu ? 0.f : -std::numeric_limits<float>::infinity();
    return {{{args.scale, 1.f}, {}, {{{beta}}, {}, {args.shift, 0.f}, {}}, {}}, {least}};
  }
};

// A tile ends in pieces of 64 pixels and 64 channels, four of the residual fetched ahead and two of y
// on their way out. CUTLASS's own choice, 64x32, has twice the barriers: with twice as many pieces
// under way it took 85.7 us at 14x14, this 77.7 and, with memory apart, 74.6 (H200, 256 to 1024 channels,
// batch 256).
using Piece = cute::Shape<cute::_64, cute::_64>;

// As built, a piece of y takes the place of its piece of the residual, for which the next one waits
// until y has left.
template <class Built>
struct InPlace {
  using Op = Built;
};

// With shared memory of its own for y.
template <class Built>
struct Apart;
template <int Fetched, int Stored, int Fragment, bool Reuse, bool Delay, class... Rest>
struct Apart<cutlass::epilogue::collective::CollectiveEpilogue<
    cutlass::epilogue::Sm90TmaWarpSpecialized<Fetched, Stored, Fragment, Reuse, Delay>, Rest...>> {
  using Policy = cutlass::epilogue::Sm90TmaWarpSpecialized<Fetched, Stored, Fragment, false, Delay>;
  using Op = cutlass::epilogue::collective::CollectiveEpilogue<Policy, Rest...>;
};

template <class E, class Tile, class Cluster, template <class> class Output>
using Epilogue = typename Output<typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, Piece, float, float, E,
    cutlass::layout::RowMajor, kChannelStep, E, cutlass::layout::RowMajor, kChannelStep,
    cutlass::epilogue::TmaWarpSpecialized, typename Tree<E, Tile>::Root>::CollectiveOp>::Op;

// Arguments of an epilogue. TMA wants an address to make a descriptor of, also where the residual
// is never loaded.
template <class Epilogue, class E, class Tile, class Stride>
typename Epilogue::Arguments epilogue_arguments(const ConvArgs& args, Stride stride) {
  E* y = static_cast<E*>(args.y);
  const E* residual = args.residual ? static_cast<const E*>(args.residual) : y;
  return {Tree<E, Tile>::arguments(args), residual, stride, y, stride};
}

// --- the table ------------------------------------------------------------------------------------

// A Kernel has Op, CUTLASS's device adapter, and arguments(const ConvArgs&).
template <class Kernel>
bool can_implement(const ConvArgs& args) {
  return Kernel::Op::can_implement(Kernel::arguments(args)) == cutlass::Status::kSuccess;
}

template <class Kernel>
size_t workspace_bytes(const ConvArgs& args) {
  return Kernel::Op::get_workspace_size(Kernel::arguments(args));
}

template <class Kernel>
void run(const ConvArgs& args, void* workspace, Stream stream) {
  auto arguments = Kernel::arguments(args);
  const auto failed = [](const char* why) {
    throw std::runtime_error(std::string("conv_bn_act: launch failed: ") + why);
  };
  const cudaError_t error = cudaGetDevice(&arguments.hw_info.device_id);
  if (error != cudaSuccess) failed(cudaGetErrorString(error));
  typename Kernel::Op op;
  const cutlass::Status status = op.run(arguments, workspace, (cudaStream_t)stream);
  if (status != cutlass::Status::kSuccess) failed(cutlassGetStatusString(status));
}

template <class Kernel>
constexpr ConvKernel entry(const char* name, DType dtype) {
  return {name, dtype, &can_implement<Kernel>, &workspace_bytes<Kernel>, &run<Kernel>};
}

}  // namespace rf::cuda::sm90
