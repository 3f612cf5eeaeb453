// With g the gradient behind the ReLU: sum(g), sum(g * (x - mean)) and the same for x2, one pass; g
// itself goes to `masked` where given.
#include "gradient.cuh"
#include "reduction.cuh"

namespace rf::cuda {
namespace {

// Of each thread: their loads are in flight together. As many as leave registers for three blocks on
// a multiprocessor, without spilling.
template <Mask M, bool DUAL>
constexpr int kRows = M == Mask::none ? (DUAL ? 2 : 4) : (DUAL ? 1 : 2);

// In float32 a thread adds so many rows of g among themselves, then to those before. Behind an average
// pool a gradient is the same at every pixel, and then each addition rounds the same way; of 16-bit
// values such a sum is exact.
constexpr int kRun = 16;

// Of each part, channel by channel: the sums of g, those of g * (x - mean), those with x2.
template <class E, int W, Mask M, bool DUAL>
__global__ void __launch_bounds__(kThreads, 3) bn_reduce_parts_kernel(const Tiled<BnReduceArgs> g) {
  constexpr int R = kRows<M, DUAL>, sums = DUAL ? 3 : 2;
  constexpr bool in_runs = sizeof(typename E::T) == 4;
  __shared__ PutDown<sums, W> put_down;
  using Maps = GradientRows<E, W, M, DUAL, R>;
  const Thread t(g.tiling, W);
  float sum[sums][W] = {}, before[W] = {};
  const MaskVectors<W, M> mask(g, t);
  if (t.inside) {
    const Channels<W> mean(g.mean, t.channel), mean2(DUAL ? g.mean2 : g.mean, t.channel);
    const int64_t begin = part_begin(g.rows, g.tiling.parts, t.part);
    const int64_t end = part_begin(g.rows, g.tiling.parts, t.part + 1);
    int rows = (int)Dealt(end - begin, t.step).count(t.row);
    const int64_t pitch = t.step * g.c;
    int64_t at = (begin + t.row) * g.c + t.channel;
    const auto add = [&](const Maps& maps, int i) {
      Pack<E, W> kept;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const float x = E::widen(maps.x[i].at[j]), v = maps.masked(i, j, x, mask);
        sum[0][j] = E::add(sum[0][j], v);
        sum[1][j] = bn_add_product<E>(sum[1][j], v, x, mean.at[j]);
        if constexpr (DUAL)
          sum[2][j] = bn_add_product<E>(sum[2][j], v, E::widen(maps.x2[i].at[j]), mean2.at[j]);
        kept.at[j] = E::narrow(v);
      }
      if (M != Mask::none && g.masked) store<E, W>(g.masked, at + i * pitch, kept);
    };
#pragma unroll 1
    for (; rows >= R; rows -= R, at += R * pitch) {
      const Maps maps(g, [&](int i) { return at + i * pitch; });
#pragma unroll
      for (int i = 0; i < R; ++i) add(maps, i);
      if (in_runs && rows % kRun < R)
#pragma unroll
        for (int j = 0; j < W; ++j) {
          before[j] += sum[0][j];
          sum[0][j] = 0;
        }
    }
    if (R > 1 && rows > 0) {  // what is not there is read as the first and not added
      const Maps maps(g, [&](int i) { return at + (i < rows ? i : 0) * pitch; });
#pragma unroll
      for (int i = 0; i < R; ++i)
        if (i < rows) add(maps, i);
    }
  }
  if (in_runs)
#pragma unroll
    for (int j = 0; j < W; ++j) sum[0][j] += before[j];
#pragma unroll
  for (int k = 0; k < sums; ++k) put_down.put(k, sum[k]);
  __syncthreads();

  const Gather<W> to(t);
  const int64_t channel = to.global(t);
  double* out = reinterpret_cast<double*>(g.scratch) + t.part * sums * g.c + channel;
#pragma unroll
  for (int k = 0; k < sums; ++k) {
    double total = 0;
#pragma unroll
    for (int i = 0; i < W; ++i) total += to.of(put_down.at[k], i);
    total = to.over_groups(total);
    if (to.row == 0 && channel < g.c) out[k * g.c] = total;
  }
}

// The tiling is over the parts and, as channels, over the sums of each channel, side by side: so those
// of one are in one block, which makes the vectors of them.
__global__ void __launch_bounds__(kThreads) bn_reduce_merge_kernel(const Tiled<BnReduceArgs> g) {
  const Thread t(g.tiling, 1);
  const int sums = g.x2 ? 3 : 2, which = (int)(t.channel % sums);
  const int64_t channel = t.channel / sums;
  const double* parts = reinterpret_cast<const double*>(g.scratch) + which * g.c + channel;
  const int64_t end = t.inside ? g.tiling.rows : 0;
  const double total = Gather<1>(t).over_groups(
      sum_parts(t.row, end, t.step, [&](int64_t p) { return parts[p * g.tiling.c]; }));
  const bool first = t.row == 0 && t.inside;
  if (first) (which == 0 ? g.sum_g : which == 1 ? g.sum_gx : g.sum_gx2)[channel] = (float)total;
  if (!g.vectors.a) return;
  __shared__ float of_lane[kThreads];
  if (first) of_lane[t.lane] = (float)total;
  __syncthreads();
  if (first && which == 0) bn_gradient_vectors(g.vectors, channel, of_lane[t.lane], of_lane[t.lane + 1]);
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
                 if constexpr (has_mask<E, M>)
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
  const Tiling over_parts = tiling_over_parts(parts, args.c * (args.x2 ? 3 : 2));
  put("bn_act_backward_reduce", bn_reduce_merge_kernel, over_parts.blocks(), {args, over_parts}, stream);
}

}  // namespace rf::cuda
