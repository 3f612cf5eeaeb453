// Mean and biased variance per channel: one pass over x, then one over the parts' results.
#include "reduction.cuh"

namespace rf::cuda {
namespace {

#include "../common/bn_math.h"

__device__ __forceinline__ double squared(double v) { return v * v; }

// Read at once; the first ones give the shift. As few as leave registers for four blocks on a
// multiprocessor: float32 has tiles of half as many channels, so twice the blocks, and who waits for
// memory is then one of many.
template <int W>
constexpr int kRows = W == 8 ? 4 : 8;

// A thread's rows, shifted by the mean of its first few. Being a mean of k of n values it is within
// sqrt(n/k) standard deviations of the mean of all, whatever the data: the variance's relative error
// is at most 1 + n/k times that of a sum, 33 times, of 16-bit maps 65.
template <class E, int W>
struct Moments {
  float shift[W] = {}, sum[W] = {}, square[W] = {};

  __device__ __forceinline__ void add(const Pack<E, W>& x) {
#pragma unroll
    for (int j = 0; j < W; ++j) bn_add_moments<E>(E::widen(x.at[j]), shift[j], sum[j], square[j]);
  }

  // So many rows, `pitch` elements apart.
  __device__ __forceinline__ void add_rows(const typename E::T* row, int64_t pitch, int rows) {
    constexpr int R = kRows<W>;
    some_rows(row, pitch, rows, [&](const auto& x) { set_shift(x, rows); });
    // Here no row is asked whether it is one: that took as many instructions again, and they are
    // what the time went into.
    for (rows -= R, row += R * pitch; rows >= R; rows -= R, row += R * pitch) {
      Pack<E, W> x[R];
#pragma unroll
      for (int i = 0; i < R; ++i) x[i] = load<E, W>(row, i * pitch);
#pragma unroll
      for (int i = 0; i < R; ++i) add(x[i]);
    }
    some_rows(row, pitch, rows, [](const auto&) {});
  }

  // Up to kRows of them, all read before the first is added; in place of those that are not there the
  // last one is, as registers that may not have been written would spill.
  template <class F>
  __device__ __forceinline__ void some_rows(const typename E::T* row, int64_t pitch, int rows,
                                            F before) {
    constexpr int R = kRows<W>;
    if (rows < 1) return;
    Pack<E, W> x[R];
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = load<E, W>(row, (i < rows ? i : rows - 1) * pitch);
    before(x);
#pragma unroll
    for (int i = 0; i < R; ++i)
      if (i < rows) add(x[i]);
  }

  __device__ __forceinline__ void set_shift(const Pack<E, W> (&x)[kRows<W>], int rows) {
    constexpr int R = kRows<W>;
    const float by_count = 1.0f / (rows < R ? rows : R);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < R; ++i)
        if (i < rows) total += E::widen(x[i].at[j]);
      shift[j] = bn_shift<E>(total, by_count);
    }
  }
};

// Of each part and channel the sum, and behind all sums the squared deviations, into scratch.
template <class E, int W>
__global__ void __launch_bounds__(kThreads, 4) bn_stats_parts_kernel(const Tiled<BnStatsArgs> g) {
  __shared__ PutDown<3, W> put_down;
  const Thread t(g.tiling, W);
  const int64_t first = part_begin(g.rows, g.tiling.parts, t.part);
  const int64_t end = part_begin(g.rows, g.tiling.parts, t.part + 1);
  const Dealt rows(end - first, t.step);
  Moments<E, W> moments;
  if (t.inside)
    moments.add_rows(static_cast<const typename E::T*>(g.x) + (first + t.row) * g.c + t.channel,
                     t.step * g.c, (int)rows.count(t.row));
  put_down.put(0, moments.shift);
  put_down.put(1, moments.sum);
  put_down.put(2, moments.square);
  __syncthreads();

  const Gather<W> to(t);
  const auto of_row = [&](int i, double& sum, double& m2) {
    unshifted(rows.of(to.row + i), rows.over(to.row + i), to.of(put_down.at[0], i),
              to.of(put_down.at[1], i), to.of(put_down.at[2], i), sum, m2);
  };
  double total = 0, deviations = 0;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    double sum, m2;
    of_row(i, sum, m2);
    total += sum;
  }
  total = to.over_groups(total);
  const double mean = total / (double)(end - first);
#pragma unroll 2  // all at once, each with what the loop before found, would spill
  for (int i = 0; i < W; ++i) {
    double sum, m2;
    of_row(i, sum, m2);
    deviations += m2 + rows.of(to.row + i) * squared(sum * rows.over(to.row + i) - mean);
  }
  deviations = to.over_groups(deviations);
  const int64_t channel = to.global(t);
  if (to.row != 0 || channel >= g.c) return;
  double* out = reinterpret_cast<double*>(g.scratch) + t.part * g.c + channel;
  out[0] = total;
  out[g.tiling.parts * g.c] = deviations;
}

// The tiling is over the parts; each thread takes every 32nd.
__global__ void __launch_bounds__(kThreads) bn_stats_merge_kernel(const Tiled<BnStatsArgs> g) {
  const Thread t(g.tiling, 1);
  const Gather<1> to(t);
  const int64_t parts = g.tiling.rows;
  const Dealt rows(g.rows, parts);
  const double* sums = reinterpret_cast<const double*>(g.scratch) + t.channel;
  const double* m2s = sums + parts * g.c;
  const int64_t end = t.inside ? parts : 0;
  const double total = to.over_groups(
      sum_parts(t.row, end, t.step, [&](int64_t p) { return sums[p * g.c]; }));
  const double mean = total / (double)g.rows;
  const double deviations = to.over_groups(sum_parts(t.row, end, t.step, [&](int64_t p) {
    return m2s[p * g.c] + rows.of(p) * squared(sums[p * g.c] * rows.over(p) - mean);
  }));
  if (t.row != 0 || !t.inside) return;
  g.mean[t.channel] = (float)mean;
  g.var[t.channel] = (float)(deviations / (double)g.rows);
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
