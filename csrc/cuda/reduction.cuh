// Sums over the rows: each thread its own, then one tree over the threads of a block, then another
// over the parts. Every order is fixed by the shape, so results have the same bits on any GPU.
#pragma once

#include "../common/moments.h"
#include "launch.cuh"

namespace rf::cuda {

// A thread's own sums stay in float over this many rows at most.
constexpr int kMostRows = 256;

// Into how many parts the rows are cut. Enough to fill a GPU, but with 16 rows or more for each
// thread, so that a part's results are small beside what it reads.
inline int64_t device_parts(int64_t rows, int64_t c) {
  constexpr int64_t blocks = 512, wide = 256;  // channels of a tile of 32 threads, 8 apiece
  const int64_t by_rows = rows * min64(c, wide) / (16 * kThreads * 8);
  const int64_t by_blocks = max64(1, blocks * wide / max64(c, wide));
  // Every tiling has 8 rows of threads at least.
  const int64_t least = max64(1, ceil_div(rows, 8 * kMostRows));
  return max64(least, min64(by_rows, by_blocks));
}

// N values of every thread, merged over the threads of a block that share a channel, in a tree;
// the thread in row 0 gets the result. merge(own, other) takes another thread's N values.
template <int N, class F>
__device__ __forceinline__ void merge_rows(const Thread& t, double (&own)[N], F merge) {
  __shared__ double others[N][kThreads / 2];
  for (int half = t.step / 2; half; half /= 2) {
    const int slot = (t.row % half) * t.lanes + t.lane;
    if (t.row >= half && t.row < 2 * half) {
#pragma unroll
      for (int i = 0; i < N; ++i) others[i][slot] = own[i];
    }
    __syncthreads();
    if (t.row < half) {
      double other[N];
#pragma unroll
      for (int i = 0; i < N; ++i) other[i] = others[i][slot];
      merge(own, other);
    }
    __syncthreads();
  }
}

// For kernels with a thread row per few parts: 8 channels a block, and 32 threads for each.
inline Tiling tiling_over_parts(int64_t parts, int64_t c) {
  Tiling tiling(parts, c, 1);
  tiling.log2_lanes = 3;
  tiling.tiles = static_cast<unsigned>(ceil_div(c, 8));
  return tiling;
}

}  // namespace rf::cuda
