// Mean and biased variance per channel: one pass over x, then one over the parts' results.
#include "reduction.cuh"

namespace rf::cuda {
namespace {

#include "../common/bn_math.h"

constexpr int kRows = 8;  // read at once; the first ones give the shift

// Counts, sums and squared deviations of W channels.
template <int W>
struct Moments {
  double at[1 + 2 * W] = {};  // n, sums, m2s

  static __device__ __forceinline__ void merge(double (&own)[1 + 2 * W],
                                               const double (&other)[1 + 2 * W]) {
    if (other[0] == 0) return;
    const MomentsMerge merge(own[0], other[0]);
#pragma unroll
    for (int j = 0; j < W; ++j) merge.add(own[1 + j], own[1 + W + j], other[1 + j], other[1 + W + j]);
    own[0] += other[0];
  }
};

// A thread's rows, shifted by the mean of its first few. Being a mean of k of n values it is within
// sqrt(n/k) standard deviations of the mean of all, whatever the data: the variance's relative error
// is at most 1 + n/k = 33 times that of a sum.
template <class E, int W>
__device__ __forceinline__ void add_rows(const BnStatsArgs& g, const Thread& t, int64_t first,
                                         int64_t end, Moments<W>& moments) {
  float shift[W], sum[W] = {}, square[W] = {};
  int64_t n = 0;
  for (int64_t at = first + t.row; at < end; at += kRows * t.step) {
    Pack<E, W> x[kRows];
    int rows = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (at + i * t.step < end) {
        x[i] = load<E, W>(g.x, (at + i * t.step) * g.c + t.channel);
        ++rows;
      }
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (n == 0) {
        float total = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (i < rows) total += E::widen(x[i].at[j]);
        shift[j] = bn_shift<E>(total, 1.0f / rows);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (i < rows) bn_add_moments<E>(E::widen(x[i].at[j]), shift[j], sum[j], square[j]);
    }
    n += rows;
  }
  if (n == 0) return;
  moments.at[0] = (double)n;
#pragma unroll
  for (int j = 0; j < W; ++j)
    unshifted((double)n, 1.0 / n, shift[j], sum[j], square[j], moments.at[1 + j],
              moments.at[1 + W + j]);
}

// Of each part and channel the sum, and behind all sums the squared deviations, into scratch.
template <class E, int W>
__global__ void __launch_bounds__(kThreads, 2) bn_stats_parts_kernel(const Tiled<BnStatsArgs> g) {
  const Thread t(g.tiling, W);
  Moments<W> moments;
  if (t.inside)
    add_rows<E, W>(g, t, part_begin(g.rows, g.tiling.parts, t.part),
                   part_begin(g.rows, g.tiling.parts, t.part + 1), moments);
  merge_rows(t, moments.at, Moments<W>::merge);
  if (t.row != 0 || !t.inside) return;
  double* sums = reinterpret_cast<double*>(g.scratch) + t.part * g.c + t.channel;
  double* m2s = sums + g.tiling.parts * g.c;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    sums[j] = moments.at[1 + j];
    m2s[j] = moments.at[1 + W + j];
  }
}

// The tiling is over the parts; each thread takes every 32nd.
__global__ void __launch_bounds__(kThreads) bn_stats_merge_kernel(const Tiled<BnStatsArgs> g) {
  const Thread t(g.tiling, 1);
  const int64_t parts = g.tiling.rows;
  const double* sums = reinterpret_cast<const double*>(g.scratch);
  const double* m2s = sums + parts * g.c;
  Moments<1> moments;
  if (t.inside)
    for (int64_t p = t.row; p < parts; p += t.step) {
      const int64_t n = part_begin(g.rows, parts, p + 1) - part_begin(g.rows, parts, p);
      const double part[] = {(double)n, sums[p * g.c + t.channel], m2s[p * g.c + t.channel]};
      Moments<1>::merge(moments.at, part);
    }
  merge_rows(t, moments.at, Moments<1>::merge);
  if (t.row != 0 || !t.inside) return;
  g.mean[t.channel] = (float)(moments.at[1] / (double)g.rows);
  g.var[t.channel] = (float)(moments.at[2] / (double)g.rows);
}

// -------------------------------------------------------------------------------------------------

}  // namespace

void launch(DType dtype, const BnStatsArgs& args, Stream stream) {
  const int64_t parts = device_parts(args.rows, args.c);
  with_element(dtype, args.c, {args.x}, [&](auto element, auto width) {
    using E = decltype(element);
    constexpr int W = decltype(width)::value;
    Tiling tiling(args.rows, args.c, W);
    tiling.parts = parts;
    put("bn_stats", bn_stats_parts_kernel<E, W>, tiling.blocks(), {args, tiling}, stream);
  });
  const Tiling tiling = tiling_over_parts(parts, args.c);
  put("bn_stats", bn_stats_merge_kernel, tiling.blocks(), {args, tiling}, stream);
}

size_t reduction_scratch_bytes(int64_t rows, int64_t c, int doubles) {
  return device_parts(rows, c) * c * doubles * sizeof(double);
}

}  // namespace rf::cuda
