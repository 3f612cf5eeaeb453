// A convolution in CUTLASS's terms.
#pragma once

#include <cutlass/conv/convnd_problem_shape.hpp>

#include "../common/conv_shape.h"

namespace rf::cuda::sm90 {

using ConvProblem = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;

inline ConvProblem problem(const ConvShape& s) {
  const auto pair = [](int64_t a, int64_t b) { return ConvProblem::SpatialExtent{int(a), int(b)}; };
  return {cutlass::conv::Mode::kCrossCorrelation,
          ConvProblem::TensorExtent{int(s.n), int(s.h), int(s.w), int(s.c)},
          ConvProblem::TensorExtent{int(s.o), int(s.kh), int(s.kw), int(s.c)},
          pair(s.ph, s.pw),
          pair(s.ph, s.pw),
          pair(s.sh, s.sw),
          pair(s.dh, s.dw),
          int(s.groups)};
}

}  // namespace rf::cuda::sm90
