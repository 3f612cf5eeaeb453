// What CUTLASS makes of a convolution's sizes, for ctypes: no device code is generated.
#include "../../csrc/cuda/conv_im2col_sm90.cuh"
#include "../../csrc/cuda/conv_limits.h"

using Kernel = rf::cuda::sm90::Im2col<cutlass::half_t, 64, 64, 1, 4, 3>;

// sizes: n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups. out: the output's n, h, w, c and the
// lower and upper corners of its windows as (column, row); whether CUTLASS implements it; whether we
// find a limit.
extern "C" __attribute__((visibility("default"))) void describe(const int64_t* s, int64_t* out) {
  const rf::ConvShape shape{rf::DType::f16, s[0], s[1], s[2], s[3],  s[4],  s[5],  s[6],
                            s[7],           s[8], s[9], s[10], s[11], s[12], s[13]};
  const rf::cuda::sm90::ConvProblem problem = rf::cuda::sm90::problem(shape);
  for (int i = 0; i < 4; ++i) *out++ = problem.shape_C[i];
  for (int corner : cutlass::conv::collective::detail::compute_lower_corner_whd(problem))
    *out++ = corner;
  for (int corner : cutlass::conv::collective::detail::compute_upper_corner_whd(problem))
    *out++ = corner;
  rf::cuda::ConvArgs args{};
  args.shape = shape;
  *out++ = rf::cuda::sm90::can_implement<Kernel>(args);
  *out = !rf::cuda::conv_limit(shape).empty();
}
