// With g the gradient behind the ReLU: sum(g), sum(g * (x - mean)) and the same for x2, one pass; g
// itself goes to `masked` where given.
#include "gradient.cuh"
#include "reduction.cuh"

namespace rf::cuda {
namespace {

// Of each thread: their loads are in flight together. As many as leave registers for two blocks on a
// multiprocessor, without spilling.
template <Mask M, bool DUAL>
constexpr int kRows = M == Mask::none && !DUAL ? 4 : M == Mask::from_y && DUAL ? 1 : 2;

struct Add {
  template <int N>
  __device__ __forceinline__ void operator()(double (&own)[N], const double (&other)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) own[i] += other[i];
  }
};

// Of each part, channel by channel: the sums of g, those of g * (x - mean), those with x2.
template <class E, int W, Mask M, bool DUAL>
__global__ void __launch_bounds__(kThreads, 2) bn_reduce_parts_kernel(const Tiled<BnReduceArgs> g) {
  constexpr int R = kRows<M, DUAL>, sums = DUAL ? 3 : 2;
  const Thread t(g.tiling, W);
  float sum[sums * W] = {};
  if (t.inside) {
    const Channels<W> mean(g.mean, t.channel), mean2(DUAL ? g.mean2 : g.mean, t.channel);
    const MaskVectors<W, M> mask(g, t.channel);
    const int64_t end = part_begin(g.rows, g.tiling.parts, t.part + 1);
    int64_t row = part_begin(g.rows, g.tiling.parts, t.part) + t.row;
    for (; row < end; row += R * t.step) {
      const GradientRows<E, W, M, DUAL, R> maps(g, t, row, end);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        if (!maps.has(i)) break;
        Pack<E, W> kept;
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const float x = E::widen(maps.x[i].at[j]), v = maps.masked(i, j, x, mask);
          sum[j] = E::add(sum[j], v);
          sum[W + j] = bn_add_product<E>(sum[W + j], v, x, mean.at[j]);
          if (DUAL)
            sum[sums * W - W + j] = bn_add_product<E>(
                sum[sums * W - W + j], v, E::widen(maps.x2[DUAL ? i : 0].at[j]), mean2.at[j]);
          kept.at[j] = E::narrow(v);
        }
        if (M != Mask::none && g.masked) store<E, W>(g.masked, maps.at(i), kept);
      }
    }
  }
  double total[sums * W];
#pragma unroll
  for (int i = 0; i < sums * W; ++i) total[i] = sum[i];
  merge_rows(t, total, Add{});
  if (t.row != 0 || !t.inside) return;
  double* out = reinterpret_cast<double*>(g.scratch) + t.part * sums * g.c + t.channel;
#pragma unroll
  for (int i = 0; i < sums; ++i)
#pragma unroll
    for (int j = 0; j < W; ++j) out[i * g.c + j] = total[i * W + j];
}

// The tiling is over the parts and, as channels, over all sums of all channels.
__global__ void __launch_bounds__(kThreads) bn_reduce_merge_kernel(const Tiled<BnReduceArgs> g) {
  const Thread t(g.tiling, 1);
  const double* parts = reinterpret_cast<const double*>(g.scratch);
  double total[1] = {};
  if (t.inside)
    for (int64_t p = t.row; p < g.tiling.rows; p += t.step)
      total[0] += parts[p * g.tiling.c + t.channel];
  merge_rows(t, total, Add{});
  if (t.row != 0 || !t.inside) return;
  const int64_t which = t.channel / g.c;
  float* out = which == 0 ? g.sum_g : which == 1 ? g.sum_gx : g.sum_gx2;
  out[t.channel - which * g.c] = (float)total[0];
}

// -------------------------------------------------------------------------------------------------

template <Mask M, bool DUAL>
void launch_parts(DType dtype, const BnReduceArgs& g, int64_t parts, Stream stream) {
  with_element(dtype, g.c,
               {g.grad, g.x, g.x2, g.scale, g.shift, g.y, g.mean, g.mean2, g.masked},
               [&](auto element, auto width) {
                 using E = decltype(element);
                 constexpr int W = decltype(width)::value;
                 Tiling tiling(g.rows, g.c, W);
                 tiling.parts = parts;
                 put("bn_act_backward_reduce", bn_reduce_parts_kernel<E, W, M, DUAL>,
                     tiling.blocks(), {g, tiling}, stream);
               });
}

}  // namespace

void launch(DType dtype, const BnReduceArgs& args, Stream stream) {
  const int64_t parts = device_parts(args.rows, args.c);
  with_mask(args, [&](auto mask, auto dual) {
    launch_parts<decltype(mask)::value, decltype(dual)::value>(dtype, args, parts, stream);
  });
  const Tiling tiling = tiling_over_parts(parts, args.c * (args.x2 ? 3 : 2));
  put("bn_act_backward_reduce", bn_reduce_merge_kernel, tiling.blocks(), {args, tiling}, stream);
}

}  // namespace rf::cuda
